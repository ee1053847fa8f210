"""The logits that QK-clip sees beside a full product, and what clipping leaves of them, quantised or not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitnet_arch import convert_to_bitnet, set_quant_amount
from bitnet_arch.testing import tiny_bitnet, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3
from bitnet_arch.walk import linear_at
from data_handler.masks import attention_mask
from durable import UserError
from wrinklefree.optimizers import qk_clip
from wrinklefree.optimizers.qk_clip import QKClip

THRESHOLD = 3.0
BUILDERS = [tiny_llama, tiny_mistral, tiny_qwen2, tiny_bitnet]
TOKENS = torch.randint(0, 512, (3, 23), generator=torch.Generator().manual_seed(0))
DOCUMENTS = (torch.arange(23) // 9).expand(3, 23)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("max_elements", [2**20, 600])
@pytest.mark.parametrize("packed", [False, True])
def test_the_largest_logits_are_those_of_the_full_product(
    build: Callable[[], PreTrainedModel], max_elements: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qk_clip, "MAX_ELEMENTS", max_elements)
    model = build()
    inputs = {"attention_mask": attention_mask(model.config, DOCUMENTS)} if packed else {}
    clip = QKClip(model, threshold=THRESHOLD)

    with clip.recording():
        model(TOKENS, **inputs)

    assert clip.max_logits_LH is not None
    torch.testing.assert_close(clip.max_logits_LH, _full_logits(model, **inputs))


def test_recording_changes_no_bit_of_the_output_and_ends_with_the_block() -> None:
    model = tiny_llama()
    clip = QKClip(model, threshold=THRESHOLD)
    usual = model(TOKENS).logits
    keys = model.state_dict().keys()

    with clip.recording():
        recorded = model(TOKENS).logits
        assert model.state_dict().keys() == keys
    with pytest.raises(RuntimeError, match="stop"), clip.recording():
        raise RuntimeError("stop")

    assert torch.equal(recorded, usual)
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "attention_observers") for module in model.modules())


def test_several_passes_are_recorded_together_and_other_models_are_not() -> None:
    model, teacher = tiny_llama(), tiny_llama(seed=1)
    teacher.config = model.config
    clip = QKClip(model, threshold=THRESHOLD)

    with clip.recording():
        model(TOKENS[:1])
        model(TOKENS[1:])
        teacher(TOKENS * 0)

    assert clip.max_logits_LH is not None
    torch.testing.assert_close(clip.max_logits_LH, _full_logits(model))


def test_recording_works_in_training_under_autocast_and_gradients_stay() -> None:
    first, second = tiny_llama(), tiny_llama()
    clip = QKClip(second, threshold=THRESHOLD)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        first(TOKENS, labels=TOKENS).loss.backward()
        with clip.recording():
            second(TOKENS, labels=TOKENS).loss.backward()

    for (name, mine), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad), name
    assert clip.max_logits_LH is not None
    assert clip.max_logits_LH.dtype == torch.float32
    # q and k come in bf16: 8 bits each.
    torch.testing.assert_close(clip.max_logits_LH, _full_logits(first), rtol=0.03, atol=0.02)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("quant_amount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_clipping_brings_logits_to_the_threshold_through_the_quantiser(
    build: Callable[[], PreTrainedModel], quant_amount: float, alpha: float
) -> None:
    model = build()
    convert_to_bitnet(model)
    set_quant_amount(model, quant_amount)
    _plant(model, layer=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    clip = QKClip(model, threshold=THRESHOLD, alpha=alpha)
    planted = _full_logits(model)[1].max().item()
    assert planted > 10 * THRESHOLD
    with clip.recording():
        model(TOKENS)

    stats = clip.clip()

    assert stats is not None
    assert stats.max_logit == pytest.approx(planted, rel=1e-5)
    assert stats.num_clipped == 1
    # Scaled weights round to other fp32 numbers, so a code at a tie may flip.
    assert _full_logits(model)[1].max().item() == pytest.approx(THRESHOLD, rel=1e-3)
    factor = THRESHOLD / planted
    for name, parameter in model.named_parameters():
        if "layers.1" in name and "q_proj" in name:
            torch.testing.assert_close(parameter, before[name] * factor**alpha)
        elif "layers.1" in name and "k_proj" in name:
            torch.testing.assert_close(parameter, before[name] * factor ** (1 - alpha))
        else:
            assert torch.equal(parameter, before[name]), name


def test_heads_of_a_layer_shrink_together() -> None:
    model = tiny_llama()
    convert_to_bitnet(model)
    _plant(model, layer=0)
    clip = QKClip(model, threshold=THRESHOLD)
    before = _full_logits(model)[0]
    with clip.recording():
        model(TOKENS)

    clip.clip()

    torch.testing.assert_close(_full_logits(model)[0], before * (THRESHOLD / before.max()), rtol=1e-3, atol=0)


def test_logits_below_the_threshold_leave_every_bit_alone() -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clip = QKClip(model, threshold=1e3)
    with clip.recording():
        model(TOKENS)

    stats = clip.clip()

    assert stats is not None
    assert stats.num_clipped == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_never_reach_weights(value: float) -> None:
    model = tiny_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    clip = QKClip(model, threshold=THRESHOLD)
    clip.max_logits_LH = torch.full((2, 4), value)

    clip.clip()

    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_recording_is_used_once() -> None:
    model = tiny_llama()
    _plant(model, layer=0)
    clip = QKClip(model, threshold=THRESHOLD)

    before = clip.clip()
    with clip.recording():
        model(TOKENS)
    first, second = clip.clip(), clip.clip()

    assert before is None
    assert first is not None
    assert second is None


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_gemma3])
def test_norms_on_queries_and_keys_make_it_a_no_op_that_says_so(
    build: Callable[[], PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    _plant(model, layer=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    with caplog.at_level(logging.INFO, logger="wrinklefree"):
        clip = QKClip(model, threshold=1e-3)
    with clip.recording():
        assert model.config._attn_implementation == "sdpa"
        model(TOKENS)

    assert clip.clip() is None
    assert "queries and keys have norms of their own" in caplog.text
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_frozen_queries_and_keys_stay_as_they_are() -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    clip = QKClip(model, threshold=1e-3)

    with clip.recording():
        model(TOKENS)

    assert clip.why_inactive == "W_q and W_k are frozen"
    assert clip.clip() is None


def test_attention_that_cannot_be_watched_is_refused() -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")

    with pytest.raises(UserError, match=r"enable_clipping: QK-clip reads logits beside SDPA.*'eager'"):
        QKClip(model, threshold=THRESHOLD)


def _plant(model: nn.Module, *, layer: int) -> None:
    """Make the queries of a layer large enough to be clipped."""
    with torch.no_grad():
        linear_at(model, f"model.layers.{layer}.self_attn.q_proj").weight.mul_(2000)


def _full_logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """[L, H]: largest logit of every head, by the whole product with repeated keys and the mask added."""
    found: list[Tensor] = []
    with _attention_replaced_by(model, found), torch.no_grad():
        model(TOKENS, **inputs)
    return torch.stack(found)


@contextmanager
def _attention_replaced_by(model: PreTrainedModel, found: list[Tensor]) -> Iterator[None]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        length = query.shape[2]
        repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = torch.einsum("bhtd,bhsd->bhts", query.double(), repeated.double()) * options["scaling"]
        seen = torch.ones(length, length).tril().bool() if mask is None else mask
        found.append(logits.where(seen, -torch.inf).amax(dim=(0, 2, 3)).float())
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("spy", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("spy", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "spy"
    yield
    model.config._attn_implementation = "sdpa"
