"""``python -m modeldiff``."""

import sys

from modeldiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
