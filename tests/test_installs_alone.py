"""`bitnet_arch` needs `durable` and what it declares, and none of the other members.

The wheels are built here and unpacked into an empty environment that sees the third-party packages of this
one, but not its members, which are installed as links.
"""

import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = ("durable", "bitnet_arch", "data_handler", "bitnet_serving", "wrinklefree")


def built_wheel(folder: Path, into: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return max(into.glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)


def empty_environment(directory: Path, wheels: list[Path]) -> Path:
    """A Python that has the wheels and third-party packages."""
    venv.create(directory, with_pip=False)
    packages = next(directory.glob("lib/python*/site-packages"))
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(packages)
    # A path in a .pth file is searched, but .pth files in it, which link the members, are not read.
    (packages / "third_party.pth").write_text(site.getsitepackages()[0])
    return directory / "bin/python"


@pytest.mark.slow
def test_bitnet_arch_imports_without_lightning_and_the_other_members(tmp_path: Path) -> None:
    wheels = [
        built_wheel(ROOT / "packages" / name, tmp_path / "wheels") for name in ("durable", "architecture")
    ]
    python = empty_environment(tmp_path / "venv", wheels)
    program = f"""
import importlib.util, sys
import bitnet_arch, bitnet_arch.testing, durable
assert "site-packages" in bitnet_arch.__file__, bitnet_arch.__file__
print([name for name in {MEMBERS!r} if importlib.util.find_spec(name)])
print([name for name in ("lightning", "pytorch_lightning", "hydra", "wandb") if name in sys.modules])
"""

    ended = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["['durable', 'bitnet_arch']", "[]"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["durable", "architecture", "data_handler", "serving", "training"])
def test_every_wheel_says_what_it_needs_and_carries_its_types(folder: str, tmp_path: Path) -> None:
    wheel = zipfile.ZipFile(built_wheel(ROOT / "packages" / folder, tmp_path))
    names = wheel.namelist()
    metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()

    needs = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist")
    ]

    assert any(name.endswith("/py.typed") for name in names)
    assert all(">=" in need for need in needs)
    # The application trains with Lightning; no package that it stands on may bring it.
    assert folder == "training" or not any("lightning" in need for need in needs)
    assert not any(name.startswith("tests/") for name in names)
