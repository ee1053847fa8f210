"""What keeps the house in order: nothing that ties the project to a machine, an index or an unsafe format."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
TEXT_SUFFIXES = {"", ".cfg", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
# Written in two halves, so that this file does not name them itself.
INDEX_HOSTS = (
    "pypi" + ".org",
    "python" + "hosted.org",
    "download.pytorch" + ".org",
    "registry.npmjs" + ".org",
)
MACHINE_PATHS = ("/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/", "/opt/" + "pypi")


def committed_files() -> list[Path]:
    """What git tracks; outside a checkout, everything that is not built."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        names = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        names = [path for path in ROOT.rglob("*") if not {".venv", ".git"} & set(path.parts)]
    return [path for path in names if path.is_file()]


FILES = committed_files()
TEXTS = [path for path in FILES if path.suffix in TEXT_SUFFIXES]
PYTHON = [path for path in FILES if path.suffix == ".py"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("needle", [*INDEX_HOSTS, *MACHINE_PATHS])
def test_no_committed_file_names_an_index_or_a_machine(needle: str) -> None:
    assert [relative(path) for path in TEXTS if needle in path.read_text(errors="replace")] == []


def unsafe_loads(source: str) -> list[str]:
    """Calls and imports that can run what a file contains."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
            found += sorted(
                modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
            )
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in {
            "pickle",
            "dill",
            "joblib",
        }:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in {"torch.load", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"}:
                found.append(name)
            if keywords.get("allow_pickle") == "True" or keywords.get("weights_only") == "False":
                found.append(name)
            if keywords.get("trust_remote_code") == "True":
                found.append(name)
    return found


def test_the_search_for_unsafe_loads_finds_them() -> None:
    source = "import pickle\ntorch.load(f)\nnp.load(f, allow_pickle=True)\nyaml.safe_load(f)\nnp.load(f)"

    assert unsafe_loads(source) == ["pickle", "torch.load", "np.load"]


def test_nothing_unpickles() -> None:
    assert {relative(path): found for path in PYTHON if (found := unsafe_loads(path.read_text()))} == {}


def test_every_file_is_named_after_its_subject() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}

    assert [relative(path) for path in PYTHON if path.name in vague] == []


def test_every_shipped_yaml_parses() -> None:
    for path in FILES:
        if path.suffix in {".yaml", ".yml"}:
            assert yaml.safe_load(path.read_text()) is not None, relative(path)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_member_is_complete(member: Path) -> None:
    pyproject = tomllib.loads((member / "pyproject.toml").read_text())
    packages = [path for path in (member / "src").iterdir() if path.is_dir()]

    assert (member / "README.md").read_text().strip()
    assert pyproject["project"]["version"] in (member / "CHANGELOG.md").read_text()
    assert packages
    assert all((package / "py.typed").exists() for package in packages)
    assert any(requirement.startswith("pytest") for requirement in pyproject["dependency-groups"]["dev"])
    assert list((member / "tests").glob("test_*.py"))


@pytest.mark.parametrize("pyproject", [ROOT, *MEMBERS], ids=lambda folder: folder.name)
def test_every_requirement_has_a_lower_bound(pyproject: Path) -> None:
    data = tomllib.loads((pyproject / "pyproject.toml").read_text())
    project = data["project"]
    groups = [*project.get("optional-dependencies", {}).values(), *data.get("dependency-groups", {}).values()]
    requirements = project["dependencies"] + [
        item for group in groups for item in group if isinstance(item, str)
    ]
    ours = {"wrinklefree-durable", "bitnet-arch", "data-handler", "bitnet-serving", "wrinklefree"}

    unbounded = [item for item in requirements if not re.search(r">=|==", item) and item not in ours]

    assert unbounded == []


def test_the_public_names_of_every_package_exist() -> None:
    for package in ("durable", "bitnet_arch", "data_handler", "bitnet_serving", "wrinklefree"):
        module = __import__(package)
        missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
        assert missing == [], package


def test_every_make_target_explains_itself() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z-]*):(.*)$", makefile, flags=re.M)

    assert targets
    assert [name for name, rest in targets if "## " not in rest] == []


def test_the_engine_of_microsoft_is_a_pointer_and_nothing_more() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-s", "extern/BitNet"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a checkout")

    assert listed.stdout.split() == [
        "160000",
        "16da220ae2b510caff437d403288882687f44ae5",
        "0",
        "extern/BitNet",
    ]
    # A clone, and pip from an address of git, fetch all submodules but those.
    assert "update = none" in (ROOT / ".gitmodules").read_text()
