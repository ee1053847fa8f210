"""Tiny GGUF files, written once."""

from pathlib import Path

import pytest

from bitnet_serving.testing import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def long_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with room for an answer that nobody waits for."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "long.gguf", context=65_536)
