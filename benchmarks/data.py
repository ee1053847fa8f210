"""How fast does text become tokens, and tokens batches, against Hugging Face datasets and litdata?

    uv run python benchmarks/data.py                        both sections, a few minutes
    uv run --group bench python benchmarks/data.py          litdata as well
    uv run python benchmarks/data.py --check-only           the same token ids and batches, no timing
    uv run python benchmarks/data.py --section prepare --repeats 9

One process on one core (litdata writes through a worker of its own, whose CPU time counts). CPU time rather
than wall time, for a busy machine stretches that; variants alternate inside every repeat, medians with the
quartiles, ratios within a repeat. The text is the source of Python's standard library, cut into documents of
4,000 characters; the tokenizer is a byte-level BPE of 8,192 tokens, trained here on part of it.

    prepare   ours begins with a jsonl file and ends with published, hashed shards; datasets and litdata begin
              with the texts in memory and end with their own files
    loading   shuffled batches of 8 × 1,024 tokens, one epoch after another; ours gives labels, positions and
              documents as well, the others the token ids
"""

import argparse
import importlib.util
import itertools
import json
import os
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_handler.config import DataConfig, SourceConfig
from data_handler.loaders import TrainingLoader
from data_handler.mixture import MixtureSchedule
from data_handler.prepare import prepare

END = "<|endoftext|>"
DOCUMENT_CHARACTERS = 4_000
BLOCK_SIZE, BATCH_SIZE = 1024, 8
Ids = NDArray[Any]


@dataclass
class Corpus:
    """The text, in the form that each variant begins with, and the tokenizer."""

    directory: Path
    texts: list[str]
    tokenizer: Tokenizer
    jsonl: Path = field(init=False)
    tokenizer_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        self.jsonl, self.tokenizer_dir = self.directory / "text.jsonl", self.directory / "tokenizer"
        lines = (json.dumps({"text": text}) + "\n" for text in self.texts)
        self.jsonl.write_text("".join(lines), encoding="utf-8")
        self.tokenizer_dir.mkdir()
        self.tokenizer.save(str(self.tokenizer_dir / "tokenizer.json"))
        settings = json.dumps({"eos_token": END})
        (self.tokenizer_dir / "tokenizer_config.json").write_text(settings, encoding="utf-8")

    @property
    def end(self) -> int:
        token_id = self.tokenizer.token_to_id(END)
        assert token_id is not None, "the trainer was given it"
        return token_id


def make_corpus(directory: Path, num_characters: int, vocab_size: int) -> Corpus:
    """Source files of the standard library, in the order of their names."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if size >= num_characters:
            break
        if "site-packages" in path.parts:
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        texts += [
            text[start : start + DOCUMENT_CHARACTERS] for start in range(0, len(text), DOCUMENT_CHARACTERS)
        ]
        size += len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:: max(1, len(texts) // 500)], trainer)
    return Corpus(directory, texts, tokenizer)


# --- text to tokens --------------------------------------------------------------------------------------


def ours(corpus: Corpus, out: Path, *, fast: bool) -> Ids:
    config = DataConfig(name="bench", sources={"text": SourceConfig(path=str(corpus.jsonl))})
    prepare(config, out, tokenizer=corpus.tokenizer_dir, fast=fast)
    return np.fromfile(out / "text/train/tokens-00000.bin", dtype="<u2")


def hf_map_and_group(corpus: Corpus, out: Path, *, ids_only: bool = False) -> Ids:
    """As in the language modelling examples of transformers, with or without the mask and labels there."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=corpus.tokenizer, eos_token=END)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows["text"], return_token_type_ids=False, return_attention_mask=not ids_only)
        ends = {"input_ids": corpus.end, "attention_mask": 1}
        return {key: [[*values, ends[key]] for values in column] for key, column in encoded.items()}

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(itertools.chain(*column)) for key, column in rows.items()}
        starts = range(0, len(joined["input_ids"]), BLOCK_SIZE)
        blocks = {
            key: [values[start : start + BLOCK_SIZE] for start in starts] for key, values in joined.items()
        }
        return blocks if ids_only else blocks | {"labels": blocks["input_ids"].copy()}

    mapped = _hf_texts(corpus).map(
        tokenize, batched=True, remove_columns=["text"], cache_file_name=str(out / "tokens.arrow")
    )
    return _hf_ids(mapped.map(group_texts, batched=True, cache_file_name=str(out / "blocks.arrow")))


def hf_one_map(corpus: Corpus, out: Path) -> Ids:
    """The fastest that datasets does: one map, the tokenizer itself, numpy."""

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[Ids]]:
        encoded = corpus.tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
        joined = np.concatenate([np.array([*item.ids, corpus.end], dtype=np.int32) for item in encoded])
        return {"input_ids": np.split(joined, range(BLOCK_SIZE, len(joined), BLOCK_SIZE))}

    return _hf_ids(
        _hf_texts(corpus).map(
            tokenize, batched=True, remove_columns=["text"], cache_file_name=str(out / "blocks.arrow")
        )
    )


