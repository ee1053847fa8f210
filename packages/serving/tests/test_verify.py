"""`verify` on a model that was trained, because a random one hides faults: what it predicts hardly depends on
where attention looks.

Each planted fault is first shown to matter: it moves what PyTorch itself predicts, with float activations,
by ten times of what `verify` allows. Then it goes into the file, and the engine's predictions give it away.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.activations import ACT2FN
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bitnet_arch import ConversionConfig, convert_to_bitnet, load_bitnet, save_bitnet
from bitnet_arch.bitlinear import bitlinears
from bitnet_arch.packed import PackedBitLinear
from bitnet_arch.testing import tiny_llama
from bitnet_serving.cli import main
from bitnet_serving.divergence import kl, kl_to_top
from bitnet_serving.encoding import decode_dense, decode_ternary, encode_dense
from bitnet_serving.engine import Engine, TopLogProbs
from bitnet_serving.engine_check import EngineCheck, compare
from bitnet_serving.export import export_gguf
from bitnet_serving.file_tensors import encode_codes
from bitnet_serving.formats import TERNARY_FORMATS
from bitnet_serving.gguf_reader import read_gguf
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from bitnet_serving.reference import Reference, float_activations
from bitnet_serving.verify import verify_gguf
from durable import ExitCode, UserError

POSITIONS = 64
EPS, WRONG_EPS = 1e-5, 1e-3
ROPE_BASE, WRONG_ROPE_BASE = 1e4, 1e3
BODIES = ("f16", "tq2_0")


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one merge because engines want one."""
    vocabulary = [*bytes_to_unicode().values(), "ĠĠ", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, [("Ġ", "Ġ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def repetitions(length: int, *, seed: int) -> str:
    """Words of five letters, each said a few times: whoever looks five letters back knows the next one."""
    rng = random.Random(seed)
    text = ""
    while len(text) < length:
        text += "".join(rng.choices("abcdefgh", k=5)) * rng.randint(3, 8)
    return text[:length]


@pytest.fixture(scope="module")
def text() -> str:
    return repetitions(3 * POSITIONS, seed=7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained until it repeats words: a few seconds. Codes and scales, so that a test can change them."""
    model = tiny_llama(
        vocab_size=258,
        hidden_size=256,
        intermediate_size=256,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        max_position_embeddings=512,
    )
    convert_to_bitnet(model, ConversionConfig(subln="none"))
    tokens = torch.tensor(tokenizer().encode(repetitions(20_000, seed=0)))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(80):
        begins = torch.randint(len(tokens) - 64, (4,), generator=generator).tolist()
        batch = torch.stack([tokens[begin : begin + 64] for begin in begins])
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / 80)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Without a look back it would be the entropy of eight letters, 2.08.
    assert loss.item() < 1.4, "the model has not learned to look back"
    model.eval()
    directory = tmp_path_factory.mktemp("trained") / "model"
    return save_bitnet(model, directory, layout="stock", packed=True, tokenizer=tokenizer())


@pytest.fixture(scope="module", params=BODIES)
def gguf_path(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("exported") / f"{request.param}.gguf"
    export_gguf(checkpoint, path, body=request.param)
    return path


@dataclass(frozen=True)
class Fault:
    """A mistake, in PyTorch's model and in a file."""

    in_model: Callable[[Any], object]
    values: Callable[[str, Tensor], Tensor] | None = None
    """Name and float values of a matrix, or of codes."""
    scale: float = 1.0
    metadata: dict[str, Any] | None = None
    new_head: bool = False
    row: str = "codes"
    """Where the comparison of bytes shows it."""


def permuted(values: Tensor, *, num_heads: int) -> Tensor:
    """From halves to neighbours once more."""
    halves: Tensor = values.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(values.shape)


def each_weight(change: Callable[[str, Tensor], Tensor]) -> Callable[[Any], None]:
    """Change the codes of ternary layers, which are given as `blk.0.attn_q.weight` would name them."""
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }

    def apply(model: PreTrainedModel) -> None:
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in names:
                layer, leaf = path.split(".")[2], names[path.rpartition(".")[2]]
                module.weight.copy_(change(f"blk.{layer}.{leaf}.weight", module.weight.clone()))

    return apply


def wrong_order(name: str, values: Tensor) -> Tensor:
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2])
    return values if heads is None else permuted(values, num_heads=heads)


def shifted_codes(name: str, values: Tensor) -> Tensor:
    return values.roll(1, dims=1) if name == "blk.1.ffn_down.weight" else values


def without_tail(name: str, values: Tensor) -> Tensor:
    """As where a block does not divide the row, and the rest is not multiplied."""
    if name.startswith("blk."):
        values[:, -64:] = 0
    return values


def scaled(factor: float) -> Callable[[Any], None]:
    def apply(model: PreTrainedModel) -> None:
        for layer in bitlinears(model):
            assert isinstance(layer, PackedBitLinear)
            layer.weight_scale.mul_(factor)

    return apply


def use_relu2(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN["relu2"]


def other_head() -> Tensor:
    return 0.02 * torch.randn(258, 256, generator=torch.Generator().manual_seed(5))


def untie(model: PreTrainedModel) -> None:
    model.lm_head.weight = torch.nn.Parameter(other_head())


def use_wrong_eps(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.__dict__["variance_epsilon"] = WRONG_EPS


def use_wrong_rope_base(model: PreTrainedModel) -> None:
    rotary = model.model.rotary_emb
    exponents = torch.arange(0, 64, 2) / 64
    rotary.inv_freq.copy_(WRONG_ROPE_BASE**-exponents)


FAULTS = {
    "q and k in another order": Fault(each_weight(wrong_order), wrong_order),
    "scale times 0.69": Fault(scaled(0.69), scale=0.69, row="scales"),
    "codes of a layer shifted": Fault(each_weight(shifted_codes), shifted_codes),
    "tail of rows dropped": Fault(each_weight(without_tail), without_tail),
    "a head of its own": Fault(untie, new_head=True, row="tensors"),
    "wrong eps": Fault(
        use_wrong_eps, metadata={"llama.attention.layer_norm_rms_epsilon": WRONG_EPS}, row="metadata"
    ),
    "wrong rope base": Fault(
        use_wrong_rope_base, metadata={"llama.rope.freq_base": WRONG_ROPE_BASE}, row="metadata"
    ),
}


def rewrite(path: Path, out: Path, fault: Fault) -> None:
    """A copy of a file with a fault in it."""
    file = read_gguf(path)
    tensors = []
    for name, tensor in file.tensors.items():
        form = tensor.block_format.name
        data = file.data(name)
        if form in TERNARY_FORMATS:
            codes, scales = decode_ternary(form, data, *tensor.shape)
            codes = fault.values(name, codes) if fault.values else codes
            data = encode_codes(form, codes, float(scales[0]) * fault.scale)
        elif name.startswith("blk.") and len(tensor.shape) == 2:
            values = decode_dense(form, data, *tensor.shape)
            values = fault.values(name, values) if fault.values else values
            data = encode_dense(form, values * fault.scale)
        tensors.append(
            TensorToWrite(name=name, format=form, shape=tensor.shape, produce=partial(torch.clone, data))
        )
    if fault.new_head:
        head = other_head()
        tensors.append(
            TensorToWrite(
                name="output.weight",
                format="f16",
                shape=(258, 256),
                produce=lambda: encode_dense("f16", head),
            )
        )
    write_gguf(out, {**file.metadata, **(fault.metadata or {})}, tensors)


@pytest.fixture(scope="module")
def ids(text: str) -> Tensor:
    return torch.tensor([tokenizer().encode(text)[:POSITIONS]])


@torch.no_grad()
def log_probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits[0].double().log_softmax(-1)


def how_far_pytorch_moves(checkpoint: Path, ids: Tensor, change: Callable[[Any], object]) -> float:
    """KL between the model as it is and with a change, both with float activations."""
    model = load_bitnet(checkpoint)
    with float_activations(model):
        right = log_probs(model, ids)
    with torch.no_grad():
        change(model)
    with float_activations(model):
        wrong = log_probs(model, ids)
    return float(kl(right, wrong).mean())


def test_an_export_is_proven(gguf_path: Path, checkpoint: Path, text: str) -> None:
    verification = verify_gguf(gguf_path, checkpoint, positions=POSITIONS, text=text)

    assert verification.ok, str(verification)
    assert verification.exit_code == 0
    assert verification.engine is not None
    assert (verification.engine.num_positions, verification.engine.num_named) == (POSITIONS, 258)
    assert 0 < verification.engine.kl <= verification.engine.largest_kl


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_what_the_engine_predicts(
    name: str, gguf_path: Path, checkpoint: Path, text: str, ids: Tensor, tmp_path: Path
) -> None:
    fault = FAULTS[name]
    rewrite(gguf_path, tmp_path / "bad.gguf", fault)

    verification = verify_gguf(tmp_path / "bad.gguf", checkpoint, positions=POSITIONS, text=text)

    moved = how_far_pytorch_moves(checkpoint, ids, fault.in_model)
    assert verification.engine is not None
    assert moved >= 10 * verification.engine.largest_kl, "too small a fault to show anything"
    assert verification.engine.kl > verification.engine.largest_kl, "the engine did not see it"
    # With float activations PyTorch is as far from itself as the engine is.
    assert verification.engine.kl == pytest.approx(moved, rel=0.1)
    assert verification.exit_code == ExitCode.BAD_DATA
    assert verification.row(fault.row).ok is False, "its bytes did not show it"


def test_relu2_in_a_graph_with_silu_is_found(
    checkpoint: Path, text: str, ids: Tensor, tmp_path: Path
) -> None:
    """The file was written from the same weights when they still had SiLU."""
    export_gguf(checkpoint, tmp_path / "silu.gguf", body="f16")
    model = load_bitnet(checkpoint)
    use_relu2(model)
    model.config.hidden_act = "relu2"
    other = save_bitnet(model, tmp_path / "relu2", layout="stock", packed=True, tokenizer=tokenizer())

    verification = verify_gguf(tmp_path / "silu.gguf", other, positions=POSITIONS, text=text)

    assert verification.engine is not None
    moved = how_far_pytorch_moves(checkpoint, ids, use_relu2)
    assert moved >= 10 * verification.engine.largest_kl
    assert verification.engine.kl > verification.engine.largest_kl
    assert verification.row("architecture").ok is False
    assert verification.exit_code == ExitCode.BAD_DATA


def test_what_no_engine_here_runs_is_proven_by_its_bytes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "microsoft.gguf"
    export_gguf(checkpoint, path, body="i2_s")

    verification = verify_gguf(path, checkpoint)

    assert verification.ok
    assert verification.row("codes").ok
    assert "bytes proven, engine not run" in str(verification)
    arguments = ["verify", str(path), "--checkpoint", str(checkpoint)]
    assert main(argv=arguments) == 0
    assert main(argv=[*arguments, "--require-engine"]) == ExitCode.BAD_DATA
    assert capsys.readouterr().out.count("engine not run") == 2


def test_a_code_that_i2_s_has_wrong_is_found_without_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    export_gguf(checkpoint, tmp_path / "right.gguf", body="i2_s")
    rewrite(tmp_path / "right.gguf", tmp_path / "wrong.gguf", FAULTS["codes of a layer shifted"])

    verification = verify_gguf(tmp_path / "wrong.gguf", checkpoint)

    assert verification.exit_code == ExitCode.BAD_DATA
    assert "blk.1.ffn_down.weight" in str(verification)


def test_the_command_prints_a_table_or_json(
    checkpoint: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "model.gguf", tmp_path / "page.txt"
    export_gguf(checkpoint, path, body="f16")
    page.write_text(text)
    arguments = [
        "verify",
        str(path),
        "--checkpoint",
        str(checkpoint),
        "--text",
        str(page),
        "--positions",
        "8",
    ]

    assert main(argv=arguments) == 0
    table = capsys.readouterr().out
    assert main(argv=[*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)

    assert "KL to float           ok" in table
    assert "the engine predicts what PyTorch predicts" in table
    assert (content["ok"], content["engine"]["num_positions"]) == (True, 8)


def test_a_text_with_too_few_tokens_is_refused(gguf_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="too short"):
        verify_gguf(gguf_path, checkpoint, positions=8, text="abc")


@pytest.mark.parametrize("lost", ["a position", "a token"])
def test_fewer_answers_than_asked_for_are_a_failure(
    lost: str, gguf_path: Path, checkpoint: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Engine.next_log_probs

    def less(self: Engine, *arguments: Any) -> list[TopLogProbs]:
        whole = answer(self, *arguments)
        if lost == "a position":
            return whole[:-1]
        return [*whole[:-1], TopLogProbs(whole[-1].ids[:-1], whole[-1].log_probs[:-1])]

    monkeypatch.setattr(Engine, "next_log_probs", less)

    with pytest.raises(UserError, match="less than was asked for"):
        verify_gguf(gguf_path, checkpoint, positions=8, text=text)


def test_one_bucket_holds_the_tokens_that_the_engine_does_not_name() -> None:
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=torch.float64)
    named = TopLogProbs([1, 0], q[0, [1, 0]].log().tolist())

    # Σ p log(p/q) over token 0, token 1 and both others together
    expected = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3) + 0.3 * math.log(0.3 / 0.3)

    assert float(kl_to_top(p.log(), [named])) == pytest.approx(expected, rel=1e-9)


def test_another_favourite_counts_only_where_the_model_is_sure() -> None:
    """Gaps of 4 and 0.2 between two tokens; the engine is off by 0.1 everywhere, or swaps the first two."""
    right = torch.tensor([[4.0, 0.0]] * 99 + [[0.1, 0.0]], dtype=torch.float64).log_softmax(-1)
    reference = Reference(int8=right, float=right)
    top = [TopLogProbs([0, 1], row.tolist()) for row in right]
    unsure_swapped = [*top[:-1], TopLogProbs([1, 0], right[-1].tolist())]
    sure_swapped = [TopLogProbs([1, 0], right[0].tolist()), *top[1:]]

    # One swap in a hundred: errors of 0.1·√(1/100) and 4·√(1/100), so gaps from 0.05 and from 2 on are clear.
    assert _clear(compare(reference, unsure_swapped, is_float=True)) == (100, 1)
    assert _clear(compare(reference, sure_swapped, is_float=True)) == (99, 1)
    all_unsure = Reference(int8=right[-1:], float=right[-1:])
    assert _clear(compare(all_unsure, unsure_swapped[-1:], is_float=True)) == (0, 0)


def _clear(check: EngineCheck) -> tuple[int, int]:
    return check.num_clear, check.num_clear_missed
