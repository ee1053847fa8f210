"""`python -m bitnet_serving sizes CHECKPOINT_DIR`: print what a checkpoint weighs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bitnet_serving.sizes import read_sizes
from durable import UserError, error_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see '{self.prog} --help'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = _Parser(prog="python -m bitnet_serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sizes = commands.add_parser("sizes", help="what a checkpoint weighs, by part and by format")
    sizes.add_argument("checkpoint_dir", type=Path)
    try:
        print(read_sizes(parser.parse_args(argv).checkpoint_dir))
    except UserError as error:
        print(error_line(error), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