def _hf_texts(corpus: Corpus) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"text": corpus.texts})


def _hf_ids(blocks: Any) -> Ids:
    column = blocks.data.column("input_ids").combine_chunks()
    return np.asarray(column.values if hasattr(column, "values") else column.flatten())


def litdata_optimize(corpus: Corpus, out: Path) -> Ids:
    import litdata

    litdata.optimize(
        fn=_Encode(corpus),
        inputs=list(range(0, len(corpus.texts), _Encode.at_once)),
        output_dir=str(out),
        num_workers=1,
        chunk_bytes="64MB",
        item_loader=litdata.TokensLoader(),
        verbose=False,
    )
    blocks = _litdata_blocks(out, shuffle=False)
    return np.concatenate([np.asarray(blocks[place]) for place in range(len(blocks))])


class _Encode:
    """What litdata's worker runs."""

    at_once = 256

    def __init__(self, corpus: Corpus) -> None:
        self.texts, self.tokenizer, self.end = corpus.texts, corpus.tokenizer, corpus.end

    def __call__(self, first: int) -> Iterator[torch.Tensor]:
        texts = self.texts[first : first + self.at_once]
        for item in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield torch.tensor([*item.ids, self.end], dtype=torch.uint16)


def _litdata_blocks(directory: Path, *, shuffle: bool) -> Any:
    import litdata

    return litdata.StreamingDataset(
        str(directory), item_loader=litdata.TokensLoader(BLOCK_SIZE), shuffle=shuffle
    )


PREPARE: dict[str, Callable[[Corpus, Path], Ids]] = {
    "datasets, map + group": hf_map_and_group,
    "datasets, map + group of ids only": lambda corpus, out: hf_map_and_group(corpus, out, ids_only=True),
    "datasets, one map": hf_one_map,
    "litdata": litdata_optimize,
    "ours, without the fast path": lambda corpus, out: ours(corpus, out, fast=False),
    "ours": lambda corpus, out: ours(corpus, out, fast=True),
}


# --- tokens to batches -----------------------------------------------------------------------------------


class Loading:
    """What `prepare` made, in each form, and endless batches of it."""

    def __init__(self, prepared: dict[str, Path]) -> None:
        import datasets

        self.prepared = prepared
        # `map` ends each of its batches with a short block.
        blocks = datasets.Dataset.from_file(str(prepared["datasets, one map"] / "blocks.arrow"))
        self.blocks = blocks.filter(lambda ids: len(ids) == BLOCK_SIZE, input_columns="input_ids")

    def ours(self, num_batches: int) -> Iterator[Any]:
        loader = TrainingLoader(
            {"text": self.prepared["ours"] / "text/train"},
            MixtureSchedule({"text": 1.0}, seed=0),
            block_size=BLOCK_SIZE,
            batch_size=BATCH_SIZE,
            num_samples=num_batches * BATCH_SIZE,
        )
        return iter(loader)

    def bare(self, num_batches: int) -> Iterator[Any]:
        """What the machine can do: ids of random blocks out of the map, as int64, and nothing else."""
        (path,) = (self.prepared["ours"] / "text/train").glob("tokens-*.bin")
        tokens = np.memmap(path, np.uint16, mode="r")
        blocks = tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE].reshape(-1, BLOCK_SIZE)
        order = np.random.default_rng(0)
        for _ in range(num_batches):
            rows = order.integers(len(blocks), size=BATCH_SIZE)
            yield torch.from_numpy(blocks[rows].astype(np.int64))

    def litdata(self, num_batches: int) -> Iterator[Any]:
        import litdata

        blocks = _litdata_blocks(self.prepared["litdata"], shuffle=True)
        return self._epochs(
            lambda: litdata.StreamingDataLoader(blocks, batch_size=BATCH_SIZE, drop_last=True)
        )

    def datasets(self, kind: str) -> Iterator[Any]:
        shuffled = self.blocks.shuffle(seed=0).with_format(kind)
        return self._epochs(lambda: shuffled.iter(batch_size=BATCH_SIZE, drop_last_batch=True))

    def _epochs(self, epoch: Callable[[], Any]) -> Iterator[Any]:
        while True:
            yield from epoch()

    @property
    def variants(self) -> dict[str, Callable[[int], Iterator[Any]]]:
        found: dict[str, Callable[[int], Iterator[Any]]] = {
            "datasets, numpy": lambda num: self.datasets("numpy"),
            "datasets, torch": lambda num: self.datasets("torch"),
            "ours": self.ours,
            "ids alone out of the map": self.bare,
        }
        return found | ({"litdata": self.litdata} if "litdata" in self.prepared else {})


