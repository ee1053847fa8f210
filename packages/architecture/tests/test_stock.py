"""Saved models in plain transformers: a child process that cannot import this package loads every case."""

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet_arch.bitlinear import set_quant_amount, set_sparsity, set_subln_amount
from bitnet_arch.checkpoint import load_bitnet, save_bitnet
from bitnet_arch.conversion_config import ConversionConfig
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.lrc import BitLinearLRC
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.testing import TINY_MODELS, assert_same_distribution, tiny_bitnet, tiny_llama, tiny_qwen2
from durable import UserError

CHILD = Path(__file__).with_name("run_with_transformers.py")
NUM_TOKENS = 3
NUM_SEEDS = {("llama", "none"): 20}
MOVED_GAINS = [("mistral", "output"), ("qwen3", "output"), ("gemma3_text", "output")]
HELD_EXACTLY = [
    (family, subln)
    for family in TINY_MODELS
    for subln in ("none", "output", "all")
    if (family, subln) not in MOVED_GAINS
]


def run_stock(directory: Path, *, compiled: bool = False) -> dict[str, Tensor]:
    """Logits of every case in a directory, by plain transformers."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    switches = {} if compiled else {"TORCHDYNAMO_DISABLE": "1"}
    output = directory / "logits.safetensors"
    subprocess.run(
        [sys.executable, str(CHILD), str(directory), str(output)],
        env=environment | switches | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )
    return load_file(output)


def converted(build: Any, seed: int = 0, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if settings.get("subln", "none") != "none":
        batches = [torch.randint(512, (4, 32), generator=generator)]
        settings |= {"subln_init": "calibrated", "calibration_batches": batches}
    model = build(seed=seed)
    convert_to_bitnet(model, ConversionConfig(**settings))
    return model


class Cases:
    """Models saved side by side, with what they compute here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ids: dict[str, Tensor] = {}
        self.ours: dict[str, Tensor] = {}
        self.theirs: dict[str, Tensor] = {}

    def add(self, name: str, model: Any, *, packed: bool = False, seed: int = 0) -> None:
        save_bitnet(model, self.directory / name, layout="stock", packed=packed)
        generator = torch.Generator().manual_seed(100 + seed)
        self.ids[name] = torch.randint(512, (1, NUM_TOKENS), generator=generator)
        with torch.no_grad():
            self.ours[name] = model(self.ids[name]).logits

    def run(self, *, compiled: bool = False) -> None:
        save_file(self.ids, self.directory / "ids.safetensors")
        self.theirs = run_stock(self.directory, compiled=compiled)

    def distances(self, prefix: str) -> list[float]:
        """Relative distances of all cases whose name starts so."""
        names = [name for name in self.ours if name.startswith(prefix)]
        return [relative(self.theirs[name], self.ours[name]) for name in names]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    cases = Cases(tmp_path_factory.mktemp("stock"))
    for family, build in TINY_MODELS.items():
        for subln in ("none", "output", "all"):
            for seed in range(NUM_SEEDS.get((family, subln), 3)):
                packed = seed % 2 == 1
                cases.add(
                    f"{family}-{subln}-{seed}", converted(build, seed, subln=subln), packed=packed, seed=seed
                )
    add_special(cases)
    add_moved(cases)
    plant_faults(cases)
    cases.run()
    return cases


def add_special(cases: Cases) -> None:
    def odd_llama(seed: int) -> Any:
        """Rows that do not fill bytes, and no value that BitNet's configuration would have by default."""
        return tiny_llama(
            seed=seed,
            hidden_size=12,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=30,
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0},
            rms_norm_eps=1e-4,
            tie_word_embeddings=False,
            eos_token_id=None,
        )

    special = {
        "odd": converted(odd_llama, subln="output"),
        "relu2": converted(tiny_qwen2, hidden_act="relu2"),
        "excluded-none": converted(tiny_bitnet, exclude=("q_proj", "layers.0.mlp.down_proj")),
        "excluded-all": converted(tiny_bitnet, exclude=("q_proj", "layers.0.mlp.up_proj"), subln="all"),
        "excluded-output": converted(tiny_qwen2, exclude=("layers.1.mlp.gate_proj",), subln="output"),
    }
    for name, model in special.items():
        for packed in (False, True):
            cases.add(f"special-{name}-{'packed' if packed else 'latent'}", model, packed=packed)


