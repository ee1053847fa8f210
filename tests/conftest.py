"""Options of the suites that can run longer than they do by default."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=None, help="Kills for each variant of the chaos suite.")
