"""A padded model computes what the model did: both are models of transformers, compared by their logits."""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from bitnet_arch import ConversionConfig, convert_to_bitnet, set_quant_amount, walk
from bitnet_serving.padding import AXES, Kind, ModelShape, Padding, plan_padding

TQ2_0, Q2_0 = (256, 66 / 256), (64, 18 / 64)
LAYOUTS = [(9, 3), (14, 2), (15, 5), (4, 1)]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text"]
IDS = torch.tensor([[3, 17, 5, 11, 3, 29]])
EPS = 1e-3
"""Large, so that a norm whose ε is wrong shows."""
ROLES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "o_proj.input_norm": "attn_sub_norm",
    "down_proj.input_norm": "ffn_sub_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
GEMMA_ROLES = ROLES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def configuration(family: str, **config: Any) -> dict[str, Any]:
    common = {
        "model_type": family,
        "vocab_size": 37,
        "num_hidden_layers": 1,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gemma3_text":
        common |= {"layer_types": ["full_attention"], "query_pre_attn_scalar": 24, "sliding_window": 8}
    return common | config


def build(config: dict[str, Any], *, sub_norms: bool) -> PreTrainedModel:
    """A model whose tensors hold nothing yet, in front of whose output projections there may be norms."""
    # Engines take any width with any number of heads; transformers' Llama looks at first, and then does too.
    settings = AutoConfig.for_model(**config | {"hidden_size": config["num_attention_heads"]})
    settings.hidden_size = config["hidden_size"]
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    if sub_norms:
        convert_to_bitnet(model, ConversionConfig(subln="output"))
        set_quant_amount(model, 0)
    model.eval()
    return model


@cache
def random_codes() -> Tensor:
    return torch.randint(-1, 2, (5_000_011,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def fill(model: PreTrainedModel) -> None:
    """Ternary projections, random gains, biases and embeddings."""
    generator = torch.Generator().manual_seed(1)
    projections = {f"{path}.weight" for path in walk(model).projections}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name in projections:
                codes = random_codes()[number * 1009 :][: parameter.numel()]
                codes = codes.repeat(-(-parameter.numel() // codes.numel()))[: parameter.numel()]
                parameter.copy_(codes.view(parameter.shape) * (1.5 / parameter.shape[1] ** 0.5))
            elif name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def role_of(name: str, roles: dict[str, str]) -> str:
    """The longest ending of a module's path that names a role."""
    path = name.rpartition(".")[0]
    return roles[max((end for end in roles if path.endswith(end)), key=len)]


def padded_tensors(model: PreTrainedModel, padding: Padding, *, family: str) -> Iterator[tuple[str, Tensor]]:
    is_gemma = family == "gemma3_text"
    for name, parameter in model.named_parameters():
        role = role_of(name, GEMMA_ROLES if is_gemma else ROLES)
        kind: Kind = "bias" if name.endswith(".bias") else "weight"
        # Gemma stores gains less one; a SubLN does not.
        offset = 1.0 if is_gemma and role.endswith("_norm") and "input_norm" not in name else 0.0
        yield name, padding.apply(role, parameter.detach() + offset, kind) - offset


def logits_of_both(
    config: dict[str, Any], *, sub_norms: bool, block: tuple[int, float] = TQ2_0
) -> tuple[Tensor, Tensor, Padding]:
    shape = ModelShape.of_config(config, sub_norms=sub_norms)
    padding = plan_padding(shape, block[0], bytes_per_weight=block[1])
    narrow = build(config, sub_norms=sub_norms)
    fill(narrow)
    wide = build(padding.pad_config(config), sub_norms=sub_norms)
    tensors = dict(padded_tensors(narrow, padding, family=config["model_type"]))
    assert wide.load_state_dict(tensors, strict=False).unexpected_keys == []
    for name, parameter in wide.named_parameters():
        assert name in tensors, f"{name} was not padded"
        if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
            assert parameter.shape[1] % block[0] == 0, f"{name} has rows of {parameter.shape[1]}"
    with torch.no_grad():
        return narrow(IDS, use_cache=False).logits, wide(IDS, use_cache=False).logits, padding


def assert_equal(narrow: Tensor, wide: Tensor, what: object) -> None:
    assert narrow.std() > 0.01, f"{what}: logits that are all alike show nothing"
    difference = (narrow - wide).abs().max() / narrow.std()
    assert difference <= 1e-4, f"{what}: logits differ by {difference:.2g} of their spread"


def check(family: str, *, sub_norms: bool, block: tuple[int, float], **config: int) -> None:
    narrow, wide, padding = logits_of_both(configuration(family, **config), sub_norms=sub_norms, block=block)
    assert_equal(narrow, wide, (family, sub_norms, str(padding)))


def heads_of(layout: tuple[int, int]) -> dict[str, int]:
    return {"num_attention_heads": layout[0], "num_key_value_heads": layout[1]}


@pytest.mark.parametrize("sub_norms", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_model_has_the_same_logits(family: str, sub_norms: bool) -> None:
    widths = {"hidden_size": 80, "intermediate_size": 104, "head_dim": 16}
    for layout in LAYOUTS:
        check(family, sub_norms=sub_norms, block=Q2_0, **widths, **heads_of(layout))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_with_a_head_of_its_own_is_padded_too(family: str) -> None:
    config = configuration(
        family, hidden_size=80, intermediate_size=104, head_dim=16, tie_word_embeddings=False
    )

    narrow, wide, padding = logits_of_both(config | heads_of((4, 1)), sub_norms=False, block=Q2_0)

    assert_equal(narrow, wide, padding)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(1, 25))
def test_every_width_and_layout_of_heads_can_be_padded(k: int) -> None:
    widths = {"hidden_size": 64 * k, "intermediate_size": 64 * k + 40, "head_dim": 64}
    for number, layout in enumerate(LAYOUTS):
        for sub_norms in (False, True):
            family = FAMILIES[(k + number + 2 * sub_norms) % 4]
            check(family, sub_norms=sub_norms, block=TQ2_0, **widths, **heads_of(layout))


def shape_of(hidden: int, ffn: int, heads: int, kv_heads: int, **others: Any) -> ModelShape:
    settings = {"head_dim": 64, "layers": 30, "vocab": 49152, "tied": True} | others
    return ModelShape(hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads, **settings)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        pytest.param(shape_of(576, 1536, 9, 3), (768, 12, 3, 1536), id="zero queries in each group"),
        pytest.param(shape_of(896, 4864, 14, 2), (1024, 16, 2, 4864), id="Qwen2.5-0.5B"),
        pytest.param(shape_of(576, 1536, 9, 3, sub_norms=True), (768, 12, 4, 1536), id="a zero group"),
        pytest.param(shape_of(960, 2560, 15, 5, sub_norms=True), (1024, 16, 16, 2560), id="copies of keys"),
        pytest.param(shape_of(2048, 8192, 32, 8, sub_norms=True), (2048, 32, 8, 8192), id="nothing to do"),
    ],
)
def test_the_cheapest_way_to_more_heads_is_taken(
    shape: ModelShape, expected: tuple[int, int, int, int]
) -> None:
    padded = plan_padding(shape, 256, bytes_per_weight=66 / 256).padded

    assert (padded.hidden, padded.heads, padded.kv_heads, padded.ffn) == expected


def test_the_size_of_padded_smollm2_is_what_a_file_of_it_weighed() -> None:
    """81.1 MB were measured, with tokens and norms."""
    shape = shape_of(576, 1536, 9, 3, sub_norms=True)

    padding = plan_padding(shape, 256, bytes_per_weight=66 / 256, embedding_bytes_per_weight=34 / 32)

    assert padding.num_bytes == pytest.approx(81.1e6, rel=0.03)
    assert "hidden 576, heads 9/3, ffn 1536 → hidden 768, heads 12/4, ffn 1536" in str(padding)


def test_no_other_layout_of_heads_is_cheaper() -> None:
    """All numbers of heads up to twice the least, each tried with every way to place the model's heads."""
    for (heads, kv_heads), sub_norms in itertools.product(LAYOUTS, (False, True)):
        shape = shape_of(320, 320, heads, kv_heads, sub_norms=sub_norms, vocab=0)
        best = plan_padding(shape, 256, bytes_per_weight=1.0)
        for num_kv, group in itertools.product(range(1, 41), range(1, 25)):
            groups_per_kv = -(-shape.group // group)
            is_full = shape.group % group == 0 or not sub_norms
            if num_kv * group % 4 or num_kv < kv_heads * groups_per_kv or not is_full:
                continue
            hidden = num_kv * group * 64 if sub_norms else 512
            attention = 2 * hidden * 64 * (num_kv * group + num_kv)
            if hidden >= 320:
                assert best.num_bytes <= 30 * (attention + 3 * hidden * 512), (str(best), num_kv, group)


def test_a_low_rank_correction_is_padded_like_the_weight_that_it_corrects() -> None:
    shape = shape_of(80, 104, 6, 2, head_dim=16, sub_norms=True)
    padding = plan_padding(shape, 64, bytes_per_weight=0.25)
    for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"):
        rows, columns = (shape.width(axis) for axis in AXES[role])
        b, a = torch.randn(rows, 3, dtype=torch.double), torch.randn(3, columns, dtype=torch.double)

        product = padding.apply(role, b, "lora_b") @ padding.apply(role, a, "lora_a")

        torch.testing.assert_close(product, padding.apply(role, b @ a))


def test_codes_stay_codes() -> None:
    padding = plan_padding(shape_of(80, 104, 5, 5, head_dim=16), 64, bytes_per_weight=0.25)
    codes = random_codes()[: 80 * 80].view(80, 80)

    widened = padding.widen("attn_q", codes)

    assert widened.shape == (128, 128)
    assert widened.dtype == torch.int8
    assert torch.equal(widened[:80, :80], codes)
    assert widened.count_nonzero() == codes.count_nonzero()
