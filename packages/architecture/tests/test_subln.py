"""SubLN against its formula and against transformers' norm."""

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bitnet_arch.subln import RMSNorm, SubLN, blend


def test_a_vector_worked_out_by_hand() -> None:
    norm = SubLN(2, eps=0.0)

    # rms = sqrt((9 + 16) / 2) = 3.5355
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([0.8485281, 1.1313708]))


def test_half_precision_does_not_overflow() -> None:
    norm = RMSNorm(4, elementwise_affine=False)

    y = norm(torch.full((2, 4), 300.0, dtype=torch.float16))  # 300² is beyond fp16

    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones(2, 4, dtype=torch.float16))


def test_it_agrees_with_transformers_norm() -> None:
    theirs = LlamaRMSNorm(24, eps=1e-5)
    ours = RMSNorm(24, eps=1e-5)
    gain = torch.randn(24, generator=torch.Generator().manual_seed(0))
    theirs.weight.data.copy_(gain)
    assert ours.weight is not None
    ours.weight.data.copy_(gain)
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_without_affine_there_is_no_parameter() -> None:
    assert not list(RMSNorm(8, elementwise_affine=False).parameters())


def test_the_gain_gets_a_gradient() -> None:
    norm = SubLN(6)

    norm(torch.randn(3, 6)).sum().backward()

    assert norm.weight is not None
    assert norm.weight.grad is not None


def test_a_blend_is_exact_at_both_ends() -> None:
    x, target = torch.randn(50), torch.randn(50)

    assert torch.equal(blend(x, target, 0.0), x)
    assert torch.equal(blend(x, target, 1.0), target)
    torch.testing.assert_close(blend(x, target, 0.25), x + 0.25 * (target - x))
