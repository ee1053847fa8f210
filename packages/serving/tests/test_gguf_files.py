"""Files of ours in `gguf`'s reader, files of `gguf`'s writer in ours, and writers that are killed."""

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_serving.encoding import decode_ternary, encode_dense, encode_ternary
from bitnet_serving.formats import GGUF_FORMATS, GGMLType
from bitnet_serving.gguf_reader import read_gguf
from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from durable import ExitCode, UserError

METADATA: dict[str, MetaValue] = {
    "general.architecture": "bitnet",
    "bitnet.block_count": 3,
    "bitnet.attention.layer_norm_rms_epsilon": 0.5**17,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<s>", "Ġé", "", "▁\n🦊"],
    "tokenizer.ggml.token_type": [1, -3, 6, 2**31 - 1],
    "tokenizer.ggml.scores": [0.5, -1000.0],
    "gemma3.attention.sliding_window_pattern": [True, False],
    "largest": 2**32 - 1,
}


def codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(rows)).char()


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def dense(name: str, form: str, tensor: Tensor) -> TensorToWrite:
    return TensorToWrite(
        name=name, format=form, shape=tuple(tensor.shape), produce=lambda: encode_dense(form, tensor)
    )


TENSORS = [
    dense("token_embd.weight", "q8_0", values(5, 256)),
    TensorToWrite(
        name="blk.0.attn_q.weight",
        format="tq2_0",
        shape=(3, 512),
        produce=lambda: encode_ternary("tq2_0", codes(3, 512), 0.5),
    ),
    dense("blk.0.attn_norm.weight", "f32", values(7)),
    dense("blk.0.ffn_gate_exps.weight", "bf16", values(2, 3, 5)),
    dense("output.weight", "f16", values(5, 33)),
]


def test_upstream_reads_what_was_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", METADATA, TENSORS)

    reader = gguf.GGUFReader(tmp_path / "a.gguf")

    fields = {name: field.contents() for name, field in reader.fields.items() if name in METADATA}
    assert fields == METADATA
    assert list(fields) == list(METADATA)
    assert [
        (each.name, each.tensor_type.name.lower(), tuple(reversed(each.shape.tolist())))
        for each in reader.tensors
    ] == [(each.name, each.format, each.shape) for each in TENSORS]
    for theirs, ours in zip(reader.tensors, TENSORS, strict=True):
        assert theirs.data.tobytes() == bytes(ours.produce().numpy())


def test_what_upstream_wrote_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(0.5**17)
    writer.add_token_list(["<s>", "Ġé", "🦊"])
    writer.add_token_types([1, -3, 6])
    writer.add_bool("b", False)
    writer.add_uint64("wide", 2**40)
    writer.add_int8("narrow", -5)
    writer.add_float64("double", 0.1)
    matrix, norm = values(4, 512).numpy(), values(7).numpy()
    packed = gguf.quants.quantize(codes(4, 512).float().numpy(), gguf.GGMLQuantizationType.TQ1_0)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    writer.add_tensor("half", matrix.astype(np.float16))
    writer.add_tensor("norm", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(tmp_path / "a.gguf")

    assert dict(file.metadata) == {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.attention.layer_norm_rms_epsilon": 0.5**17,
        "tokenizer.ggml.tokens": ["<s>", "Ġé", "🦊"],
        "tokenizer.ggml.token_type": [1, -3, 6],
        "b": False,
        "wide": 2**40,
        "narrow": -5,
        "double": 0.1,
    }
    assert (file.kinds["wide"], file.kinds["tokenizer.ggml.token_type"]) == ("uint64", "array of int32")
    assert {name: (each.type_id, each.shape) for name, each in file.tensors.items()} == {
        "w": (GGMLType.TQ1_0, (4, 512)),
        "half": (GGMLType.F16, (4, 512)),
        "norm": (GGMLType.F32, (7,)),
    }
    assert torch.equal(decode_ternary("tq1_0", file.data("w"), 4, 512)[0], codes(4, 512))
    assert bytes(file.data("half").numpy()) == matrix.astype(np.float16).tobytes()
    assert bytes(file.data("norm").numpy()) == norm.tobytes()


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_every_format_is_read_back_to_the_byte(tmp_path: Path, name: str) -> None:
    form = GGUF_FORMATS[name]
    data = [torch.randint(256, (form.num_bytes(3, 768),), dtype=torch.uint8) for _ in range(2)]
    tensors = [
        TensorToWrite(name=f"t{n}", format=name, shape=(3, 768), produce=lambda n=n: data[n])  # type: ignore[misc]
        for n in range(2)
    ]

    write_gguf(tmp_path / "a.gguf", {}, tensors)

    file = read_gguf(tmp_path / "a.gguf")
    assert [file.tensors[f"t{n}"].offset % 32 for n in range(2)] == [0, 0]
    assert [torch.equal(file.data(f"t{n}"), data[n]) for n in range(2)] == [True, True]
    assert (tmp_path / "a.gguf").stat().st_size % 32 == 0


def test_equal_calls_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / name, METADATA, TENSORS)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("form", "shape", "fitting"),
    [
        ("tq2_0", (5, 576), "q2_0, f32, f16, bf16, q8_0"),
        ("tq1_0", (5, 128), "q2_0, i2_s"),
        ("q2_0", (5, 96), "store it as f32, f16, bf16, q8_0"),
        ("i2_s", (5, 576), "store it as q2_0"),
        ("i2_s", (2, 5, 256), "tq2_0"),  # one scale behind three matrices has no place that engines know
        ("q8_0", (33,), "store it as f32, f16, bf16"),
    ],
)
def test_a_width_that_blocks_would_cut_is_refused_before_anything_is_written(
    tmp_path: Path, form: str, shape: tuple[int, ...], fitting: str
) -> None:
    tensor = TensorToWrite(name="blk.0.ffn_up.weight", format=form, shape=shape, produce=torch.Tensor)

    with pytest.raises(
        UserError, match=rf"blk\.0\.ffn_up\.weight: {form} .*{'×'.join(map(str, shape))}"
    ) as caught:
        write_gguf(tmp_path / "a.gguf", {}, [tensor])

    assert fitting in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (2**32, "outside uint32"),
        (-1, "outside uint32"),
        ([2**31], "outside int32"),
        (1e39, "outside float32"),
        (float("nan"), "not finite"),
        ([], "an empty list"),
        ([1, 2.0], "several kinds"),
        ("\ud800", "half a surrogate"),
        (None, "an empty list"),
        (b"x", "bytes"),
    ],
)
def test_a_value_that_a_file_cannot_say_is_refused_by_its_key(
    tmp_path: Path, value: MetaValue, found: str
) -> None:
    with pytest.raises(UserError, match=rf"some\.key: .*{found}"):
        write_gguf(tmp_path / "a.gguf", {"some.key": value}, [])


