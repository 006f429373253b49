"""`python -m sae_train` is `sae-train`: the command line in a process of its own."""

import atexit
import os
import sys

from sae_train.cli import main


def run() -> None:
    """Run the command line and end the process.

    One of several ends without tearing the interpreter down: gloo's threads now and then abort it there.
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # os._exit runs no exit functions, and one of them closes the group of processes (training/ranks.py).
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
