"""System calls as the kernel saw them, and not as our own code says: read from strace, or stopped by it.

A power cut cannot be tried here. What makes a file survive one is the order of fsync and rename, and that can
be seen.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from durable import verify

SCRIPT = """
import sys
from pathlib import Path
from durable import publish, publish_file
for version in (b"first", b"second"):
    with publish(Path(sys.argv[1], "step_000001"), replace=True) as temporary:
        (temporary / "model.bin").write_bytes(version)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "vocab.txt").write_bytes(version)
    with publish_file(Path(sys.argv[1], "model.gguf"), replace=True) as temporary:
        temporary.write_bytes(version)
"""


def traced(directory: Path) -> list[str]:
    """`fsync model.bin`, `rename step_000001`, …, in order; temporaries are called `(temporary)`."""
    strace = shutil.which("strace")
    log = directory.parent / "log"
    names = "trace=fsync,fdatasync,rename,renameat,renameat2,unlinkat,unlink,rmdir"
    command = [strace or "strace", "-f", "-y", "-qq", "-o", str(log), "-e", names]
    if strace is None or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no strace, or it may not trace here")
    subprocess.run([*command, sys.executable, "-c", SCRIPT, str(directory)], check=True)
    calls: list[str] = []
    for line in log.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += 0$", line)
        paths = re.findall(r'[<"]([^>"]*)[>"]', call[2]) if call else []
        if call is None or str(directory) not in call[2]:
            continue
        path = Path(paths[-1])
        name = "(temporary)" if re.match(r"\..*\.tmp-", path.name) else path.name
        calls.append(f"{call[1]} {name}")
    return calls


def test_files_manifest_directories_rename_parent_and_only_then_the_old_version_goes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    calls = traced(tmp_path / "run")

    sealed = ["fsync model.bin", "fsync vocab.txt", "fsync manifest.json", "fsync sub", "fsync (temporary)"]
    new = [
        *sealed,
        "rename step_000001",
        "fsync run",
        "fsync (temporary)",
        "renameat2 model.gguf",
        "fsync run",
    ]
    assert calls[: len(new)] == new
    replaced = [*sealed, "renameat2 step_000001", "fsync run"]
    if "renameat2 step_000001" not in calls:
        pytest.skip("renameat2 cannot exchange on this filesystem")
    rest = calls[len(new) :]
    assert rest[: len(replaced)] == replaced
    assert rest[-3:] == ["fsync (temporary)", "rename model.gguf", "fsync run"]
    between = {call.split()[0] for call in rest[len(replaced) : -3]}
    assert between == {"fsync", "unlinkat", "rmdir"}  # the old version, under the temporary's name


@pytest.mark.slow
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "renameat2", "mkdir", "unlinkat", "rmdir"])
def test_killed_by_the_kernel_at_any_system_call_the_names_hold_whole_versions(
    call: str, tmp_path: Path
) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace")
    for number in range(1, 100):
        run = tmp_path / str(number)
        inject = f"inject={call}:signal=KILL:when={number}"
        command = [
            strace,
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            inject,
            sys.executable,
            "-c",
            SCRIPT,
            str(run),
        ]
        status = subprocess.run(command, capture_output=True, check=False).returncode
        if status not in (0, -9, 137):
            pytest.skip("strace may not trace here")

        directory, file = run / "step_000001", run / "model.gguf"
        if directory.exists():
            verify(directory)
            model, vocab = directory / "model.bin", directory / "sub" / "vocab.txt"
            assert model.read_bytes() == vocab.read_bytes()
        if file.exists():
            assert file.read_bytes() in (b"first", b"second")
        subprocess.run([sys.executable, "-c", SCRIPT, str(run)], check=True)
        assert sorted(path.name for path in run.iterdir()) == ["model.gguf", "step_000001"]
        if status == 0:
            return
    pytest.fail("never came through")
