"""Expected ids are those of the tokenizer itself, for each expression that the fast path rewrites."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from data_handler import demo
from data_handler.encoder import LONGEST_WHOLE, TextEncoder, load_encoder
from data_handler.fast_path import FastPath, cut_safely, fast_path, is_known

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LLAMA3 = CONTRACTIONS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UNKNOWN = r" ?\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BLANKS = " \t\n\v\f\r\u0085\u00a0\u1680\u2003\u2028\u202f\u205f\u3000"
ALPHABET = BLANKS + "  \n\n" + "abIt'sREé漢²½Ⅷ٣12!?.\x1c\ufeff\U0001f600"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTE_LEVEL])


PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": split(LLAMA3),
    "qwen2": split(QWEN2),
    "unknown": split(UNKNOWN),
}


def make_tokenizer(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    blanks = ["\n    a\n\n  b \t \n 1", "  \n\n\n!!\n", BLANKS]
    tokenizer.train_from_iterator([*demo.documents("stories", stop=20), *blanks * 20], trainer)
    return tokenizer


TOKENIZERS = {name: make_tokenizer(name) for name in PRE_TOKENIZERS}


def fast(name: str) -> FastPath:
    found = fast_path(json.loads(TOKENIZERS[name].to_str()))
    assert found is not None
    return found


FAST = {name: fast(name) for name in PRE_TOKENIZERS}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(ALPHABET, max_size=12), min_size=1, max_size=4))
@example(texts=["a \n  b", "", "  ", "\n\nb", "x\n \n", "\t1", "  ²", "\u00a0 \n b", "  \n\n  !\n\n a"])
def test_ids_are_those_of_the_tokenizer_for_any_blanks(name: str, texts: list[str]) -> None:
    taken = [text for text in texts if FAST[name].takes(text)]

    found = FAST[name].encode(taken)

    assert [ids.tolist() for ids in found] == [TOKENIZERS[name].encode(text).ids for text in taken]


def test_known_expressions_look_ahead_no_more_and_others_still_do() -> None:
    assert {name: path.marks for name, path in FAST.items()} == dict.fromkeys(FAST, True) | {"unknown": False}
    assert not FAST["unknown"].takes("x" * 100_001)
    assert FAST["gpt2"].takes("x" * 100_001)
    assert not any(path.takes(mark) for path in FAST.values() for mark in "\0\1")


@pytest.mark.parametrize("name", ["gpt2", "digits", "llama3", "qwen2"])
@settings(max_examples=300, deadline=None)
@given(text=st.text(ALPHABET, max_size=60), length=st.integers(0, 9))
@example(text="\n\n1", length=0)
@example(text="a\n1\n!\n\nb", length=0)
def test_a_cut_changes_no_id(name: str, text: str, length: int) -> None:
    stretches = cut_safely(text, length)

    assert "".join(stretches) == text
    ids = [token for stretch in stretches for token in TOKENIZERS[name].encode(stretch).ids]
    assert ids == TOKENIZERS[name].encode(text).ids
    assert is_known(json.loads(TOKENIZERS[name].to_str()))


@pytest.mark.parametrize("fast", [False, True])
def test_a_document_longer_than_is_seen_at_once_has_the_same_ids(fast: bool) -> None:
    text = " ".join(demo.documents("stories", stop=6000))
    assert len(text) > 2 * LONGEST_WHOLE

    ids = load_encoder("demo", fast=fast).encode(["before", text, "after"])

    tokenizer = Tokenizer.from_file(str(demo.TOKENIZER_DIR / "tokenizer.json"))
    expected = [tokenizer.encode(part, add_special_tokens=False).ids for part in ("before", text, "after")]
    assert [one.tolist() for one in ids] == expected


def test_a_tokenizer_that_disagrees_is_used_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Merging by rank never reaches "abc", for "ab" comes first; the core finds it whole.
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc", "abc", "<eos>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c"), ("a", "bc")]))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS["gpt2"]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = TextEncoder(tmp_path)

    found = encoder.encode(["xyz", "abc"])

    assert [ids.tolist() for ids in found] == [tokenizer.encode("xyz").ids, [vocab["ab"], vocab["c"]]]
    assert (encoder.is_fast, encoder.afresh().is_fast) == (False, True)
    assert "other ids" in caplog.text
