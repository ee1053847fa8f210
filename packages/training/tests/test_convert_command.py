"""`wrinklefree convert`: what it writes can be loaded, and whatever is wrong with its input is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import gguf
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import wrinklefree.pretrained as pretrained
from bitnet_arch import load_bitnet
from bitnet_arch.testing import tiny_llama, tiny_qwen2
from wrinklefree.pretrained import TINY_MODELS


class Ended(Protocol):
    """What the fixture `wrinklefree` gives back."""

    exit_code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as `save_pretrained` leaves it, with a tokenizer of one token per byte."""
    directory = tmp_path_factory.mktemp("pretrained") / "llama"
    tiny_llama().save_pretrained(directory)
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture
def copy_of_llama(llama_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in llama_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def assert_refused(ended: Ended, exit_code: int, said: str, out_dir: Path) -> None:
    assert ended.exit_code == exit_code, ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not out_dir.exists() or not any(out_dir.iterdir())


def test_a_directory_becomes_a_checkpoint_with_the_same_weights_and_its_tokenizer(
    wrinklefree: Run, llama_dir: Path, tmp_path: Path
) -> None:
    ended = wrinklefree("convert", llama_dir, tmp_path / "out")

    assert ended.exit_code == 0, ended.err
    assert "14 projections" in ended.out
    assert "saved" in ended.out
    stored, original = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(llama_dir / "model.safetensors"),
    )
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    assert (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_every_built_in_model_converts(wrinklefree: Run, name: str, tmp_path: Path) -> None:
    ended = wrinklefree("convert", name, tmp_path / "out", "--subln", "output")

    assert ended.exit_code == 0, ended.err
    assert sum(parameter.numel() for parameter in load_bitnet(tmp_path / "out").parameters()) > 0


def test_options_reach_the_conversion(wrinklefree: Run, llama_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One two three four five six seven. " * 200)
    calibrated = ("--subln", "all", "--init", "calibrated", "--calibration", text)

    ended = wrinklefree(
        "convert", llama_dir, tmp_path / "out", *calibrated, "--hidden-act", "relu2", "--exclude", "layers.1"
    )

    assert ended.exit_code == 0, ended.err
    model = load_bitnet(tmp_path / "out")
    assert model.config.hidden_act == "relu2"
    gain = model.get_submodule("model.layers.0.self_attn.o_proj.input_norm").get_parameter("weight")
    assert not torch.equal(gain, torch.ones_like(gain))
    assert "7 × projections excluded by layers.1" in ended.out


def test_two_bits_per_weight_take_less_room(wrinklefree: Run, llama_dir: Path, tmp_path: Path) -> None:
    ended = wrinklefree("convert", llama_dir, tmp_path / "out", "--layout", "stock", "--packed")

    assert ended.exit_code == 0, ended.err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitnet"
    packed, dense = (directory / "model.safetensors" for directory in (tmp_path / "out", llama_dir))
    # 92,160 weights go from 4 bytes to a quarter of one.
    assert dense.stat().st_size - packed.stat().st_size == pytest.approx(92_160 * 3.75, rel=0.02)


def test_norms_that_start_at_one_come_with_a_warning(
    wrinklefree: Run, llama_dir: Path, tmp_path: Path
) -> None:
    assert "calibrate" in wrinklefree("convert", llama_dir, tmp_path / "out", "--subln", "output").out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--packed",), "--layout stock"),
        (("--init", "calibrated", "--calibration", "x"), "--subln output"),
        (("--init", "calibrated", "--subln", "all"), "--calibration FILE"),
        (("--init", "calibrated", "--subln", "all", "--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_loaded(
    wrinklefree: Run, tmp_path: Path, options: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "load_pretrained", None)

    ended = wrinklefree("convert", "tiny_llama", tmp_path / "out", *options)

    assert_refused(ended, 2, said, tmp_path / "out")


def test_an_exclude_that_matches_nothing_is_named(wrinklefree: Run, tmp_path: Path) -> None:
    ended = wrinklefree("convert", "tiny_llama", tmp_path / "out", "--exclude", "q_prj")

    assert_refused(ended, 2, "did you mean 'q_proj'?", tmp_path / "out")


@pytest.mark.parametrize("name", ["./no/such/dir", "no_such_file.gguf", "a/b/c", "~nobody/x", ""])
def test_a_path_that_is_not_there_is_refused(wrinklefree: Run, name: str, tmp_path: Path) -> None:
    assert_refused(wrinklefree("convert", name, tmp_path / "out"), 2, "error: ", tmp_path / "out")


def test_a_model_the_hub_does_not_know_is_refused(
    wrinklefree: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(*_: object, **__: object) -> None:
        # Its constructor insists on a response of the hub.
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "model_info", not_found)

    assert_refused(
        wrinklefree("convert", "tiny_lama", tmp_path / "out"),
        2,
        "did you mean 'tiny_llama'?",
        tmp_path / "out",
    )


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(
    wrinklefree: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to\nhost")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    assert_refused(
        wrinklefree("convert", "somebody/some-model-9b", tmp_path / "out"),
        4,
        "no route to host",
        tmp_path / "out",
    )


def test_a_hub_model_is_loaded_from_its_snapshot(
    wrinklefree: Run, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Info:
        siblings = tuple(type("File", (), {"rfilename": path.name}) for path in llama_dir.iterdir())

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: Info)
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: str(llama_dir))

    ended = wrinklefree("convert", "somebody/tiny", tmp_path / "out")

    assert ended.exit_code == 0, ended.err
    assert "somebody/tiny" in ended.out


def test_a_hub_model_with_pickles_only_is_refused_before_it_is_downloaded(
    wrinklefree: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Info:
        siblings = (type("File", (), {"rfilename": "pytorch_model.bin"}),)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: Info)
    monkeypatch.setattr(pretrained, "snapshot_download", None)

    assert_refused(wrinklefree("convert", "somebody/old", tmp_path / "out"), 4, "pickled", tmp_path / "out")


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def with_a_pickle_instead(directory: Path) -> None:
    without_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def with_broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def with_config_that_is_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def of_another_kind(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "resnet"}))


