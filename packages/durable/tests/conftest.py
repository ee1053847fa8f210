"""A published directory, and what is said about it when it is damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from durable import UserError, publish, verify


@pytest.fixture
def published(tmp_path: Path) -> Path:
    with publish(tmp_path / "step_000003", metadata={"step": 3, "loss": 0.25}) as temporary:
        (temporary / "model.bin").write_bytes(bytes(range(40)))
        (temporary / "sub" / "deep").mkdir(parents=True)
        (temporary / "sub" / "deep" / "vocab.txt").write_text("ab\n")
        (temporary / "empty").touch()
    return tmp_path / "step_000003"


@pytest.fixture
def refusal(published: Path) -> Callable[[], str]:
    """Verifies `published`, which must fail with exit code 4, and returns the one line that says why."""

    def refuse() -> str:
        with pytest.raises(UserError) as caught:
            verify(published)
        assert caught.value.exit_code == 4
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return refuse
