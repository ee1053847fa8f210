"""`wrinklefree train` under the name that older command lines use."""

import sys

from wrinklefree.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