def quantised(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )


def truncated(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def with_nan(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def with_a_tensor_missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def of_another_shape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(7, 64)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def with_a_broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "exit_code", "said"),
    [
        (without_weights, 4, "no weights"),
        (with_a_pickle_instead, 4, "pytorch_model.bin"),
        (without_config, 2, "config.json"),
        (with_broken_config, 4, "config.json"),
        (with_config_that_is_a_list, 4, "config.json"),
        (of_another_kind, 2, "resnet"),
        (quantised, 2, "gptq"),
        (truncated, 4, "copy"),
        (with_nan, 4, "model.layers.1.mlp.up_proj.weight"),
        (with_a_tensor_missing, 4, "model.layers.1.mlp.up_proj.weight"),
        (of_another_shape, 4, "up_proj"),
        (with_a_broken_tokenizer, 4, "copy"),
    ],
)
def test_a_damaged_model_directory_is_refused(
    wrinklefree: Run,
    copy_of_llama: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    exit_code: int,
    said: str,
) -> None:
    damage(copy_of_llama)

    assert_refused(wrinklefree("convert", copy_of_llama, tmp_path / "out"), exit_code, said, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "exit_code"),
    [
        ("model.bin", b"\x80\x04N.", 4),
        ("model.pt", b"PK\x03\x04", 4),
        ("model.safetensors", b"", 2),
        ("model.gguf", b"not it", 4),
        ("model.gguf", b"GGUF\x03\x00\x00\x00" + bytes(40), 4),
        ("notes.txt", b"hello", 2),
    ],
)
def test_a_file_that_is_no_gguf_model_is_refused(
    wrinklefree: Run, tmp_path: Path, name: str, content: bytes, exit_code: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    assert_refused(wrinklefree("convert", path, tmp_path / "out"), exit_code, name, tmp_path / "out")


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The tensors of a Llama under llama.cpp's names, whose q and k rows are interleaved by pairs."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or 0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokens += [f"<{number}>" for number in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stem, _, suffix = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem[-6:])
        if heads:
            rows = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_model_is_converted_with_its_own_weights(wrinklefree: Run, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_llama())

    ended = wrinklefree("convert", tmp_path / "model.gguf", tmp_path / "out")

    assert (ended.exit_code, ended.err) == (0, "")
    stored, original = load_bitnet(tmp_path / "out").state_dict(), tiny_llama().state_dict()
    assert all(torch.equal(stored[name], original[name]) for name in original)
    assert (tmp_path / "out/tokenizer.json").exists()


def test_a_converted_model_is_not_converted_again(wrinklefree: Run, tmp_path: Path) -> None:
    wrinklefree("convert", "tiny_llama", tmp_path / "once")

    ended = wrinklefree("convert", tmp_path / "once", tmp_path / "twice")

    assert_refused(ended, 2, "already converted", tmp_path / "twice")


def test_a_target_with_something_in_it_is_left_alone(wrinklefree: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    ended = wrinklefree("convert", "tiny_llama", tmp_path)

    assert ended.exit_code == 2
    assert "not empty" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_left_alone(wrinklefree: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        ended = wrinklefree("convert", "tiny_llama", target)
        assert ended.exit_code in (2, 5)
        assert ended.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a filesystem that nobody can write to")
def test_a_place_where_nobody_can_write_ends_with_five(wrinklefree: Run) -> None:
    target = Path("/proc/ternary")

    assert_refused(wrinklefree("convert", "tiny_llama", target), 5, str(target), target)


def test_biases_survive_the_way_through_the_command(wrinklefree: Run, tmp_path: Path) -> None:
    tiny_qwen2().save_pretrained(tmp_path / "qwen2")

    ended = wrinklefree("convert", tmp_path / "qwen2", tmp_path / "out", "--layout", "stock", "--packed")

    assert ended.exit_code == 0, ended.err
    bias = load_bitnet(tmp_path / "out").get_parameter("model.layers.0.self_attn.q_proj.bias")
    assert torch.equal(bias, tiny_qwen2().get_parameter("model.layers.0.self_attn.q_proj.bias"))
