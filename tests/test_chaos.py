"""After any kill, a run goes on with the numbers of the run that nobody killed, to the bit."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from chaos import Training, torment

from wrinklefree.runs import read_metrics

MAX_STEPS = 40
KILLS = {"muon": 12, "adamw": 12, "workers": 6}
"""Starting data workers takes longer than anything else in a short life."""
VARIANTS = {
    "muon": ["experiment=chaos"],
    "adamw": ["experiment=quick", "training.optimizer.type=adamw", "training.optimizer.lr=1e-3"],
    "workers": ["experiment=quick", "data.num_workers=2"],
}


@pytest.fixture(scope="session")
def _shared_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All runs read one preparation of the demo data."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WRINKLEFREE_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.mark.slow
@pytest.mark.usefixtures("_shared_data")
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_runs_give_the_same_bits(variant: str, tmp_path: Path, request: Any) -> None:
    num_kills = int(request.config.getoption("--kills") or KILLS[variant])
    whole = Training(tmp_path / "whole", VARIANTS[variant])
    assert whole.finish() == 0, whole.last_words()
    killed = Training(tmp_path / "killed", VARIANTS[variant])

    kills = torment(killed, random.Random(variant), num_kills=num_kills, max_steps=MAX_STEPS)

    assert whole.steps_logged() == MAX_STEPS
    assert killed.trace() == whole.trace()
    assert killed.final_digest() == whole.final_digest()
    assert len(kills.signals) >= num_kills
    # A kill costs an interval at most, a signal that can be answered nothing.
    assert max(lost for _, lost in kills.steps_lost) <= 5
    assert [lost for name, lost in kills.steps_lost if name in ("TERM", "INT")] == [0] * sum(
        name in ("TERM", "INT") for name in kills.signals
    )
    weights = [row["weights"] for row in read_metrics(whole.run_dir / "metrics.jsonl")]
    changes = sum(before != after for before, after in itertools.pairwise(weights))
    assert changes >= 5, "the mixture should have moved while it was killed"
    print(f"{variant}: {len(kills.signals)} kills in {killed.lives} lives, {changes} weight changes")
