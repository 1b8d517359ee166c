"""``python -m elbowroom``: the command line."""

import sys

from elbowroom.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
