"""`wrinklefree export` is `bitnet_serving`'s command line, with the same exit codes and lines."""

from pathlib import Path
from typing import Any

from bitnet_serving.testing import save_tiny


def test_a_checkpoint_is_exported_and_a_wrong_type_is_one_line(wrinklefree: Any, tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model")

    written = wrinklefree("export", "gguf", checkpoint, tmp_path / "model.gguf", "--type", "f16")
    wrong = wrinklefree("export", "gguf", checkpoint, tmp_path / "other.gguf", "--type", "f17")
    unknown = wrinklefree("export", "gguf", checkpoint, tmp_path / "other.gguf", "--types", "f16")

    assert written.exit_code == 0
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert wrong.exit_code == unknown.exit_code == 2
    assert "did you mean 'f16'?" in wrong.err
    assert "did you mean '--type'?" in unknown.err
    assert not (tmp_path / "other.gguf").exists()
