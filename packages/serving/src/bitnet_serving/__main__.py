"""`python -m bitnet_serving`."""

import sys

from bitnet_serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
