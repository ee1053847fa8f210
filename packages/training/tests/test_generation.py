"""What is generated is what training computes: the same masks, the same shift, with and without a cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper

from bitnet_arch import BlockDiffusion, convert_to_bitnet, set_block_diffusion, set_quant_amount
from bitnet_arch.testing import TINY_MODELS, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen3
from data_handler import Batch
from durable import UserError
from wrinklefree.generation import Decoding, Prefix, generate_ids, stream_ids
from wrinklefree.generation.choice import likeliest
from wrinklefree.objectives.states import decoder_states
from wrinklefree.objectives.views import MaskedViews, ViewPlan

MASK, BLOCK, SUB_BLOCK = 7, 8, 4
PROMPT = [5, 93, 211, 400, 17, 68, 301, 44, 120, 9, 33]
"""One block, and three tokens of the next."""
THRESHOLD = 0.04
"""Random models are sure of little; with this one some looks take several tokens, some one."""
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "gemma3": lambda: tiny_gemma3(sliding_window=8),
    "mistral": tiny_mistral,
}


def opened(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Ternary layers at λ = 0, and a [MASK]."""
    model = build()
    with torch.no_grad():  # fresh weights are small: nearly every token would be followed by itself
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    convert_to_bitnet(model)
    set_quant_amount(model, 0.0)
    set_block_diffusion(model, BlockDiffusion(mask_token_id=MASK, block_size=BLOCK))
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = [MASK]
    model.eval()
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return opened(FAMILIES[request.param])


