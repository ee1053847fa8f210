"""`python -m wrinklefree` is `wrinklefree`."""

from wrinklefree.cli import main

if __name__ == "__main__":
    main()
