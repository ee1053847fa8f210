"""When weights move, what a resumed run remembers, and what happens when scoring fails."""

import copy
import json
import socket
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from data_handler.influence.config import InfluenceConfig, SelfBoostingConfig, TrackerConfig
from data_handler.influence.datainf import create_influence_calculator
from data_handler.influence.optimizer import InfluenceAwareOptimizer
from data_handler.influence.self_boosting import SelfBoostingFilter
from data_handler.influence.tracker import InfluenceTracker
from data_handler.influence.truth import TinyDecoder, draw, join, markov_chain, next_token_loss
from data_handler.mixture import MixtureSchedule
from durable import UserError

BASE = {"web": 0.5, "code": 0.3, "math": 0.2}


class Scores:
    """Scores that a generator makes, so a repeated or forgotten call shows."""

    def __init__(self, skip: int = 0) -> None:
        self.num_calls = 0
        self._generator = torch.Generator().manual_seed(5)
        for _ in range(skip):
            self()
        self.num_calls = 0

    def __call__(self) -> Mapping[str, Tensor]:
        self.num_calls += 1
        return {name: torch.randn(30, generator=self._generator) + place for place, name in enumerate(BASE)}


class Schedule:
    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def reweight(self, n: int, weights: dict[str, float]) -> None:
        self.calls.append((n, weights))


def config(*, enabled: bool = True) -> TrackerConfig:
    return TrackerConfig(enabled=enabled, warmup_steps=4, update_interval=3, learning_rate=0.4)


def test_weights_move_after_warmup_at_every_interval_and_once_per_step() -> None:
    scores, schedule = Scores(), Schedule()
    tracker = InfluenceTracker(config(), BASE, scores, schedule)

    for step in range(1, 13):
        for _micro_batch in range(4):
            tracker.on_step_end(step, 8 * step)

    assert [entry["step"] for entry in tracker.get_weight_history()] == [6, 9, 12]
    assert scores.num_calls == 3
    assert [n for n, _ in schedule.calls] == [48, 72, 96]
    assert schedule.calls[-1][1] == tracker.weights != BASE


def test_a_resumed_run_goes_on_exactly_as_the_uninterrupted_one() -> None:
    whole = InfluenceTracker(config(), BASE, Scores())
    for step in range(1, 21):
        whole.on_step_end(step, 8 * step)
    first = InfluenceTracker(config(), BASE, Scores())
    for step in range(1, 11):
        first.on_step_end(step, 8 * step)

    second = InfluenceTracker(config(), BASE, Scores(skip=2))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(10, 21):  # step 10 again, as after a kill
        second.on_step_end(step, 8 * step)

    assert second.state_dict() == whole.state_dict()


def test_disabled_it_never_asks() -> None:
    scores = Scores()
    tracker = InfluenceTracker(config(enabled=False), BASE, scores)

    assert all(tracker.on_step_end(step, step) is None for step in range(1, 30))

    assert scores.num_calls == 0
    assert tracker.weights == BASE
    assert tracker.get_weight_history() == []


def test_a_failed_scoring_keeps_the_weights_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Mapping[str, Tensor]:
        raise OSError("shard gone")

    schedule = Schedule()
    tracker = InfluenceTracker(config(), BASE, failing, schedule)

    update = tracker.on_step_end(6, 48)

    assert update is not None
    assert update.weights == BASE
    assert "scoring failed with OSError: shard gone" in caplog.text
    assert tracker.get_weight_history()[0]["kept_because"] == update.kept_because
    assert schedule.calls == []


def test_weights_that_the_mixture_refuses_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing:
        def reweight(self, n: int, weights: dict[str, float]) -> None:
            raise UserError("data.weights: below one sample in a window")

    tracker = InfluenceTracker(config(), BASE, Scores(), Refusing())

    tracker.on_step_end(6, 48)

    assert "the mixture refuses" in caplog.text
    assert tracker.weights == BASE


def test_new_weights_reach_the_mixture_at_its_next_window() -> None:
    schedule = MixtureSchedule(BASE, seed=0, window_samples=32)
    tracker = InfluenceTracker(config(), BASE, Scores(), schedule)

    tracker.on_step_end(6, 48)

    assert schedule.weights(63) == pytest.approx(BASE)
    assert schedule.weights(64) == pytest.approx(tracker.weights)
    assert tracker.weights != BASE


def test_state_of_another_mixture_is_refused() -> None:
    state = InfluenceTracker(config(), {"web": 1.0, "music": 1.0}, Scores()).state_dict()

    with pytest.raises(ValueError, match="music"):
        InfluenceTracker(config(), BASE, Scores()).load_state_dict(state)


RANK = """
import json, sys, torch, torch.distributed
from data_handler.influence.config import TrackerConfig
from data_handler.influence.tracker import InfluenceTracker

rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

def score():
    if rank == 1:
        raise MemoryError("only here")
    return {"web": torch.randn(30), "code": torch.randn(30) + 3, "math": torch.randn(30) - 3}

tracker = InfluenceTracker(
    TrackerConfig(enabled=True, warmup_steps=1, update_interval=1),
    {"web": 0.5, "code": 0.3, "math": 0.2},
    score,
)
tracker.on_step_end(1, 8)
print(json.dumps(tracker.weights))
"""


