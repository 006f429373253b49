"""`python -m sae_train` is `sae-train`."""

import sys

from sae_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
