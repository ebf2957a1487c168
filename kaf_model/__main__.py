"""`python -m kaf_model` is the command `kaf`."""

import sys

from kaf_model.cli import main

if __name__ == "__main__":
    sys.exit(main())
