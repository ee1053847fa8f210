"""MuonClip's steps beside torch's own Muon and AdamW, and Newton-Schulz beside its polynomial in float64."""

import pytest
import torch
from torch import Tensor, nn

from wrinklefree.optimizers.muonclip import MuonClip
from wrinklefree.optimizers.newton_schulz import best_dtype, orthogonalized

MATRICES = [(24, 40), (40, 24), (32, 32), (8, 56)]
OTHERS = [(30, 16), (24,), (7,)]


def test_steps_equal_torch_muon_and_fused_adamw_to_the_bit() -> None:
    ours, theirs = _parameters(), _parameters()
    optimizer = _muonclip(ours, newton_schulz_dtype=torch.bfloat16)
    muon = torch.optim.Muon(
        theirs[: len(MATRICES)], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        theirs[len(MATRICES) :], lr=3e-3, weight_decay=0.05, betas=(0.8, 0.95), eps=1e-7, fused=True
    )

    for step in range(6):
        factor = 1 - 0.1 * step
        for group, peak in zip([*optimizer.param_groups], [0.02, 3e-3], strict=True):
            group["lr"] = peak * factor
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 0.02 * factor, 3e-3 * factor
        _set_gradients(ours, seed=step)
        _set_gradients(theirs, seed=step)
        optimizer.step()
        muon.step()
        adamw.step()

        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), (step, mine.shape)


def test_in_fp32_a_step_is_as_near_to_the_exact_one_as_fp32_is() -> None:
    parameters = _parameters()
    before = [parameter.detach().double() for parameter in parameters]
    optimizer = _muonclip(parameters, newton_schulz_dtype=torch.float32)
    _set_gradients(parameters, seed=0)

    optimizer.step()

    for was, now in zip(before[: len(MATRICES)], parameters, strict=False):
        assert now.grad is not None
        # The first momentum is 0.1 G and Nesterov mixes 0.1 G + 0.9 · 0.1 G: a multiple of G.
        exact = was * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(was.shape) ** 0.5 * _polynomial(now.grad.double())
        assert _relative(now.detach().double() - was, exact - was) < 1e-4


@pytest.mark.parametrize("shape", [(24, 24), (24, 30), (24, 96), (96, 24), (3, 200)])
@pytest.mark.parametrize("smallest", [1.0, 1e-4, 1e-8, 0.0])
def test_newton_schulz_in_fp32_is_its_polynomial(shape: tuple[int, int], smallest: float) -> None:
    matrix = _with_singular_values(shape, smallest)

    computed = orthogonalized(matrix, torch.float32)

    # The way through G sees a singular value squared, so the small ones lose half their digits; in bf16 the
    # same matrices are off by 10 to 100 per cent.
    assert _relative(computed.double(), _polynomial(matrix.double())) < 2e-3


def test_singular_values_end_near_one_and_directions_stay() -> None:
    matrix = _with_singular_values((24, 96), 0.05)
    left, _, right = _svd(matrix.double())

    in_their_basis = left.T @ orthogonalized(matrix, torch.float32).double() @ right.T

    values = in_their_basis.diagonal()
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (in_their_basis - values.diag()).abs().max() < 1e-3


def test_newton_schulz_leaves_its_input_alone_and_maps_zero_to_zero() -> None:
    matrix, zeros = torch.randn(5, 9), torch.zeros(5, 9)
    before = matrix.clone()

    orthogonalized(matrix, torch.float32)

    assert torch.equal(matrix, before)
    assert torch.equal(orthogonalized(zeros, torch.float32), zeros)


def test_newton_schulz_runs_in_bf16_only_where_the_machine_multiplies_it() -> None:
    names = ("avx512_bf16", "amx_bf16", "bf16")
    has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in names)

    assert best_dtype("cpu") == (torch.bfloat16 if has_bf16 else torch.float32)
    assert best_dtype("cuda") == torch.bfloat16


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    parameters = _parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = _muonclip(parameters)
    parameters[1].grad = torch.randn(MATRICES[1])

    optimizer.step()

    moved = [not torch.equal(was, now) for was, now in zip(before, parameters, strict=True)]
    assert moved == [False, True, False, False, False, False, False]
    assert list(optimizer.state) == [parameters[1]]


def test_a_closure_is_run_with_gradients_and_its_loss_returned() -> None:
    parameters = _parameters()
    optimizer = _muonclip(parameters)

    def closure() -> float:
        loss = sum((parameter.square().sum() for parameter in parameters), torch.zeros(()))
        loss.backward()
        return loss.item()

    expected = sum(parameter.detach().square().sum().item() for parameter in parameters)

    assert optimizer.step(closure) == pytest.approx(expected, rel=1e-5)


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in (*MATRICES, *OTHERS)]


def _set_gradients(parameters: list[nn.Parameter], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _muonclip(parameters: list[nn.Parameter], *, newton_schulz_dtype: torch.dtype | None = None) -> MuonClip:
    muon, adam = parameters[: len(MATRICES)], parameters[len(MATRICES) :]
    return MuonClip(
        [
            {"params": muon, "use_muon": True, "lr": 0.02, "weight_decay": 0.1, "momentum": 0.9},
            {"params": adam, "lr": 3e-3, "weight_decay": 0.05, "betas": [0.8, 0.95], "eps": 1e-7},
        ],
        newton_schulz_dtype=newton_schulz_dtype,
    )


def _polynomial(matrix: Tensor) -> Tensor:
    """Five times X ← aX + b(XXᵀ)X + c(XXᵀ)²X, by the singular values alone."""
    left, values, right = _svd(matrix / matrix.norm())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def _with_singular_values(shape: tuple[int, int], smallest: float) -> Tensor:
    """From 1 down to `smallest`, evenly in the exponent; 0 stands for a matrix of rank 3."""
    torch.manual_seed(1)
    left, values, right = _svd(torch.randn(shape))
    if smallest == 0:
        values = (torch.arange(len(values)) < 3).float()
    else:
        values = smallest ** torch.linspace(0, 1, len(values))
    return left @ values.diag() @ right


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
