"""How these tests run a command: in this process, so that torch and transformers are imported once."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from wrinklefree.cli import main


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended and what it printed."""

    exit_code: int
    out: str
    err: str


@pytest.fixture
def wrinklefree(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """Run the command line; gives its exit code and what it printed."""
    handler = signal.getsignal(signal.SIGTERM)
    num_threads = torch.get_num_threads()

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, out, err)

    yield run
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests find, or put, the prepared demo data."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module", autouse=True)
def _shared_data(prepared_data: Path) -> Iterator[None]:
    """Runs prepare it once, not once in every module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRINKLEFREE_DATA", str(prepared_data))
        yield
