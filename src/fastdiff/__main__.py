"""`python -m fastdiff` is `fastdiff`."""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
