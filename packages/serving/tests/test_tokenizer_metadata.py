"""The engine splits text into the very ids that transformers gives, or the tokenizer is refused.

Small tokenizers are trained here, in the pipelines that models have; the engine reads a model of zeros.
"""

import json
import random
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import processors as post
from transformers import PreTrainedTokenizerFast

from bitnet_serving.encoding import encode_dense
from bitnet_serving.engine import Engine
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from bitnet_serving.tokenizer_metadata import TokenizerMetadata, read_tokenizer
from durable import UserError

Content = dict[str, Any]
TEXT = (
    "the and of hello World don't I'LL we've naïve Straße größer Ελληνικά русский язык 你好 世界 日本語 "
    "テスト 한국어 עברית العربية हिन्दी ไทย 😀 👩\u200d👩\u200d👧 🇩🇪 e\u0301 "
    "ﬁ Ǆ 𝔘𝔫𝔦 x=1 def foo(bar): return {} [] -> != // /* */ <div> </div> 0 7 42 1234 3.14159 1e-10 0xFF "
    "½ ٣ ４２ … — “q” '' \" \\n $ % & # @ ~ ^ ` | _ __init__"
)
WORDS = TEXT.split(" ")
GAPS = [
    *" \n\t\r\x0b\x0c\x85\u00a0\u2009\u3000",
    "  ",
    "   ",
    "\n\n",
    "\r\n",
    " \n ",
    "\n  \n",
    " " * 8,
    "",
    "",
]
CONTROLS = [*"\x01\x7f\u200b\u200d\ufeff\u2028\u00ad▁Ġ", "\x1b[0m", "▁▁", "<0x0A>"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<s>", "</s>", "<unk>", "<extra>"]
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x400, 0x4FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F64F), (0x900, 0x97F)]


def mixed_strings(count: int) -> list[str]:
    """Code, umlauts, CJK, emoji, spaces, digits, control characters, the texts of special tokens."""
    draw = random.Random(0)

    def part() -> str:
        kind = draw.choices(["word", "control", "special", "random"], [62, 8, 5, 25])[0]
        if kind == "random":
            return "".join(chr(draw.randint(*draw.choice(RANGES))) for _ in range(draw.randint(1, 6)))
        known: str = draw.choice({"word": WORDS, "control": CONTROLS, "special": SPECIALS}[kind])
        return known

    edges = ["", " ", "\n\n\n", " a", "a ", "  lead", "trail  ", "1234567890", "don't DON'T 'S's", " \n \n x"]
    strings = ["".join(part() + draw.choice(GAPS) for _ in range(draw.randint(1, 12))) for _ in range(count)]
    return [*edges, *strings][:count]


def corpus(gap: str = "\n") -> list[str]:
    draw = random.Random(1)
    return [" ".join(draw.choice(WORDS) for _ in range(12)) + gap + "    x  =  1" + gap for _ in range(1500)]


def byte_level(pre: Any, *, normalizer: Any = None, ignore_merges: bool = False) -> Content:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    content: Content = json.loads(tokenizer.to_str())
    return content


def sentencepiece(*, prefix: bool, all_pairs: bool, gap: str = "\n") -> Content:
    """`all_pairs` as transformers has vocabularies that came from SentencePiece: whatever makes a token is a
    merge.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=8,
    )
    tokenizer.train_from_iterator(corpus(gap), trainer)
    tokenizer.post_processor = post.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    content: Content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] < 3]
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    if all_pairs:
        made = dict.fromkeys(left + right for left, right in merges)
        splits = [[(text[:n], text[n:]) for n in range(1, len(text))] for text in made]
        content["model"]["merges"] = [
            [left, right] for each in splits for left, right in each if left in vocab and right in vocab
        ]
    return content


def split_by(regex: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_only()])


def bytes_only() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])


# As the tokenizer.json files of Qwen 2 and 3, Qwen 3.5 and Llama 3 have them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MATCHED: dict[str, tuple[str, Callable[[], Content]]] = {
    "gpt-2": ("gpt-2", lambda: byte_level(gpt2())),
    "smollm": ("smollm", lambda: byte_level(smollm())),
    "qwen2": ("qwen2", lambda: byte_level(split_by(QWEN2))),
    "qwen35": ("qwen35", lambda: byte_level(split_by(QWEN35))),
    "llama3": ("llama-bpe", lambda: byte_level(split_by(LLAMA3), ignore_merges=True)),
    "llama3, merging": ("smaug-bpe", lambda: byte_level(split_by(LLAMA3))),
    "llama": ("llama", lambda: sentencepiece(prefix=True, all_pairs=True)),
    "gemma": ("llama", lambda: sentencepiece(prefix=False, all_pairs=True)),
    "gemma, merging": ("sarvam-moe", lambda: sentencepiece(prefix=False, all_pairs=False, gap="")),
}
"""Pipeline → the engine's name for it and how to train one."""
FAST = ("gpt-2", "gemma")


