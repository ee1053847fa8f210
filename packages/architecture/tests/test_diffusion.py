"""[MASK]: which token it is, what its embedding starts as, and that a checkpoint remembers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_arch import (
    BlockDiffusion,
    add_mask_token,
    block_diffusion_of,
    convert_to_bitnet,
    load_bitnet,
    save_bitnet,
    set_block_diffusion,
    start_mask_at_mean,
)
from bitnet_arch.record import read_record
from bitnet_arch.testing import tiny_llama, tiny_qwen2
from durable import UserError

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_row_is_added_behind_the_vocabulary_and_changes_no_logit(is_tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=is_tied)
    tokens = torch.arange(20)[None]
    before = model(tokens).logits.detach()
    mean = model.get_parameter(EMBEDDING).detach().mean(0)

    mask = add_mask_token(model)

    assert mask == before.shape[-1] == model.config.vocab_size - 1
    torch.testing.assert_close(model(tokens).logits[..., :mask], before, rtol=0, atol=0)
    torch.testing.assert_close(model.get_parameter(EMBEDDING)[mask], mean, rtol=0, atol=1e-6)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    if not is_tied:
        assert not model.lm_head.weight[mask].any()


def test_a_token_that_is_there_starts_at_the_mean_of_the_others() -> None:
    model = tiny_qwen2()
    weight = model.get_parameter(EMBEDDING).detach().clone()

    start_mask_at_mean(model, 7)

    after = model.get_parameter(EMBEDDING).detach()
    others = torch.arange(len(weight)) != 7
    torch.testing.assert_close(after[7], weight[others].mean(0), rtol=0, atol=1e-6)
    assert torch.equal(after[others], weight[others])


@pytest.mark.parametrize("layout", ["training", "stock"])
def test_a_checkpoint_remembers_the_token_its_row_and_the_block_size(layout: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    set_block_diffusion(model, BlockDiffusion(mask_token_id=add_mask_token(model), block_size=16))
    convert_to_bitnet(model)
    with torch.no_grad():
        model.get_parameter(EMBEDDING)[-1] += 0.5  # as training does

    loaded = load_bitnet(save_bitnet(model, tmp_path / "model", layout=layout))

    assert block_diffusion_of(loaded) == BlockDiffusion(mask_token_id=512, block_size=16)
    assert torch.equal(loaded.get_parameter(EMBEDDING), model.get_parameter(EMBEDDING))
    record = json.loads((tmp_path / "model" / "bitnet.json").read_text())
    assert record["diffusion"] == {"mask_token_id": 512, "block_size": 16}


def test_a_record_from_before_there_was_diffusion_is_read(tmp_path: Path) -> None:
    model = tiny_llama()
    convert_to_bitnet(model)
    save_bitnet(model, tmp_path / "model")
    path = tmp_path / "model" / "bitnet.json"
    content = json.loads(path.read_text())
    del content["diffusion"]
    path.write_text(json.dumps(content))

    assert read_record(tmp_path / "model").diffusion is None


@pytest.mark.parametrize("mask_token_id", [-1, 512])
def test_an_id_outside_the_vocabulary_is_one_line(mask_token_id: int) -> None:
    with pytest.raises(UserError, match="the model has 512 tokens"):
        set_block_diffusion(tiny_llama(), BlockDiffusion(mask_token_id=mask_token_id, block_size=8))