@pytest.mark.slow
def test_all_ranks_hold_the_same_weights_even_when_one_cannot_score() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    one, other = (json.loads(rank.communicate(timeout=300)[0]) for rank in ranks)

    assert one == other != BASE


def wrapped(scores: Scores | None = None) -> tuple[nn.Linear, InfluenceAwareOptimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.5}]
    inner = torch.optim.AdamW(groups, lr=0.1)  # type: ignore[arg-type]
    tracker = InfluenceTracker(config(), BASE, scores or Scores())
    return layer, InfluenceAwareOptimizer(inner, tracker, samples_per_step=8)


def one_step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(torch.ones(4, 3)).pow(2).sum().backward()
    optimizer.step()


def test_the_wrapped_optimizer_trains_as_the_plain_one_and_moves_the_mixture() -> None:
    layer, optimizer = wrapped()
    torch.manual_seed(0)
    plain_layer = nn.Linear(3, 2)
    groups = [{"params": [plain_layer.weight]}, {"params": [plain_layer.bias], "lr": 0.5}]
    plain = torch.optim.AdamW(groups, lr=0.1)  # type: ignore[arg-type]
    schedules = [torch.optim.lr_scheduler.StepLR(each, step_size=2, gamma=0.5) for each in (optimizer, plain)]

    for _ in range(7):
        one_step(layer, optimizer)
        one_step(plain_layer, plain)
        for schedule in schedules:
            schedule.step()

    assert torch.equal(layer.weight, plain_layer.weight)
    assert torch.equal(layer.bias, plain_layer.bias)
    assert [(e["step"], e["sample"]) for e in optimizer.tracker.get_weight_history()] == [(6, 48)]


def test_optimizer_state_is_exact_and_a_plain_optimizer_reads_it() -> None:
    layer, optimizer = wrapped()
    for _ in range(7):
        one_step(layer, optimizer)
    state = copy.deepcopy(optimizer.state_dict())  # as a file would hold it
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(4):
        one_step(layer, optimizer)

    resumed_layer, resumed = wrapped(Scores(skip=1))
    resumed_layer.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(4):
        one_step(resumed_layer, resumed)
    torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}]).load_state_dict(state)  # type: ignore[arg-type]

    assert torch.equal(resumed_layer.weight, layer.weight)
    assert resumed.tracker.state_dict() == optimizer.tracker.state_dict()
    assert resumed.num_steps == 11


def test_a_group_added_later_is_trained() -> None:
    _, optimizer = wrapped()
    extra = nn.Parameter(torch.ones(2))

    optimizer.add_param_group({"params": [extra]})
    extra.sum().backward()
    optimizer.step()

    assert optimizer.param_groups is optimizer.inner.param_groups
    assert (extra < 1).all()


def test_the_filter_keeps_what_helps_in_order_and_counts() -> None:
    torch.manual_seed(0)
    calculator = create_influence_calculator(TinyDecoder(), next_token_loss, InfluenceConfig(batch_size=32))
    generator = torch.Generator().manual_seed(1)
    chain = markov_chain(1)
    calculator.cache_probe_gradients({"probe": [draw(chain, 64, generator)]})
    batch = join([draw(chain, 20, generator), draw(markov_chain(2), 20, generator)])
    boosting = SelfBoostingFilter(calculator)

    kept = boosting.filter(batch)

    expected = batch.input_ids[calculator.compute_influence(batch) > 0]
    assert torch.equal(kept.input_ids, expected)
    assert 0 < boosting.num_kept == len(expected) < boosting.num_seen == 40


def test_the_filter_keeps_the_best_when_nothing_helps_and_everything_when_it_cannot_tell() -> None:
    calculator = create_influence_calculator(TinyDecoder(), next_token_loss)
    boosting = SelfBoostingFilter(calculator, SelfBoostingConfig(min_batch_size=2))

    assert boosting.keep(torch.tensor([-3.0, -1.0, -2.0])).tolist() == [False, True, True]
    assert boosting.keep(torch.tensor([1.0, float("nan")])).all()


def test_settings_out_of_range_are_one_line_that_names_the_key() -> None:
    with pytest.raises(UserError, match=r"influence\.update_interval: must be 1 or more \(found 0\)"):
        TrackerConfig(update_interval=0)
    with pytest.raises(UserError, match=r"influence\.damping"):
        InfluenceConfig(damping=float("nan"))
    with pytest.raises(UserError, match="did you mean 'datainf'"):
        InfluenceConfig(method="datainv")  # type: ignore[arg-type]


def test_names_lie_where_the_documents_say() -> None:
    import data_handler
    from data_handler import influence

    for package in (data_handler, influence):
        assert all(getattr(package, name).__name__ == name for name in package.__all__ if name != "Batch")
