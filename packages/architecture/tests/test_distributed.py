"""Ternary layers on two processes do what one does: DDP and FSDP2 over gloo, on a CPU.

The tests look at numbers that two worker processes left: this very file, run as a script. Each worker trains
its half of every batch, gathers the parameters, and compares with a single process that it plays itself. That
one takes the halves one after the other and adds their gradients in the order in which ranks add them, so
that equal means the same bits: int8 rounding has no patience for a difference of 1e-7.

Muon is torch's own. It orthogonalises in bf16, and the noise of that depends on how a matrix is sharded, for
dense layers as for ours; so there is a case with the same iteration in float64 too.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.quant import quantize_weight
from bitnet_arch.testing import tiny_llama

NUM_RANKS = 2
CASES = [
    f"{wrapper}/{optimizer}/{num_micro}"
    for wrapper in ("ddp", "fsdp2")
    for optimizer, num_micro in (("adamw", 1), ("adamw", 2), ("muon", 1), ("muon-float64", 2))
]
"""How it is distributed, which optimizer, and how many micro-batches a step has."""

Numbers = dict[str, float]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Numbers]:
    """Largest relative difference to a single process, by case and by what was compared."""
    folder = tmp_path_factory.mktemp("ranks")
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    first, second = (json.loads((folder / f"differences-{rank}.json").read_text()) for rank in (0, 1))
    return {
        case: {what: max(first[case][what], second[case][what]) for what in first[case]} for case in CASES
    }


cases = pytest.mark.parametrize("case", CASES)


@cases
def test_loss_and_gradients_equal_those_of_a_single_process(
    differences: dict[str, Numbers], case: str
) -> None:
    assert differences[case]["loss"] <= 1e-6
    assert differences[case]["gradients"] <= 1e-6


@cases
def test_parameters_after_a_step_equal_those_of_a_single_process(
    differences: dict[str, Numbers], case: str
) -> None:
    assert differences[case]["moved"] > 1e-3, "a step that changes nothing proves nothing"
    is_noisy = case.startswith("fsdp2/muon/")
    assert differences[case]["parameters"] <= (0.02 * differences[case]["moved"] if is_noisy else 1e-6)


@cases
@pytest.mark.parametrize("change", ["step", "edit", "load"])
def test_no_weight_is_stale_after_it_changed(differences: dict[str, Numbers], case: str, change: str) -> None:
    assert differences[case][f"codes changed by {change}"] > 0, "or stale codes would go unseen"
    assert differences[case][f"forward after {change}"] <= 1e-6


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting_point, patience = f"file://{folder}/meeting", timedelta(minutes=1)
    dist.init_process_group("gloo", meeting_point, patience, NUM_RANKS, rank)
    found = {}
    for case in CASES:
        wrapper, optimizer, num_micro = case.split("/")
        with orthogonalising_in_float64(optimizer == "muon-float64"):
            found[case] = compare(wrapper, optimizer, int(num_micro), rank)
    (folder / f"differences-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def compare(wrapper: str, optimizer: str, num_micro: int, rank: int) -> Numbers:
    """One step on all ranks against one step here, then changes of the weights by other means."""
    batches = token_batches(num_micro)
    single, several = ternary_llama(), ternary_llama()
    start = gathered(single)
    run: Any = wrap(several, wrapper)

    losses = single_backward(single, batches)
    loss = backward(run, [batch[rank] for batch in batches])
    found = {
        "loss": abs(loss - losses[rank]) / losses[rank],
        "gradients": largest_difference(gathered_grads(several), gathered_grads(single)),
    }
    for model in (single, several):
        for part in optimizers(model, optimizer):
            part.step()
            part.zero_grad()
    found["parameters"] = largest_difference(gathered(several), gathered(single))
    found["moved"] = largest_difference(gathered(several), start)

    changes: dict[str, Callable[[nn.Module], None]] = {"step": lambda _: None, "edit": edit, "load": load}
    before = start
    for name, change in changes.items():
        change(several)
        now = gathered(several)
        found[f"codes changed by {name}"] = float(num_changed_codes(before, now))
        fresh = ternary_llama()
        fresh.load_state_dict(now)
        ids = batches[0][rank]
        with torch.no_grad():
            found[f"forward after {name}"] = relative(run(ids).logits, fresh(ids).logits)
        before = now
    return found


@contextmanager
def orthogonalising_in_float64(wanted: bool) -> Iterator[None]:
    """torch's Newton-Schulz iteration, in a precision in which sharding leaves no trace."""

    def newton_schulz(grad: Tensor, factors: Sequence[float], num_steps: int, eps: float) -> Tensor:
        a, b, c = factors
        x: Tensor = grad.double() / grad.double().norm().clamp(min=eps)
        for _ in range(num_steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)
        yield


