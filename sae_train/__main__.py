"""`python -m sae_train` is `sae-train`."""

import atexit
import os
import sys

from sae_train.cli import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # gloo's threads now and then abort a process that ends by itself
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
