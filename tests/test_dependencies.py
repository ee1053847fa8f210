"""The arrows between packages run downwards only, and every arrow is declared."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARROWS = {
    "durable": set[str](),
    "bitnet_arch": {"durable"},
    "data_handler": {"durable"},
    "bitnet_serving": {"bitnet_arch", "durable"},
    "wrinklefree": {"bitnet_arch", "bitnet_serving", "data_handler", "durable"},
}
DISTRIBUTIONS = {
    "durable": "wrinklefree-durable",
    "bitnet_arch": "bitnet-arch",
    "data_handler": "data-handler",
    "bitnet_serving": "bitnet-serving",
    "wrinklefree": "wrinklefree",
    "hydra": "hydra-core",
    "yaml": "pyyaml",
    "google": "protobuf",
}
FOLDERS = {
    "durable": "durable",
    "bitnet_arch": "architecture",
    "data_handler": "data_handler",
    "bitnet_serving": "serving",
    "wrinklefree": "training",
}


def imported_packages(folder: Path) -> set[str]:
    """Top-level names that the Python files of a folder import, anywhere in the file."""
    names = set[str]()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_run_downwards(package: str) -> None:
    source = ROOT / "packages" / FOLDERS[package] / "src" / package

    assert imported_packages(source) & ARROWS.keys() - {package} <= ARROWS[package]


@pytest.mark.parametrize("package", ARROWS)
def test_what_a_package_imports_it_declares(package: str) -> None:
    folder = ROOT / "packages" / FOLDERS[package]
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    extras = [item for group in project.get("optional-dependencies", {}).values() for item in group]
    declared = {_name(requirement) for requirement in project["dependencies"] + extras}

    foreign = imported_packages(folder / "src") - set(sys.stdlib_module_names) - {package}

    assert {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in foreign} <= declared


@pytest.mark.parametrize("package", ARROWS)
def test_the_root_installs_what_the_tests_of_a_package_ask_for(package: str) -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    member = tomllib.loads((ROOT / "packages" / FOLDERS[package] / "pyproject.toml").read_text())

    assert set(member["dependency-groups"]["dev"]) <= set(root["dependency-groups"]["dev"])


@pytest.mark.parametrize("package", ARROWS)
def test_tests_of_a_package_need_that_package_only(package: str) -> None:
    tests = ROOT / "packages" / FOLDERS[package] / "tests"

    assert imported_packages(tests) & ARROWS.keys() <= {package} | ARROWS[package]


def _name(requirement: str) -> str:
    for index, character in enumerate(requirement):
        if character in " <>=!~[;":
            return requirement[:index].lower().replace("_", "-")
    return requirement.lower().replace("_", "-")