def test_a_name_that_engines_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 63 bytes"):
        write_gguf(tmp_path / "a.gguf", {}, [dense("é" * 32, "f32", values(3))])


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    target.write_bytes(b"before")

    with pytest.raises(UserError, match="exists already"):
        write_gguf(target, {}, TENSORS)
    assert target.read_bytes() == b"before"
    write_gguf(target, {}, TENSORS, replace=True)
    assert list(read_gguf(target).tensors) == [each.name for each in TENSORS]


def test_a_producer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise UserError("model.safetensors: damaged", exit_code=ExitCode.BAD_DATA)

    bad = TensorToWrite(name="last", format="f32", shape=(3,), produce=fail)

    with pytest.raises(UserError, match="damaged"):
        write_gguf(tmp_path / "a.gguf", {}, [*TENSORS, bad])
    assert list(tmp_path.iterdir()) == []


def in_a_child(work: Callable[[], None]) -> int:
    """A process that does it and ends without a clean-up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_a_full_disk_leaves_nothing_and_is_said_in_one_line(tmp_path: Path) -> None:
    said = tmp_path / "said"

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            write_gguf(tmp_path / "out" / "a.gguf", {}, [dense("w", "f32", values(100, 100))])
        except UserError as error:
            said.write_text(f"{error.exit_code} {error}")

    os.waitpid(in_a_child(write), 0)

    assert said.read_text().startswith(f"{ExitCode.CANNOT_WRITE:d} {tmp_path}/out/a.gguf: cannot be written")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("before", [None, b"the file of last week"])
def test_a_killed_writer_leaves_the_name_as_it_was(tmp_path: Path, before: bytes | None) -> None:
    target, rng = tmp_path / "a.gguf", random.Random(0)

    def killed_at(place: int) -> None:
        def produce(number: int) -> Tensor:
            if number == place:
                os._exit(9)
            return torch.zeros(4_000_000, dtype=torch.uint8)

        tensors = [
            TensorToWrite(name=f"t{n}", format="f32", shape=(1_000_000,), produce=lambda n=n: produce(n))  # type: ignore[misc]
            for n in range(5)
        ]
        write_gguf(target, METADATA, tensors, replace=True)

    for trial in range(12):
        if before is not None:
            target.write_bytes(before)
        # Half of them end inside a producer, half by SIGKILL at some moment.
        child = in_a_child(lambda trial=trial: killed_at(trial if trial < 6 else 99))  # type: ignore[misc]
        if trial >= 6:
            time.sleep(rng.random() * 0.02)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if target.exists() and target.read_bytes() != before:
            assert list(read_gguf(target).tensors) == [f"t{n}" for n in range(5)]
            assert trial >= 5
            target.unlink()
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} <= {"a.gguf"}

    write_gguf(target, {}, TENSORS, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    shape, grown = (2**12, 2**10), tmp_path / "grown"

    def produce() -> Tensor:
        return encode_ternary("tq2_0", torch.zeros(shape, dtype=torch.int8), 1.0)

    def write() -> None:
        produce()  # what the first use of anything takes
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tensors = [
            TensorToWrite(name=f"t{n}", format="tq2_0", shape=shape, produce=produce) for n in range(40)
        ]
        write_gguf(tmp_path / "a.gguf", {}, tensors)
        grown.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    os.waitpid(in_a_child(write), 0)

    # The codes of one are 4 MiB and its data 1 MiB; all data is 41 MiB.
    assert int(grown.read_text()) < 12 * 1024
