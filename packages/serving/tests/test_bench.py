"""What `bench` counts, and that every number it prints follows from the others."""

import json
from pathlib import Path

import gguf
import pytest
import torch

from bitnet_serving.bandwidth import memory_bandwidth
from bitnet_serving.bench import bench, bytes_per_token
from bitnet_serving.gguf_reader import read_gguf
from durable import UserError


def test_a_token_reads_every_weight_but_the_embedding(tiny_gguf: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    embedding = tensors.pop("token_embd.weight")

    read = bytes_per_token(read_gguf(tiny_gguf))

    assert read == sum(tensor.n_bytes for tensor in tensors.values())
    assert embedding.n_bytes > 0


def test_the_table_and_the_json_say_what_was_measured(tiny_gguf: Path) -> None:
    measured = bench(tiny_gguf, threads=1, prompt_tokens=33, new_tokens=17, rounds=2)

    found = json.loads(measured.to_json())
    assert (found["file"], found["prompt_tokens"], found["new_tokens"]) == ("tiny.gguf", 33, 17)
    assert min(found["prefill_tokens_per_second"], found["decode_tokens_per_second"]) > 0
    assert found["share_of_bandwidth"] == pytest.approx(
        found["decode_tokens_per_second"] * found["bytes_per_token"] / found["bandwidth_bytes_per_second"]
    )
    assert f"prefill           {measured.prefill_tokens_per_second:.1f} tokens/s (33 tokens)" in str(measured)


def test_measuring_bandwidth_leaves_the_threads_of_torch_alone() -> None:
    before = torch.get_num_threads()

    assert memory_bandwidth(threads=before + 1, num_bytes=2**16, passes=1) > 0
    assert torch.get_num_threads() == before


def test_more_tokens_than_positions_are_refused(tiny_gguf: Path) -> None:
    with pytest.raises(UserError, match=r"bench: more tokens .* the model has 256"):
        bench(tiny_gguf, prompt_tokens=256)
