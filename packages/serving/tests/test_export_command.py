"""`python -m bitnet_serving export gguf` as people meet it: one line for what they can put right, and nothing
left under the final name, whatever happens.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from bitnet_serving.cli import main
from bitnet_serving.export import export_gguf
from bitnet_serving.testing import save_tiny
from durable import UserError

PEAK = """
import resource, sys
import bitnet_serving.export
from pathlib import Path
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
Path("/proc/self/clear_refs").write_text("5")  # start the peak over
before = anonymous()["VmHWM"]
bitnet_serving.export.export_gguf(sys.argv[1], sys.argv[2], body=sys.argv[3])
print(anonymous()["VmHWM"] - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model; nobody changes it."""
    return save_tiny(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.3 GB: an embedding of 61 MB, and 16 layers of 16 MB."""
    return save_tiny(
        tmp_path_factory.mktemp("made") / "large",
        vocab_size=20_000,
        hidden_size=768,
        intermediate_size=1024,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_hidden_layers=16,
    )


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    capfd.readouterr()
    code = main(argv=[str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


def test_a_file_is_written_and_described(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, "export", "gguf", checkpoint, tmp_path / "model.gguf", "--type", "q8_0")

    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'model.gguf'}: ")
    assert "architecture llama" in out
    assert "largest relative scale error" in out


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--type", "tq2-0"], 2, "did you mean 'tq2_0'?"),
        (["--type", "q4_0"], 2, "accepted: "),
        (["--embeddings", "q2_0"], 2, "--embeddings"),
        (["--head", "f32"], 2, "its embedding"),
        (["--type", "f16", "--prefer", "size"], 2, "give one of them"),
        (["--type", "tq2_0", "--merge-lrc"], 2, "--merge-lrc"),
        (["--tokenizer", "/nowhere"], 4, "/nowhere/tokenizer.json"),
        (["--no-such"], 2, "No such option"),
    ],
)
def test_a_wrong_option_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    named: str,
) -> None:
    ended, out, err = run(capfd, "export", "gguf", checkpoint, tmp_path / "model.gguf", *options)

    assert (ended, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert list(tmp_path.iterdir()) == []


def no_tensors(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def never_converted(directory: Path) -> None:
    (directory / "bitnet.json").unlink()


def only_a_pickle(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")


def gone(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("damage", "code", "named"),
    [
        (no_tensors, 4, "model.safetensors: is missing"),
        (cut_short, 4, "truncated"),
        (never_converted, 4, "convert it first"),
        (only_a_pickle, 4, "pickle"),
        (gone, 2, "no such directory"),
    ],
)
def test_a_directory_that_is_no_checkpoint_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    code: int,
    named: str,
) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(damaged)

    ended, out, err = run(capfd, "export", "gguf", damaged, tmp_path / "model.gguf")

    assert (ended, out) == (code, "")
    assert err.count("\n") == 1
    assert named in err
    assert not (tmp_path / "model.gguf").exists()


def test_shapes_that_the_configuration_does_not_have_are_named(tmp_path: Path) -> None:
    def widen(model: nn.Module) -> None:
        model.config.num_key_value_heads = 1  # type: ignore[union-attr]

    odd = save_tiny(tmp_path / "odd", change=widen)

    with pytest.raises(UserError, match=r"k_proj\.weight is 32×64 and must be 16×64 and \d+ more") as refused:
        export_gguf(odd, tmp_path / "model.gguf")
    assert refused.value.exit_code == 4


def test_a_file_in_the_way_stays_unless_it_is_forced(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    taken, folder = tmp_path / "taken.gguf", tmp_path / "folder"
    taken.write_text("mine")
    folder.mkdir()
    command = ("export", "gguf", checkpoint)

    first = run(capfd, *command, taken)
    second = run(capfd, *command, folder)
    assert taken.read_text() == "mine"
    third = run(capfd, *command, taken, "--force")

    assert first[0] == second[0] == 5
    assert "exists already" in first[2]
    assert "not a plain file" in second[2]
    assert third[0] == 0
    assert taken.read_bytes()[:4] == b"GGUF"


def test_a_full_disk_is_one_line(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code, _, err = run(capfd, "export", "gguf", checkpoint, tmp_path / "model.gguf", "--type", "f16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)

    assert code == 5
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_nothing_under_the_name(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.gguf"
    command = [sys.executable, "-m", "bitnet_serving", "export", "gguf", str(large), str(out)]
    seen_writing = 0
    for _ in range(2):
        child = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (out.parent.is_dir() and any(out.parent.iterdir())):
            time.sleep(0.001)
        seen_writing += child.poll() is None
        child.kill()
        child.wait()
        assert not out.exists()
    assert seen_writing

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


@pytest.mark.slow
def test_one_tensor_at_a_time_is_in_memory(large: Path, tmp_path: Path) -> None:
    largest = 20_000 * 768 * 4

    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(large), str(tmp_path / "model.gguf"), "tq2_0"],
        check=True,
        capture_output=True,
        text=True,
    )

    # Above what importing takes. All tensors together are five times the largest.
    assert int(child.stdout.split()[-1]) <= 4 * largest


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, bitnet_serving.cli; assert not {'torch', 'transformers', 'xllamacpp'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