@pytest.mark.parametrize(
    "pipeline", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MATCHED]
)
def test_the_engine_gives_the_ids_that_transformers_gives(tmp_path: Path, pipeline: str) -> None:
    name, train = MATCHED[pipeline]
    tokenizer = save(tmp_path, train())
    texts = mixed_strings(1000)

    written = write_model(tmp_path)
    with Engine(tmp_path / "model.gguf", context=32) as engine:
        found = engine.tokenize(texts, add_special=True)

    assert name in written.kind
    assert not written.notes
    different = [text for text, ids in zip(texts, found, strict=True) if tokenizer(text)["input_ids"] != ids]
    assert not different, f"{len(different)}, such as {different[0]!r}"


@pytest.mark.slow
def test_composed_text_needs_no_normaliser(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level(split_by(QWEN2), normalizer=normalizers.NFC()))
    texts = [unicodedata.normalize("NFC", text) for text in mixed_strings(300)]

    written = write_model(tmp_path)
    with Engine(tmp_path / "model.gguf", context=32) as engine:
        found = engine.tokenize(texts, add_special=True)

    assert "NFC" in written.notes[0]
    assert found == [tokenizer(text)["input_ids"] for text in texts]


def without(content: Content, **changes: Any) -> Content:
    return content | changes


REFUSED: dict[str, tuple[Callable[[], Content], str]] = {
    "a space in front": (
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "add_prefix_space",
    ),
    "words taken whole": (lambda: byte_level(gpt2(), ignore_merges=True), "ignore_merges True"),
    "another expression": (lambda: byte_level(split_by(r"\p{L}+|\P{L}+")), r"\\p{L}+"),
    "a normaliser": (lambda: byte_level(gpt2(), normalizer=normalizers.Lowercase()), "Lowercase"),
    "a prefix and few merges": (lambda: sentencepiece(prefix=True, all_pairs=False), "only some pairs"),
    "line ends in tokens": (lambda: sentencepiece(prefix=False, all_pairs=False), r"\n"),
    "metaspace": (
        lambda: without(
            sentencepiece(prefix=False, all_pairs=True),
            normalizer=None,
            pre_tokenizer={
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "first",
                "split": False,
            },
        ),
        "Metaspace",
    ),
    "a token that eats spaces": (
        lambda: (
            (content := byte_level(gpt2()))
            | {"added_tokens": [content["added_tokens"][0] | {"lstrip": True}, *content["added_tokens"][1:]]}
        ),
        "<|endoftext|> with lstrip",
    ),
    "unigrams": (
        lambda: without(byte_level(gpt2()), model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}),
        "vocabulary",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_pipeline_that_no_engine_has_is_refused_and_named(tmp_path: Path, reason: str) -> None:
    make, named = REFUSED[reason]
    (tmp_path / "tokenizer.json").write_text(json.dumps(make()))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')

    with pytest.raises(UserError) as refused:
        read_tokenizer(tmp_path, vocab_size=2000)

    assert refused.value.exit_code == 4
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.unlink(), "--tokenizer DIR"),
        (lambda path: path.write_text("{"), "cannot be read"),
        (lambda path: path.write_text("[]"), "cannot be read"),
        (lambda path: path.with_name("tokenizer_config.json").unlink(), "no eos_token"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    save(tmp_path, byte_level(gpt2()))
    damage(tmp_path / "tokenizer.json")

    with pytest.raises(UserError, match=named):
        read_tokenizer(tmp_path, vocab_size=2000)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    save(tmp_path, byte_level(gpt2()))

    with pytest.raises(UserError, match="more tokens than the model has rows"):
        read_tokenizer(tmp_path, vocab_size=300)


def save(directory: Path, content: Content) -> PreTrainedTokenizerFast:
    """As a checkpoint has it; gives transformers' own, read from there."""
    is_sentencepiece = content["model"]["byte_fallback"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<s>", "eos_token": "</s>"} if is_sentencepiece else {"eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names
        )
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(directory)
    return tokenizer


def write_model(directory: Path) -> TokenizerMetadata:
    """A Llama of zeros with three rows more than the tokenizer has tokens."""
    rows = len(PreTrainedTokenizerFast.from_pretrained(directory)) + 3
    text = read_tokenizer(directory, vocab_size=rows)
    sizes = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in sizes.items()}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {
        "token_embd": (rows, 32),
        "output_norm": (32,),
        **{f"blk.0.{role}": (32, 32) for role in matrices},
        **{f"blk.0.{role}": (32,) for role in ("attn_norm", "ffn_norm")},
    }
    tensors = [
        TensorToWrite(
            name=f"{name}.weight",
            format="f32",
            shape=shape,
            produce=partial(encode_dense, "f32", torch.zeros(shape)),
        )
        for name, shape in shapes.items()
    ]
    write_gguf(directory / "model.gguf", metadata | text.metadata, tensors)
    return text