def ternary_llama() -> Any:
    model = tiny_llama()
    convert_to_bitnet(model)
    return model


def token_batches(num_micro: int) -> list[list[Tensor]]:
    """For every micro-batch, the sequences of every rank."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 512, (num_micro, NUM_RANKS, 2, 16), generator=generator)
    return [list(micro_batch) for micro_batch in ids]


def wrap(model: Any, wrapper: str) -> Any:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (NUM_RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def backward(run: Any, micro_batches: list[Tensor]) -> float:
    """Accumulate the gradients of a rank's micro-batches; ranks meet at the last one."""
    total = 0.0
    for index, ids in enumerate(micro_batches):
        with synchronising(run, only_if=index == len(micro_batches) - 1):
            loss = run(ids, labels=ids).loss / len(micro_batches)
            loss.backward()
        total += loss.item()
    return total


@contextmanager
def synchronising(run: Any, *, only_if: bool) -> Iterator[None]:
    if isinstance(run, FSDPModule):
        run.set_requires_gradient_sync(only_if)
        yield
    elif only_if:
        yield
    else:
        with run.no_sync():
            yield


def single_backward(model: Any, batches: list[list[Tensor]]) -> list[float]:
    """The same in one process: the gradients of every rank's share, and their mean."""
    losses, shares = [], []
    for rank in range(NUM_RANKS):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = model(batch[rank], labels=batch[rank]).loss / len(batches)
            loss.backward()
            total += loss.item()
        losses.append(total)
        shares.append([parameter.grad.clone() for parameter in model.parameters()])
    for parameter, *grads in zip(model.parameters(), *shares, strict=True):
        parameter.grad = sum(grads) / NUM_RANKS
    return losses


def optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the projections and AdamW for the rest."""
    projections = [m.weight for m in model.modules() if isinstance(m, BitLinear)]
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=1e-2)]
    rest = [p for p in model.parameters() if not any(p is weight for weight in projections)]
    return [torch.optim.Muon(projections, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


@torch.no_grad()
def edit(model: nn.Module) -> None:
    """Write into the parameters, or into this rank's part of them, where they lie."""
    for layer in model.modules():
        if isinstance(layer, BitLinear):
            layer.weight.mul_(-1).add_(0.01)


def load(model: nn.Module) -> None:
    """Another model's weights, by way of a state dict."""
    other = tiny_llama(seed=9).state_dict()
    mine = model.state_dict()
    model.load_state_dict(
        {
            name: distribute_tensor(value, mine[name].device_mesh, mine[name].placements)
            if isinstance(mine[name], DTensor)
            else value
            for name, value in other.items()
        }
    )


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(value).clone() for name, value in model.state_dict().items()}


def gathered_grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def largest_difference(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert values.keys() == expected.keys()
    return max(relative(values[name], expected[name]) for name in expected)


def num_changed_codes(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    names = [name for name in before if "proj" in name]
    return sum(
        int((quantize_weight(before[name]).codes != quantize_weight(after[name]).codes).sum())
        for name in names
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
