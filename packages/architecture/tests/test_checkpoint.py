"""What is saved comes back to the bit; what is damaged, foreign or hostile is one line and an exit code."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.bitnet import pack_weights

from bitnet_arch.bitlinear import BitLinearNoActivationQuant, set_quant_amount, set_sparsity, set_subln_amount
from bitnet_arch.checkpoint import checkpoint_files, load_bitnet, load_packed, save_bitnet
from bitnet_arch.conversion_config import ConversionConfig
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.lrc import BitLinearLRC
from bitnet_arch.packed import PackedBitLinear, pack, unpack
from bitnet_arch.quant import quantize_weight
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.testing import TINY_MODELS, tiny_bitnet, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen2
from bitnet_arch.walk import walk
from durable import UserError, publish

IDS = torch.arange(5, 47).reshape(2, 21)
CALIBRATED: dict[str, Any] = {"subln_init": "calibrated", "calibration_batches": [IDS]}
CASES = [("training", False), ("stock", False), ("stock", True)]
cases = pytest.mark.parametrize(("layout", "packed"), CASES)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def converted(build: Callable[..., Any] = tiny_llama, *, seed: int = 0, **settings: Any) -> Any:
    model = build(seed=seed)
    convert_to_bitnet(model, ConversionConfig(**settings))
    return model


def rewrite(directory: Path, change: Callable[[Path], None]) -> Path:
    """A directory whose files were changed by someone who also wrote a matching manifest."""
    forged = directory.with_name("forged")
    with publish(forged) as temporary:
        for path in directory.iterdir():
            if path.name != "manifest.json":
                shutil.copy(path, temporary)
        change(temporary)
    return forged


@pytest.mark.parametrize("family", TINY_MODELS)
@pytest.mark.parametrize("subln", ["none", "output", "all"])
@cases
def test_a_model_comes_back_to_the_bit(
    family: str, subln: str, layout: Any, packed: bool, tmp_path: Path
) -> None:
    calibrated: dict[str, Any] = {} if subln == "none" else CALIBRATED
    model = converted(TINY_MODELS[family], subln=subln, **calibrated)

    loaded: Any = load_bitnet(save_bitnet(model, tmp_path / "saved", layout=layout, packed=packed))

    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded) is type(model)
    assert not loaded.training
    if not packed:
        before, after = model.state_dict(), loaded.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_come_back_also_those_of_buffers(
    dtype: torch.dtype, layout: Any, packed: bool, tmp_path: Path
) -> None:
    model = converted(tiny_gemma3, subln="output", **CALIBRATED).to(dtype)

    loaded: Any = load_bitnet(save_bitnet(model, tmp_path / "saved", layout=layout, packed=packed))

    assert torch.equal(logits(loaded), logits(model))
    assert [b.dtype for b in loaded.buffers() if b.ndim and b.is_floating_point()] == [
        b.dtype for b in model.buffers() if b.ndim
    ]
    assert loaded.config.dtype == dtype


def test_a_model_of_two_dtypes_keeps_both(tmp_path: Path) -> None:
    model = converted(subln="output").bfloat16()
    model.model.layers[0].mlp.down_proj.float()

    loaded = load_bitnet(save_bitnet(model, tmp_path / "saved"))

    assert {n: p.dtype for n, p in loaded.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }


def test_settings_come_back_of_the_model_and_of_layers_that_differ(tmp_path: Path) -> None:
    model = converted(tiny_bitnet, subln="all")
    set_quant_amount(model, 0.375, activations=False)
    set_subln_amount(model, 0.25)
    set_sparsity(model, Sparsity(0.5, block=4))
    special = model.model.layers[1].mlp.up_proj
    special.quant_amount, special.activation_amount, special.sparsity = 0.75, 0.5, None

    loaded: Any = load_bitnet(save_bitnet(model, tmp_path / "saved"))

    names = ("quant_amount", "activation_amount", "subln_amount", "sparsity")
    for path in walk(model).projections:
        ours, theirs = model.get_submodule(path), loaded.get_submodule(path)
        assert [getattr(theirs, name) for name in names] == [getattr(ours, name) for name in names], path
    assert torch.equal(logits(loaded), logits(model))
    record = json.loads((tmp_path / "saved" / "bitnet.json").read_text())
    assert record["settings"]["quant_amount"] == 0.375
    different = {"quant_amount": 0.75, "activation_amount": 0.5, "sparsity": None}
    assert record["exceptions"]["model.layers.1.mlp.up_proj"] == different


def test_layers_without_activation_quantisation_stay_so(tmp_path: Path) -> None:
    model = converted()
    path = "model.layers.0.mlp.gate_proj"
    model.set_submodule(path, BitLinearNoActivationQuant.from_linear(model.get_submodule(path)))

    loaded = load_bitnet(save_bitnet(model, tmp_path / "saved"))

    assert type(loaded.get_submodule(path)) is BitLinearNoActivationQuant
    assert torch.equal(logits(loaded), logits(model))


def test_low_rank_corrections_come_back_with_their_ranks(tmp_path: Path) -> None:
    model = converted(subln="output")
    for path, rank in (("model.layers.0.mlp.down_proj", 5), ("model.layers.1.self_attn.q_proj", 3)):
        model.set_submodule(path, BitLinearLRC.from_bitlinear(model.get_submodule(path), rank=rank))
        model.get_submodule(path).init_factors()

    loaded = load_bitnet(save_bitnet(model, tmp_path / "saved"))

    assert loaded.get_submodule("model.layers.0.mlp.down_proj").rank == 5
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("layout", ["training", "stock"])
def test_ties_are_those_of_the_model_whatever_its_configuration_says(layout: Any, tmp_path: Path) -> None:
    untied, tied = converted(tiny_llama), converted(tiny_mistral)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() * 2)
    tied.lm_head.weight = tied.model.embed_tokens.weight

    for name, model in (("untied", untied), ("tied", tied)):
        loaded: Any = load_bitnet(save_bitnet(model, tmp_path / name, layout=layout))

        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (name == "tied")
        assert torch.equal(logits(loaded), logits(model))
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] == (
            name == "tied"
        )
        assert loaded.config.tie_word_embeddings == (name == "tied")


def test_tensors_that_share_memory_without_being_tied_are_saved_each(tmp_path: Path) -> None:
    model = converted(tiny_mistral)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    fused = torch.randn(3 * 48, 48)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight = nn.Parameter(fused[48 * index : 48 * (index + 1)])

    loaded = load_bitnet(save_bitnet(model, tmp_path / "saved"))

    assert torch.equal(logits(loaded), logits(model))


@cases
def test_what_was_left_dense_stays_dense(layout: Any, packed: bool, tmp_path: Path) -> None:
    model = converted(tiny_bitnet, exclude=("v_proj", "layers.0.mlp"))

    loaded = load_bitnet(save_bitnet(model, tmp_path / "saved", layout=layout, packed=packed))

    assert type(loaded.get_submodule("model.layers.1.self_attn.v_proj")) is nn.Linear
    assert type(loaded.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_changed_activation_stands_in_config_json(family: str, tmp_path: Path) -> None:
    model = converted(TINY_MODELS[family], hidden_act="relu2")

    loaded = load_bitnet(save_bitnet(model, tmp_path / "saved"))

    assert torch.equal(logits(loaded), logits(model))
    assert walk(loaded).activation == "relu2"


def test_a_directory_holds_safetensors_json_and_a_card_and_nothing_else(tmp_path: Path) -> None:
    save_bitnet(converted(tiny_qwen2), tmp_path / "saved", layout="stock", packed=True)

    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "README.md",
        "bitnet.json",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "originals.safetensors",
    }


def test_the_record_says_what_a_reader_needs(tmp_path: Path) -> None:
    save_bitnet(converted(subln="output"), tmp_path / "saved")

    record = json.loads((tmp_path / "saved" / "bitnet.json").read_text())

    assert (record["format"], record["format_version"], record["layout"]) == ("bitnet-arch", 1, "training")
    assert record["subln"]["placement"] == "output"
    assert record["subln"]["eps"] == 1e-5
    assert len(record["ternary"]) == 14
    assert set(record["versions"]) == {"bitnet-arch", "torch", "transformers"}


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ("stock", ["AutoModelForCausalLM", "C++ compiler", "TORCHDYNAMO_DISABLE=1", "load_bitnet"]),
        ("training", ["load_bitnet", 'layout="stock"', "quant_amount 0.5"]),
    ],
)
def test_the_card_says_how_to_load_the_model(layout: Any, wanted: list[str], tmp_path: Path) -> None:
    model = converted()
    if layout == "training":
        set_quant_amount(model, 0.5)

    card = (save_bitnet(model, tmp_path / "saved", layout=layout) / "README.md").read_text()

    assert all(fragment in card for fragment in wanted)


def test_generation_settings_and_tokenizer_travel_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, save_directory: str) -> None:
            (Path(save_directory) / "tokenizer.json").write_text("{}")

    model = converted()
    model.generation_config.max_new_tokens = 17

    loaded: Any = load_bitnet(save_bitnet(model, tmp_path / "saved", tokenizer=Tokenizer()))

    assert loaded.generation_config.max_new_tokens == 17
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@cases
def test_load_packed_gives_the_codes_and_scales_of_the_latent_weights(
    layout: Any, packed: bool, tmp_path: Path
) -> None:
    # 6 rows of q_proj do not fill bytes of four.
    model = tiny_llama(hidden_size=12, head_dim=3, num_attention_heads=2, num_key_value_heads=1)
    convert_to_bitnet(model)

    weights = load_packed(save_bitnet(model, tmp_path / "saved", layout=layout, packed=packed))

    assert list(weights) == list(walk(model).projections)
    for path, weight in weights.items():
        codes, scale = quantize_weight(model.get_parameter(f"{path}.weight"))
        assert torch.equal(weight.codes, codes)
        assert weight.codes.dtype == torch.int8
        assert torch.equal(weight.scale, scale)


def test_packing_is_transformers_packing() -> None:
    codes = torch.randint(-1, 2, (8, 5), generator=torch.Generator().manual_seed(0)).to(torch.int8)

    packed = pack(codes)

    assert torch.equal(packed, pack_weights(codes.clone()))
    assert packed.shape == (2, 5)
    assert torch.equal(unpack(packed), codes)


def packed_model(tmp_path: Path) -> Any:
    return load_bitnet(save_bitnet(converted(tiny_qwen2), tmp_path / "packed", layout="stock", packed=True))


def test_a_packed_model_can_be_saved_again_and_copied(tmp_path: Path) -> None:
    model = packed_model(tmp_path)
    expected = logits(model)

    again = load_bitnet(save_bitnet(model, tmp_path / "again", layout="stock", packed=True))

    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "packed" / "model.safetensors"
    ).read_bytes()


def test_casting_a_packed_model_leaves_its_scales_exact(tmp_path: Path) -> None:
    model = packed_model(tmp_path)
    path = "model.layers.0.mlp.up_proj"
    scale = model.get_submodule(path).weight_scale.clone()

    model.bfloat16()

    assert torch.equal(model.get_submodule(path).weight_scale, scale)
    assert model.get_submodule(path).weight.dtype == torch.int8
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "misuse",
    [
        pytest.param(lambda model, path: save_bitnet(model, path / "out"), id="training layout"),
        pytest.param(lambda model, path: save_bitnet(model, path / "out", layout="stock"), id="latent stock"),
        pytest.param(lambda model, path: set_quant_amount(model, 0.5), id="lambda"),
    ],
)
def test_a_packed_model_has_no_latent_weights_and_says_so(misuse: Any, tmp_path: Path) -> None:
    model = packed_model(tmp_path)

    with pytest.raises(UserError, match="packed") as caught:
        misuse(model, tmp_path)

    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), PackedBitLinear)


def poison(model: Any) -> str:
    model.model.layers[1].mlp.gate_proj.weight.data[2, 2] = float("inf")
    return "model.layers.1.mlp.gate_proj.weight"


def empty(model: Any) -> str:
    model.model.norm.to("meta")
    return "model.norm.weight"


@pytest.mark.parametrize("harm", [poison, empty])
def test_a_broken_tensor_is_never_written_and_the_earlier_save_survives(harm: Any, tmp_path: Path) -> None:
    model = converted()
    expected = logits(model)
    target = save_bitnet(model, tmp_path / "saved")
    name = harm(model)

    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        save_bitnet(model, target)

    assert caught.value.exit_code == 4
    assert torch.equal(logits(load_bitnet(target)), expected)


def test_saving_again_replaces_what_was_saved(tmp_path: Path) -> None:
    first, second = converted(), converted(seed=1)
    save_bitnet(first, tmp_path / "saved", layout="stock")

    save_bitnet(second, tmp_path / "saved")

    assert torch.equal(logits(load_bitnet(tmp_path / "saved")), logits(second))


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")

    with pytest.raises(UserError) as caught:
        save_bitnet(converted(), tmp_path / "notes")

    assert caught.value.exit_code == 5
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["diary.txt"]


def test_a_dense_model_is_not_saved_as_a_ternary_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ternary projection.*convert_to_bitnet"):
        save_bitnet(tiny_llama(), tmp_path / "saved")


@pytest.mark.parametrize(
    ("request_", "fragment"),
    [({"layout": "stok"}, "did you mean 'stock'"), ({"packed": True}, 'layout="stock"')],
)
def test_a_wrong_request_is_one_line(request_: Any, fragment: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        save_bitnet(converted(), tmp_path / "saved", **request_)

    assert fragment in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_files_of_a_checkpoint_can_be_published_among_others(tmp_path: Path) -> None:
    model = converted()
    files = checkpoint_files(model, state_dict={name: t.clone() for name, t in model.state_dict().items()})

    with publish(tmp_path / "step_000500") as temporary:
        files.write(temporary)
        (temporary / "train_state.json").write_text("{}")

    assert torch.equal(logits(load_bitnet(tmp_path / "step_000500")), logits(model))


def test_truncation_and_one_flipped_bit_are_found(tmp_path: Path) -> None:
    saved = save_bitnet(converted(), tmp_path / "saved")
    path = saved / "model.safetensors"
    whole = path.read_bytes()

    for damaged in (whole[:-1], whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:]):
        path.write_bytes(damaged)
        for read in (load_bitnet, load_packed):
            with pytest.raises(UserError, match=r"model\.safetensors") as caught:
                read(saved)
            assert caught.value.exit_code == 4


def drop_tensor(tensors: dict[str, Tensor]) -> str:
    del tensors["model.layers.0.mlp.up_proj.weight"]
    return "model.layers.0.mlp.up_proj.weight is missing"


def add_tensor(tensors: dict[str, Tensor]) -> str:
    tensors["model.layers.9.extra"] = torch.ones(2)
    return "model.layers.9.extra is unexpected"


def transpose_tensor(tensors: dict[str, Tensor]) -> str:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].t().contiguous()
    return "model.layers.0.mlp.up_proj.weight is 64×176 and must be 176×64"


def drop_many(tensors: dict[str, Tensor]) -> str:
    for name in [name for name in tensors if "layers.1" in name]:
        del tensors[name]
    return "and 6 more"


@pytest.mark.parametrize("change", [drop_tensor, add_tensor, transpose_tensor, drop_many])
def test_tensors_that_do_not_fit_are_named(change: Any, tmp_path: Path) -> None:
    saved = save_bitnet(converted(), tmp_path / "saved")
    messages: list[str] = []

    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        messages.append(change(tensors))
        save_file(tensors, directory / "model.safetensors")

    forged = rewrite(saved, edit)

    with pytest.raises(UserError) as caught:
        load_bitnet(forged)
    assert messages[0] in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("file", "key", "value", "fragments"),
    [
        ("bitnet.json", "format_version", 7, ["formats up to 1", "format 7"]),
        ("bitnet.json", "format", "other", ["not a record", "'other'"]),
        ("bitnet.json", "ternary", ["model.layers.5.mlp.up_proj"], ["model.layers.5.mlp.up_proj"]),
        ("bitnet.json", "subln", None, ["not a record"]),
        ("config.json", "model_type", "gpt2", ["gpt2", "llama"]),
        ("config.json", "num_hidden_layers", "two", ["configuration"]),
    ],
)
def test_a_file_that_this_release_cannot_read_is_one_line(
    file: str, key: str, value: Any, fragments: list[str], tmp_path: Path
) -> None:
    def edit(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(content | {key: value}))

    forged = rewrite(save_bitnet(converted(), tmp_path / "saved"), edit)

    with pytest.raises(UserError) as caught:
        load_bitnet(forged)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_code_that_a_configuration_points_to_is_never_run(tmp_path: Path) -> None:
    def edit(directory: Path) -> None:
        (directory / "modeling_evil.py").write_text("raise SystemExit('ran')\n")
        content = json.loads((directory / "config.json").read_text())
        names = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
        (directory / "config.json").write_text(json.dumps(content | {"auto_map": names}))

    model = converted()
    forged = rewrite(save_bitnet(model, tmp_path / "saved"), edit)

    assert torch.equal(logits(load_bitnet(forged)), logits(model))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "checkpoint.pth"])
def test_a_pickle_is_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")

    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name}.*pickle") as caught:
            load_bitnet(path)
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "stock dense"])
def test_a_path_without_a_saved_model_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    if kind == "file":
        path.write_text("hello")
    if kind == "empty":
        path.mkdir()
    if kind == "stock dense":
        tiny_llama().save_pretrained(path)

    with pytest.raises(UserError) as caught:
        load_bitnet(path)

    assert caught.value.exit_code == (2 if kind in ("missing", "file") else 4)
    assert "save_bitnet" in str(caught.value)


def test_whoever_can_read_the_configuration_can_read_the_weights(tmp_path: Path) -> None:
    model = tiny_llama()
    convert_to_bitnet(model)

    saved = save_bitnet(model, tmp_path / "saved")

    modes = {path.name: path.stat().st_mode for path in saved.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_card_of_a_packed_bf16_model_warns_of_rounded_scales(tmp_path: Path) -> None:
    model = converted()

    exact = save_bitnet(model, tmp_path / "fp32", layout="stock", packed=True) / "README.md"
    rounded = save_bitnet(model.bfloat16(), tmp_path / "bf16", layout="stock", packed=True) / "README.md"

    assert 'dtype="float32"' in rounded.read_text()
    assert 'dtype="float32"' not in exact.read_text()
