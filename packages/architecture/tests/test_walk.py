"""What `walk` says against what the modules do: who is fed by whom is read off the running model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    Phi3Config,
    Phi3ForCausalLM,
)

from bitnet_arch.testing import TINY_MODELS, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3
from bitnet_arch.walk import FAMILIES, walk
from durable import UserError

families = pytest.mark.parametrize("family", TINY_MODELS)


def traffic(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first input and the output of every module in one forward."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name], outputs[name] = args[0], output

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(torch.arange(11)[None])
    for handle in handles:
        handle.remove()
    return inputs, outputs


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY_MODELS) == set(FAMILIES)


@families
def test_a_norm_feeds_the_projections_that_the_walk_names(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    walked = walk(model)

    inputs, outputs = traffic(model)

    for layer in walked.layers:
        for norm, projections in layer.fed_by.items():
            assert {path for path in walked.projections if inputs[path] is outputs[norm]} == set(projections)


@families
def test_the_other_norms_are_where_the_walk_says(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    walked = walk(model)

    inputs, outputs = traffic(model)

    assert inputs[walked.head].data_ptr() == outputs[walked.final_norm].data_ptr()
    for layer in walked.layers:
        for projection, norm in layer.sub_norms.items():
            assert inputs[projection] is outputs[norm]
        pairs = (
            (layer.after_attention_norm, "o_proj"),
            (layer.after_mlp_norm, "down_proj"),
            (layer.query_norm, "q_proj"),
            (layer.key_norm, "k_proj"),
        )
        for behind, source in pairs:
            if behind is not None:
                assert inputs[behind].data_ptr() == outputs[layer.projections[source]].data_ptr()


@families
def test_no_module_with_parameters_is_forgotten(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    walked = walk(model)
    known = {walked.embedding, walked.head, walked.final_norm, *walked.projections}
    known |= set(walked.sub_norms.values())
    for layer in walked.layers:
        extra = (layer.after_attention_norm, layer.after_mlp_norm, layer.query_norm, layer.key_norm)
        known |= {layer.attention_norm, layer.mlp_norm} | {path for path in extra if path is not None}

    modules = dict(model.named_modules())
    with_parameters = {name for name in modules if list(modules[name].parameters(recurse=False))}

    assert with_parameters == known


@families
def test_gain_offset_is_what_the_norm_computes(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    walked = walk(model)
    norm: Any = model.get_submodule(walked.layers[0].mlp_norm)
    x = torch.randn(3, walked.hidden_size)

    y = norm(x)

    unit = x / (x.square().mean(-1, keepdim=True) + walked.rms_norm_eps).sqrt()
    torch.testing.assert_close(y, unit * (norm.weight + walked.gain_offset))


def test_shape_numbers_come_from_the_configuration() -> None:
    walked = walk(tiny_qwen3())

    assert (walked.hidden_size, walked.intermediate_size, walked.num_heads) == (40, 120, 4)
    assert (walked.num_kv_heads, walked.head_dim, walked.vocab_size) == (2, 16, 512)
    assert (walked.rms_norm_eps, walked.activation) == (1e-6, "silu")


def test_head_dim_follows_from_the_hidden_size_where_the_configuration_has_none() -> None:
    model = tiny_qwen2()

    walked = walk(model)

    assert walked.head_dim == 56 // 7


def test_tying_is_seen_in_the_model_not_in_the_configuration() -> None:
    untied = tiny_llama()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())

    assert walk(tiny_llama()).is_tied
    assert not walk(tiny_mistral()).is_tied
    assert not walk(untied).is_tied


def test_sliding_windows_are_given_per_layer() -> None:
    assert [layer.sliding_window for layer in walk(tiny_mistral()).layers] == [5, 5, 5]
    assert [layer.sliding_window for layer in walk(tiny_gemma3()).layers] == [6, None]
    assert [layer.sliding_window for layer in walk(tiny_qwen3()).layers] == [None, None]


def test_gemma_names_its_activation_elsewhere() -> None:
    assert walk(tiny_gemma3()).activation == "gelu_pytorch_tanh"


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
UNSUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, intermediate_size=24, pad_token_id=0)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SMALL)),
    "no transformers model": lambda: nn.Sequential(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_architecture_is_named_with_the_families_that_are(name: str) -> None:
    unsupported = UNSUPPORTED[name]()

    with pytest.raises(UserError) as caught:
        walk(unsupported)

    assert caught.value.exit_code == 2
    assert type(unsupported).__name__ in str(caught.value)
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize("wrong", [LlamaModel, LlamaForSequenceClassification])
def test_a_llama_without_a_language_model_head_is_refused(wrong: type[Any]) -> None:
    config = LlamaConfig(**SMALL, intermediate_size=24, pad_token_id=0)

    with pytest.raises(UserError, match="AutoModelForCausalLM"):
        walk(wrong(config))


def test_a_projection_of_a_foreign_kind_is_named() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = nn.Identity()

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj.*Identity"):
        walk(model)
