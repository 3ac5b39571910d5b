"""``python -m flexprefill`` is the command ``flexprefill``."""

import sys

from flexprefill.cli import main

if __name__ == "__main__":
    sys.exit(main())
