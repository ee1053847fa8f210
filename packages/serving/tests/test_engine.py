"""The engine in its child process, on a file that the `gguf` package wrote from a tiny transformers Llama."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bitnet_arch.testing import tiny_llama
from bitnet_serving.engine import Engine
from durable import ExitCode, UserError

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    # Single bytes are among them: as the likeliest next token they are half a character.
    generator = torch.Generator().manual_seed(3)
    ids: list[int] = torch.randint(512, (48,), generator=generator).tolist()
    return ids


@pytest.fixture(scope="module")
def gguf_path(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "f32.gguf"
    write_llama(model, path, np.float32)
    return path


@pytest.fixture(scope="module")
def engine(gguf_path: Path) -> Iterator[Engine]:
    with Engine(gguf_path) as engine:
        yield engine


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # fp32 sums in another order; weights rounded to fp16 are off by 2^-11, and logits are about one.
    [(np.float32, 1e-5), (np.float16, 1e-3)],
)
def test_next_token_distributions_are_those_of_transformers(
    dtype: type[np.floating], tolerance: float, model: LlamaForCausalLM, ids: list[int], tmp_path: Path
) -> None:
    write_llama(model, tmp_path / "model.gguf", dtype)
    positions = [0, 1, *range(5, len(ids))]

    with Engine(tmp_path / "model.gguf") as engine:
        top = engine.next_log_probs(ids, positions, top_k=600)

    with torch.no_grad():
        expected_PV = model(torch.tensor([ids])).logits[0, positions].double().log_softmax(-1)
    assert [sorted(each.ids) for each in top] == [list(range(512))] * len(positions)
    found_PV = torch.full_like(expected_PV, torch.nan)
    for row, each in zip(found_PV, top, strict=True):
        row[torch.tensor(each.ids)] = torch.tensor(each.log_probs, dtype=torch.float64)
    torch.testing.assert_close(found_PV, expected_PV, atol=tolerance, rtol=0)


def test_the_engine_generates_what_transformers_does(
    engine: Engine, model: LlamaForCausalLM, ids: list[int]
) -> None:
    expected = list(ids[:6])
    with torch.no_grad():
        for _ in range(5):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))

    assert engine.generate(ids[:6], 5) == expected[6:]


def test_timings_count_the_tokens_that_were_asked_for(engine: Engine, ids: list[int]) -> None:
    timings = engine.timings(ids, 7)

    assert (timings.num_prompt_tokens, timings.num_decoded_tokens) == (len(ids), 7)
    assert timings.prompt_tokens_per_second > 0
    assert timings.decoded_tokens_per_second > 0


def test_texts_become_the_ids_of_the_vocabulary(engine: Engine) -> None:
    [hello, nothing] = engine.tokenize(["hello", ""])

    assert [vocabulary()[each] for each in hello] == ["he", "l", "l", "o"]
    assert nothing == []


def test_a_prompt_longer_than_the_context_is_one_line(gguf_path: Path) -> None:
    with Engine(gguf_path, context=256) as engine, pytest.raises(UserError, match="context size") as error:
        engine.next_log_probs(list(range(300)), [299], top_k=4)

    assert error.value.exit_code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: b"", "failed to load"),
        (lambda whole: os.urandom(200), "failed to load"),
        (lambda whole: whole[: len(whole) // 2], "not within the file bounds"),
        (lambda whole: whole.replace(b"llama.block_count", b"llama.blonk_count"), "llama.block_count"),
    ],
)
def test_a_file_that_the_engine_refuses_is_one_line_about_it(
    damage: Callable[[bytes], bytes],
    reason: str,
    gguf_path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(gguf_path.read_bytes()))

    with pytest.raises(UserError, match=reason) as error:
        Engine(bad)

    assert str(error.value).startswith(f"{bad}: ")
    assert error.value.exit_code == ExitCode.BAD_DATA
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("end", [signal.SIGABRT, signal.SIGSEGV])
def test_an_engine_that_crashes_is_one_line_about_the_file(end: signal.Signals, gguf_path: Path) -> None:
    with Engine(gguf_path) as engine:
        os.kill(engine.process_id, end)

        with pytest.raises(UserError, match=f"signal {end.value}") as error:
            engine.generate([1, 2, 3], 4)

    assert error.value.exit_code == ExitCode.BAD_DATA
    assert not is_running(engine.process_id)


def test_an_engine_that_hangs_is_ended_at_the_time_limit(gguf_path: Path) -> None:
    with Engine(gguf_path, answer_seconds=0.2) as engine:
        os.kill(engine.process_id, signal.SIGSTOP)

        with pytest.raises(UserError, match="no answer in time") as error:
            engine.generate([1, 2, 3], 4)

    assert error.value.exit_code == ExitCode.BAD_DATA
    assert not is_running(engine.process_id)


def test_the_engine_ends_when_whoever_started_it_is_gone(gguf_path: Path) -> None:
    with Engine(gguf_path) as engine:
        child = engine._child
        assert child.stdin is not None
        child.stdin.close()

        assert child.wait(timeout=60) == 0


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def vocabulary() -> list[str]:
    """Every byte, one merge, and entries that no text reaches."""
    return [*bytes_to_unicode().values(), "he", *(f"<unused {index}>" for index in range(257, 512))]


def write_llama(model: LlamaForCausalLM, path: Path, dtype: type[np.floating]) -> None:
    """The model as the engine wants it, by the format's own package; matrices in `dtype`."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_merges(["h e"])
    tensors = model.state_dict()
    add_tensor(writer, "token_embd", tensors["model.embed_tokens.weight"], dtype)
    add_tensor(writer, "output_norm", tensors["model.norm.weight"], dtype)
    for layer in range(config.num_hidden_layers):
        for name, gguf_name in NAMES.items():
            tensor = tensors[f"model.layers.{layer}.{name}.weight"]
            if gguf_name in ("attn_q", "attn_k"):
                # From halves to neighbours: this architecture rotates pairs (2i, 2i + 1).
                num_heads = tensor.shape[0] // config.head_dim
                tensor = tensor.view(num_heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            add_tensor(writer, f"blk.{layer}.{gguf_name}", tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, dtype: type[np.floating]) -> None:
    values = tensor.numpy()
    writer.add_tensor(f"{name}.weight", values.astype(dtype) if values.ndim == 2 else values)