def add_moved(cases: Cases) -> None:
    """Models whose logits spread three times as far, so that a fault of a gain shows in the distribution."""
    for family, subln in MOVED_GAINS:
        for seed in range(2):
            build = functools.partial(TINY_MODELS[family], initializer_range=0.05)
            model = converted(build, seed, subln=subln)
            cases.add(f"moved-{family}-{seed}", model, packed=seed % 2 == 1, seed=seed)
    cases.add("moved-excluded", converted(tiny_qwen2, exclude=("layers.1.mlp",), subln="output"))


def plant_faults(cases: Cases) -> None:
    """A bias that is not divided by the scale, a gain that also stays behind, a gain that is missing."""

    def multiply_biases(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.bias")]:
            tensors[name] *= tensors[name.replace(".bias", ".weight_scale")]

    def restore_gain(tensors: dict[str, Tensor]) -> None:
        gain = tensors["model.layers.1.self_attn.q_proj.rms_norm.weight"]
        tensors["model.layers.1.input_layernorm.weight"] = gain.clone()

    def flatten_norm(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.ffn_sub_norm.weight"].fill_(1.0)

    plants = {
        "qwen2-none-1": multiply_biases,
        "moved-mistral-0": restore_gain,
        "moved-qwen3-1": restore_gain,
        "llama-output-0": flatten_norm,
    }
    for source, change in plants.items():
        name = f"fault-{source}"
        path = shutil.copytree(cases.directory / source, cases.directory / name) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        cases.ids[name], cases.ours[name] = cases.ids[source].clone(), cases.ours[source]


def test_the_child_never_saw_this_package(cases: Cases) -> None:
    assert set(cases.theirs) == set(cases.ours)


@pytest.mark.parametrize(("family", "subln"), HELD_EXACTLY)
def test_logits_of_plain_transformers_are_ours(family: str, subln: str, cases: Cases) -> None:
    distances = cases.distances(f"{family}-{subln}-")

    # One rounding to int8 may flip, and all that follows differs by that; small norms enlarge it. Of three
    # models
    # two may be so unlucky.
    typical = statistics.median(distances) if len(distances) > 3 else min(distances)
    assert typical <= 1e-6
    assert max(distances) <= (1e-3 if family == "llama" else 1e-2)


@pytest.mark.parametrize("family", [family for family, _ in MOVED_GAINS])
def test_where_a_gain_is_moved_the_distributions_agree(family: str, cases: Cases) -> None:
    names = [name for name in cases.ours if name.startswith((f"moved-{family}", f"{family}-output"))]

    assert len(names) == 5
    for name in [*names, "moved-excluded"]:
        assert_same_distribution(cases.ours[name], cases.theirs[name], kl=1e-5)


def test_special_models_are_held_exactly_too(cases: Cases) -> None:
    distances = cases.distances("special-")

    assert len(distances) == 10
    assert max(distances) <= 1e-6


def test_the_tolerances_tell_planted_faults(cases: Cases) -> None:
    for name in cases.ours:
        if name.startswith("fault-"):
            assert relative(cases.theirs[name], cases.ours[name]) > 1e-2, name
        if name.startswith("fault-moved-"):
            with pytest.raises(AssertionError, match="KL"):
                assert_same_distribution(cases.ours[name], cases.theirs[name], kl=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_it_also_runs_as_transformers_compiles_it(tmp_path: Path) -> None:
    cases = Cases(tmp_path)
    cases.add("latent", converted(tiny_qwen2, subln="all"))
    cases.add("packed", converted(tiny_qwen2, subln="output"), packed=True)

    cases.run(compiled=True)

    assert max(cases.distances("")) <= 1e-3


def saved_config(model: Any, path: Path, **options: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (save_bitnet(model, path, layout="stock", **options) / "config.json").read_text()
    )
    return config


def test_the_quantisation_config_says_what_transformers_needs(tmp_path: Path) -> None:
    model = converted(tiny_llama, exclude=("layers.1.mlp.up_proj",), subln="all")

    latent = saved_config(model, tmp_path / "latent")["quantization_config"]
    packed = saved_config(model, tmp_path / "packed", packed=True)["quantization_config"]

    assert latent == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "use_rms_norm": True,
        "rms_norm_eps": 1e-5,
        "modules_to_not_convert": ["model.layers.1.mlp.up_proj", "lm_head"],
    }
    assert packed == latent | {"quantization_mode": "offline"}


@pytest.mark.parametrize(
    ("family", "subln", "host", "uses_rms_norm"),
    [
        ("llama", "none", "llama", False),
        ("llama", "output", "bitnet", False),
        ("llama", "all", "llama", True),
        ("mistral", "output", "mistral", True),
        ("qwen2", "output", "bitnet", False),
        ("qwen3", "output", "qwen3", True),
        ("bitnet", "none", "bitnet", False),
        ("bitnet", "output", "bitnet", False),
        ("bitnet", "all", "llama", True),
    ],
)
def test_the_class_is_one_that_holds_the_norms(
    family: str, subln: Any, host: str, uses_rms_norm: bool, tmp_path: Path
) -> None:
    config = saved_config(converted(TINY_MODELS[family], subln=subln), tmp_path / "saved")

    assert config["model_type"] == host
    assert config["quantization_config"]["use_rms_norm"] == uses_rms_norm
    assert load_bitnet(tmp_path / "saved").config.model_type == family


def test_packed_weights_take_a_quarter_of_a_byte_each(tmp_path: Path) -> None:
    save_bitnet(converted(tiny_llama), tmp_path / "saved", layout="stock", packed=True)

    tensors = load_file(tmp_path / "saved" / "model.safetensors")

    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert (weight.dtype, tuple(weight.shape)) == (torch.uint8, (176 // 4, 64))
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32


def half_lambda(model: Any) -> str:
    set_quant_amount(model, 0.5)
    return "quant_amount 0.5"


def half_mu(model: Any) -> str:
    set_subln_amount(model, 0.5)
    return "subln_amount 0.5"


def sparse(model: Any) -> str:
    set_sparsity(model, Sparsity(0.25))
    return "sparsity 0.25"


def corrected(model: Any) -> str:
    path = "model.layers.0.mlp.down_proj"
    model.set_submodule(path, BitLinearLRC.from_bitlinear(model.get_submodule(path), rank=2))
    model.get_submodule(path).init_factors()
    return f"{path} with a low-rank correction"


@pytest.mark.parametrize("change", [half_lambda, half_mu, sparse, corrected])
def test_what_transformers_cannot_run_is_named(change: Any, tmp_path: Path) -> None:
    model = converted(tiny_llama, subln="output")
    fragment = change(model)

    with pytest.raises(UserError) as caught:
        save_bitnet(model, tmp_path / "saved", layout="stock")

    assert fragment in str(caught.value)
    assert 'layout="training"' in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "saved").exists()


def drop_subln(model: Any) -> str:
    model.model.layers[1].self_attn.o_proj.input_norm = None
    return "model.layers.1.self_attn.o_proj with no SubLN"


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_dense_projection_beside_ternary_ones_behind_a_moved_gain_is_refused(
    family: str, tmp_path: Path
) -> None:
    model = converted(TINY_MODELS[family], subln="output", exclude=("layers.0.self_attn.k_proj",))

    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj.*same norm.*layout=.training"):
        save_bitnet(model, tmp_path / "saved", layout="stock")


def test_a_subln_that_is_missing_where_others_have_one_is_refused(tmp_path: Path) -> None:
    model = converted(TINY_MODELS["qwen3"], subln="output")
    fragment = drop_subln(model)

    with pytest.raises(UserError, match=fragment.replace(".", r"\.")):
        save_bitnet(model, tmp_path / "saved", layout="stock")
