"""`python -m data_handler`."""

from data_handler.cli import main

if __name__ == "__main__":
    main()