@dataclass(frozen=True)
class Look:
    """A forward in which tokens of a block were open, and what came out at the block."""

    block: list[int]
    logits: Tensor
    """[tokens, V]."""


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[tuple[list[int], Tensor]]]:
    """Every forward's tokens and logits."""
    seen: list[tuple[list[int], Tensor]] = []

    def see(module: torch.nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> None:
        seen.append((inputs["input_ids"][0].tolist(), output.logits[0].clone()))

    hook = model.register_forward_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def training_forward(model: PreTrainedModel, tokens: list[int], start: int, block: list[int]) -> Tensor:
    """[2 T, V]: logits of the clean tokens and of a masked view in which `block` stands at `start`.

    What is open in the block is some other token in the clean part, as it is not known yet.
    """
    clean = [*tokens[:start], *(token if token != MASK else 500 for token in block)]
    input_ids, places = torch.tensor([clean]), torch.arange(len(clean))[None]
    masked = torch.tensor([[False] * start + [token == MASK for token in block]])
    batch = Batch(
        input_ids, input_ids, places, torch.zeros_like(places), torch.tensor([0]), torch.tensor([0])
    )
    views = MaskedViews((masked,), (torch.ones_like(masked, dtype=torch.float64),))
    plan = ViewPlan(block_size=BLOCK, complementary=False)
    return decoder_states(model, batch, views=views, plan=plan).logits[0]


def expected_by_training(
    model: PreTrainedModel, num_new: int, threshold: float
) -> tuple[list[int], list[Look], list[Tensor]]:
    """Block diffusion written down once more, greedily, with uncached forwards of training alone.

    Gives the tokens, all looks, and the logits [V] that first tokens of blocks came from.
    """
    tokens, looks, firsts = list(PROMPT), [], []
    while len(tokens) < len(PROMPT) + num_new:
        start = len(tokens) // BLOCK * BLOCK
        block = (tokens[start:] + [MASK] * BLOCK)[:BLOCK]
        if block[0] == MASK:
            logits_LV = training_forward(model, tokens, start, [MASK] * BLOCK)
            firsts.append(logits_LV[start - 1])
            block[0] = int(firsts[-1].argmax())
        for sub_end in range(SUB_BLOCK, BLOCK + 1, SUB_BLOCK):
            while MASK in block[: min(sub_end, len(PROMPT) + num_new - start)]:
                view_LV = training_forward(model, tokens, start, block)[start + BLOCK :]
                looks.append(Look(list(block), view_LV[start:]))
                wanted = min(sub_end, len(PROMPT) + num_new - start)
                open_places = [place for place in range(wanted) if block[place] == MASK]
                # The token at a place is predicted one place before it.
                sure = {place: view_LV[start + place - 1].softmax(-1).max() for place in open_places}
                surest = max(open_places, key=lambda place: float(sure[place]))
                for place in open_places:
                    if place == surest or sure[place] > threshold:
                        block[place] = int(view_LV[start + place - 1].argmax())
        tokens = tokens[:start] + [token for token in block if token != MASK]
    return tokens[len(PROMPT) :][:num_new], looks, firsts


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_diffusion_sees_what_training_sees(model: PreTrainedModel, prefix_cache: bool) -> None:
    num_new = 20
    expected, looks, firsts = expected_by_training(model, num_new, THRESHOLD)
    decoding = Decoding(
        mode="diffusion",
        max_new_tokens=num_new,
        threshold=THRESHOLD,
        sub_block=SUB_BLOCK,
        prefix_cache=prefix_cache,
    )

    with watched(model) as seen:
        found = generate_ids(model, PROMPT, decoding, ends=())

    assert found.tokens == expected
    assert found.num_forwards == len(seen)
    assert len(looks) < num_new - len(firsts), "no look took several tokens: the threshold tests nothing"
    seen_looks = [(tokens[-BLOCK:], logits_LV) for tokens, logits_LV in seen if len(logits_LV) > 1]
    assert [tokens for tokens, _ in seen_looks] == [look.block for look in looks]
    for (_, found_LV), look in zip(seen_looks, looks, strict=True):
        assert_same_logits(found_LV, look.logits)
    # The first read is the prompt's whole block, of which nothing is predicted.
    seen_reads = [logits_LV[-1] for _, logits_LV in seen if len(logits_LV) == 1][1:]
    assert len(seen_reads) == len(firsts)
    for found_V, first_V in zip(seen_reads, firsts, strict=True):
        assert_same_logits(found_V, first_V)


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    """But for [MASK], which training leaves out."""
    expected = expected.index_fill(-1, torch.tensor([MASK]), 0.0)
    torch.testing.assert_close(found.index_fill(-1, torch.tensor([MASK]), 0.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT[:8], PROMPT], ids=len)
def test_a_text_ends_where_it_ends_in_longer_ones(prompt: list[int]) -> None:
    """What is decoded in a later block changes nothing before it."""
    model = opened(tiny_llama)
    tokens = [
        generate_ids(model, prompt, Decoding(mode="diffusion", max_new_tokens=count, threshold=1.0), ends=())
        for count in (3 * BLOCK - len(prompt), 4 * BLOCK - len(prompt))
    ]

    assert tokens[1].tokens[: len(tokens[0].tokens)] == tokens[0].tokens
    assert len(tokens[1].tokens) == len(tokens[0].tokens) + BLOCK


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_a_token_that_ends_a_text_is_the_last(mode: Any) -> None:
    model = opened(tiny_llama)
    decoding = Decoding(mode=mode, max_new_tokens=30, threshold=THRESHOLD, temperature=1.0)
    whole = generate_ids(model, PROMPT, decoding, ends=()).tokens
    end = next(token for token in whole[4:] if token not in whole[:4])

    found = generate_ids(model, PROMPT, decoding, ends={end}).tokens

    assert len(whole) == 30
    assert found == whole[: whole.index(end) + 1]


def test_mask_is_never_produced() -> None:
    model = opened(lambda: tiny_llama(tie_word_embeddings=False))
    with torch.no_grad():  # a head that wants nothing else
        model.get_output_embeddings().weight[MASK] = 100 * model.get_output_embeddings().weight.mean(0)
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = None

    for mode in ("ar", "diffusion"):
        for temperature in (0.0, 5.0):
            decoding = Decoding(mode=mode, max_new_tokens=40, temperature=temperature)
            found = generate_ids(model, PROMPT, decoding, ends=()).tokens

            assert MASK not in found
            assert len(found) == 40


@pytest.mark.parametrize("family", TINY_MODELS)
def test_token_after_token_is_what_transformers_generates(family: str) -> None:
    model = opened(TINY_MODELS[family])
    expected: Tensor = model.generate(  # type: ignore[operator]
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=None
    )

    found = generate_ids(model, PROMPT, Decoding(max_new_tokens=12), ends=())

    assert found.tokens == expected[0, len(PROMPT) :].tolist()
    assert found.tokens_per_forward == 1
    end = found.tokens[5]
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [end]
    assert generate_ids(model, PROMPT).tokens == found.tokens[: found.tokens.index(end) + 1]


def test_draws_are_those_of_the_filtered_distribution() -> None:
    model = opened(tiny_llama)
    generator = torch.Generator().manual_seed(3)
    temperature, top_p = TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.4)
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(10):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1]
            logits[:, MASK] = -torch.inf
            wanted = top_p(None, temperature(None, logits)).softmax(-1)
            tokens.append(int(torch.multinomial(wanted, 1, generator=generator)))
    state = torch.get_rng_state()

    decoding = Decoding(max_new_tokens=10, temperature=1.3, top_p=0.4, seed=3)
    found = generate_ids(model, PROMPT, decoding, ends=())

    assert found.tokens == tokens[len(PROMPT) :]
    assert generate_ids(model, PROMPT, decoding, ends=()) == found
    assert torch.equal(torch.get_rng_state(), state)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probability = torch.tensor([[0.1, 0.5, 0.15, 0.25]])

    torch.testing.assert_close(likeliest(probability, 0.7), torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    torch.testing.assert_close(likeliest(probability, 1e-9), torch.tensor([[0.0, 1, 0, 0]]))
    torch.testing.assert_close(likeliest(probability, 1.0), probability)


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_what_was_read_is_not_read_again(mode: Any) -> None:
    model = opened(lambda: tiny_gemma3(sliding_window=8))
    decoding = Decoding(mode=mode, max_new_tokens=14, threshold=THRESHOLD)
    prefix = Prefix(model)
    answer = [token for new in stream_ids(prefix, PROMPT, decoding, ends=()) for token in new]
    # As a chat template may: what was cached goes on differently from here.
    longer = [*PROMPT, *answer[:-2], 3, 1, 4, 1, 5, 9]

    with watched(model) as seen:
        found = [token for new in stream_ids(prefix, longer, decoding, ends=()) for token in new]

    assert found == generate_ids(model, longer, decoding, ends=()).tokens
    num_known = {"ar": len(PROMPT) + 12, "diffusion": len(longer) // BLOCK * BLOCK - BLOCK}[mode]
    assert len(seen[0][0]) <= len(longer) - num_known


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_a_forward_that_was_stopped_leaves_no_half_read_tokens(stopped_at: int) -> None:
    model = opened(tiny_llama)
    prefix = Prefix(model)
    expected = prefix.read(PROMPT)

    def stop(module: torch.nn.Module, args: Any, output: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[stopped_at].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prefix.read([1, 2, 3])
    hook.remove()

    assert prefix.tokens == []
    torch.testing.assert_close(prefix.read(PROMPT), expected)


@pytest.mark.parametrize(
    ("decoding", "said"),
    [
        (Decoding(max_new_tokens=246), "max-new-tokens: .*give 245 or less"),
        (Decoding(mode="diffusion", sub_block=3), "sub-block: does not divide.*found 3, they have 8"),
    ],
)
def test_what_a_model_cannot_do_is_said(decoding: Decoding, said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate_ids(opened(tiny_llama), PROMPT, decoding)


def test_prompts_that_do_not_fit_are_refused() -> None:
    model = opened(tiny_llama)

    for prompt, said in (([], "no tokens"), ([3] * 256, "positions"), ([512], "does not know")):
        with pytest.raises(UserError, match=said):
            generate_ids(model, prompt)
    assert len(generate_ids(model, [3] * 250, ends=()).tokens) == 6
    assert len(generate_ids(model, [3] * 250, Decoding(mode="diffusion"), ends=()).tokens) == 6
    with pytest.raises(UserError, match=r"no \[MASK\]"):
        generate_ids(tiny_llama(), PROMPT, Decoding(mode="diffusion"))
