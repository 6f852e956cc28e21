"""``python -m kconv`` is the command ``kconv``."""

import sys

from kconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