def read_batches(make: Callable[[int], Iterator[Any]], num_batches: int) -> int:
    """Tokens of the first batches, each touched once."""
    num_tokens = 0
    for batch in itertools.islice(make(num_batches), num_batches):
        ids = batch["input_ids"] if isinstance(batch, dict) else getattr(batch, "input_ids", batch)
        assert tuple(ids.shape) == (BATCH_SIZE, BLOCK_SIZE), ids.shape
        num_tokens += ids.shape[0] * ids.shape[1]
    return num_tokens


# --- measuring -------------------------------------------------------------------------------------------


@dataclass
class Result:
    """CPU seconds of each repeat, for so many tokens."""

    num_tokens: int = 0
    seconds: list[float] = field(default_factory=list)


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_table(title: str, results: dict[str, Result], base: str) -> None:
    """Medians, and ratios to the same repeat of `base`: what slows the machine down slows both."""
    print(f"\n## {title}\n")
    print(f"| variant | CPU s | quartiles | Mtok per CPU-second | × {base} (quartiles) |")
    print("|---" * 5 + "|")
    for name, result in results.items():
        ratios = [
            b * result.num_tokens / (s * results[base].num_tokens)
            for b, s in zip(results[base].seconds, result.seconds, strict=True)
        ]
        seconds = quartiles(result.seconds)
        ratio = quartiles(ratios)
        rate = result.num_tokens / seconds[1] / 1e6
        print(
            f"| {name} | {seconds[1]:.3f} | {seconds[0]:.3f}–{seconds[2]:.3f} | {rate:.2f} "
            f"| {ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f}) |",
            flush=True,
        )


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def measure_prepare(corpus: Corpus, names: list[str], repeats: int) -> dict[str, Result]:
    """The first run of each is not counted: it imports, and other variants of a library then would not."""
    results = {name: Result() for name in names}
    for repeat in range(repeats + 1):
        for name in names:
            out = fresh(corpus.directory / "timed")
            before = cpu_seconds()
            ids = PREPARE[name](corpus, out)
            if repeat:
                results[name].seconds.append(cpu_seconds() - before)
            results[name].num_tokens = len(ids)
    return results


def measure_loading(loading: Loading, num_tokens: int, repeats: int) -> dict[str, Result]:
    """The variants that are slow read fewer tokens."""
    results = {name: Result() for name in loading.variants}
    for repeat in range(repeats + 1):
        for name, make in loading.variants.items():
            share = 1.0 if name in ("ours", "ids alone out of the map") else 0.1
            num_batches = max(2, int(num_tokens * share) // (BATCH_SIZE * BLOCK_SIZE))
            before = cpu_seconds()
            found = read_batches(make, num_batches)
            if repeat:
                results[name].seconds.append(cpu_seconds() - before)
            results[name].num_tokens = found
    return results


def check(corpus: Corpus, names: list[str]) -> dict[str, Path]:
    """Where each variant's output is; SystemExit unless all have the tokenizer's own ids."""
    expected = np.concatenate([[*corpus.tokenizer.encode(text).ids, corpus.end] for text in corpus.texts])
    prepared = {}
    for name in names:
        prepared[name] = fresh(corpus.directory / name.replace(" ", "_"))
        ids = PREPARE[name](corpus, prepared[name])
        # litdata gives whole blocks only.
        if len(ids) < len(expected) - BLOCK_SIZE or not np.array_equal(ids, expected[: len(ids)]):
            sys.exit(f"error: {name} gives other token ids than the tokenizer")
        print(f"{name}: {len(ids):,} token ids, all as the tokenizer gives them", flush=True)
    return prepared


def fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="the same ids on little text, no timing")
    parser.add_argument("--section", choices=["prepare", "loading"], help="only this one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text")
    parser.add_argument("--loaded", type=float, default=200.0, help="million tokens that ours loads a repeat")
    parser.add_argument("--vocab", type=int, default=8192)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    names = list(PREPARE)
    if importlib.util.find_spec("litdata") is None:
        names.remove("litdata")
        print("litdata: not installed; `uv run --group bench` has it")
    size = 0.3 if options.check_only else options.megabytes
    vocab_size = 600 if options.check_only else options.vocab
    with tempfile.TemporaryDirectory() as directory:
        corpus = make_corpus(Path(directory), int(size * 1e6), vocab_size)
        prepared = check(corpus, names)
        loading = Loading(prepared)
        for name, make in loading.variants.items():
            read_batches(make, 2)
            print(f"{name}: batches of {BATCH_SIZE} × {BLOCK_SIZE}", flush=True)
        if options.check_only:
            return
        if options.section != "loading":
            results = measure_prepare(corpus, names, options.repeats)
            title = f"prepare, {sum(map(len, corpus.texts)) / 1e6:.1f} million characters"
            print_table(title, results, names[0])
        if options.section != "prepare":
            loaded = measure_loading(loading, int(options.loaded * 1e6), options.repeats)
            print_table("loading", loaded, "datasets, numpy")


if __name__ == "__main__":
    main()
