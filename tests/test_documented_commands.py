"""What README and docs show is run: bash and Python blocks as they stand, in an empty directory, offline.

`uv run` and `pip install` stand for the environment that these tests run in, and the one model name for a
tiny model on this disk. What a laptop cannot run has a comment in front: `<!-- not run here: why -->`.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "configs/*.md", "extern/*.md", "packages/*/README.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(
    r"(?:<!-- not run here: (?P<why>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
LANGUAGES = {"bash", "python", "text", "json", "yaml"}
HUB_NAME = "HuggingFaceTB/SmolLM2-135M"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
UV = '#!/bin/sh\n[ "$1" = run ] || exit 9\nshift\nexec "$@"\n'


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    number: int
    language: str
    text: str
    why_not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"


BLOCKS = [
    Block(page, number, match["language"], match["text"], match["why"])
    for page in PAGES
    for number, match in enumerate(FENCE.finditer(page.read_text()), start=1)
]


def runnable(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.why_not_run is None]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bitnet_arch.testing import tiny_llama

    directory = tmp_path_factory.mktemp("hub") / "model"
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first command that needs the demo data puts it, and the others find it."""
    return tmp_path_factory.mktemp("prepared")


def run(command: list[str], directory: Path, prepared: Path) -> str:
    """What it printed."""
    tools = directory / "tools"
    tools.mkdir()
    for name, script in (("uv", UV), ("pip", "#!/bin/sh\n")):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    (directory / "empty").mkdir()
    ended = subprocess.run(
        command,
        cwd=directory / "empty",
        env=os.environ | OFFLINE | {"PATH": path, "WRINKLEFREE_DATA": str(prepared)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_every_block_is_run_or_says_why_not() -> None:
    assert {str(block) for block in BLOCKS if block.language not in LANGUAGES} == set()
    assert {
        str(block) for block in BLOCKS if block.why_not_run is not None and len(block.why_not_run) < 20
    } == set()
    assert sum(page.read_text().count("\n```") for page in PAGES) == 2 * len(BLOCKS)
    assert len(runnable("bash")) >= 2


def test_ci_runs_the_second_line_of_the_readme_as_it_is_written() -> None:
    lines = [
        block.text.strip()
        for block in BLOCKS
        if block.page == ROOT / "README.md" and block.language == "bash"
    ]

    assert lines[:2] == ["pip install uv && uv run wrinklefree demo", "pip install uv && uv run pytest"]
    assert re.search(rf"(^|\) ){re.escape(lines[1])}($| ;;)", (ROOT / ".ci/run").read_text(), re.MULTILINE)


DEMO, *OTHERS = sorted(runnable("bash"), key=lambda block: "wrinklefree demo" not in block.text)


@pytest.mark.slow
def test_the_demo_learns_saves_reloads_and_says_what_it_took(tmp_path: Path, prepared: Path) -> None:
    printed = run(["bash", "-euo", "pipefail", "-c", DEMO.text], tmp_path, prepared)

    exact = re.search(r"(\d+) of 100 sorted exactly", printed)
    assert exact is not None
    assert int(exact[1]) >= 90
    assert printed.count("of AutoBitLinear") == 2
    assert re.search(r"\d+ CPU-seconds", printed)
    packed = re.search(r"two bits \(to run\) .* (\d+)% of dense", printed)
    assert packed is not None
    assert int(packed[1]) < 20


@pytest.mark.slow
@pytest.mark.parametrize("block", OTHERS, ids=str)
def test_commands_run(block: Block, tmp_path: Path, prepared: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path, prepared)


@pytest.mark.slow
@pytest.mark.parametrize("block", runnable("python"), ids=str)
def test_python_runs(block: Block, tmp_path: Path, prepared: Path, tiny_model: Path) -> None:
    run([sys.executable, "-c", block.text.replace(HUB_NAME, str(tiny_model))], tmp_path, prepared)
