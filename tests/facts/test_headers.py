"""safetensors and GGUF headers: right answers, and one distinct line for everything a file can have wrong."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
from pathlib import Path
from typing import Any

import pytest

from planner.base import bounded
from planner.base.errors import InvalidInput, PlannerError
from planner.facts.headers import TensorInfo, read_gguf, read_safetensors, read_safetensors_index
from tests.helpers.header_bytes import LLAMA_GGUF, gguf_bytes, gguf_string, mutate, safetensors_bytes, tensor


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


# --- safetensors ----------------------------------------------------------------------------------------------------


def test_safetensors_shapes_dtypes_and_metadata(tmp_path: Path) -> None:
    table = {
        "__metadata__": {"format": "pt"},
        "a": tensor([2, 3]),
        "scalar": tensor([], 24),
        "empty": tensor([0, 5], 28),
    }
    header = read_safetensors(write(tmp_path / "m.safetensors", safetensors_bytes(table, b"\0" * 28)))
    assert header.metadata == {"format": "pt"}
    assert header.tensors["a"] == TensorInfo((2, 3), "F32")
    assert {n: t.elements for n, t in header.tensors.items()} == {"a": 6, "scalar": 1, "empty": 0}


@pytest.mark.extra
def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"w": numpy.zeros((3, 5), "float16"), "b": numpy.zeros(7, "float64"), "i": numpy.zeros((1, 1, 2), "int32")}
    path = tmp_path / "m.safetensors"
    library.save_file(arrays, str(path), metadata={"k": "v"})
    header = read_safetensors(str(path))
    assert {n: t.shape for n, t in header.tensors.items()} == {n: a.shape for n, a in arrays.items()}
    assert {n: t.dtype for n, t in header.tensors.items()} == {"w": "F16", "b": "F64", "i": "I32"}


SAFETENSORS_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "pointer file": (b"version https://git-lfs.github.com/spec/v1\n", "claims a header of"),
    "absurd length": (struct.pack("<Q", 2**63), "claims a header of"),
    "just over the limit": (struct.pack("<Q", 100_000_001), "limit 100000000"),
    "longer than the file": (safetensors_bytes(b"{}", length=50), "the file has 2 left"),
    "not json": (safetensors_bytes(b"{oops"), "not valid JSON"),
    "not text": (safetensors_bytes(b"{\xff\xfe}"), "not text"),
    "a list": (safetensors_bytes([]), "holds a list"),
    "nested": (safetensors_bytes(b"[" * 5000 + b"]" * 5000), "nested"),
    "NaN": (safetensors_bytes(b'{"a": NaN}'), "NaN"),
    "entry not an object": (safetensors_bytes({"a": 3}), "dtype"),
    "unknown dtype": (safetensors_bytes({"a": tensor([1], dtype="F99")}, b"\0" * 4), "F99"),
    "negative shape": (safetensors_bytes({"a": tensor([-1])}), "has shape"),
    "boolean shape": (safetensors_bytes({"a": {**tensor([1]), "shape": [True]}}, b"\0" * 4), "has shape"),
    "nine dimensions": (safetensors_bytes({"a": tensor([1] * 9)}, b"\0" * 4), "has shape"),
    "too many elements": (safetensors_bytes({"a": {**tensor([1]), "shape": [2**40, 2**40]}}), "has shape"),
    "offsets reversed": (safetensors_bytes({"a": {**tensor([1]), "data_offsets": [4, 0]}}), "data offsets"),
    "offsets contradict": (safetensors_bytes({"a": {**tensor([2]), "data_offsets": [0, 4]}}, b"\0" * 4), "contradict"),
    "data cut": (safetensors_bytes({"a": tensor([100])}, b"\0" * 10), "ends at byte 400 of 10"),
}


@pytest.mark.parametrize("fault", SAFETENSORS_FAULTS)
def test_safetensors_fault(tmp_path: Path, fault: str) -> None:
    data, message = SAFETENSORS_FAULTS[fault]
    path = write(tmp_path / "bad.safetensors", data)
    with pytest.raises(InvalidInput, match=message) as error:
        read_safetensors(path)
    assert "bad.safetensors" in str(error.value) and str(error.value).isprintable()


def test_a_header_of_brackets_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded.json, "loads", lambda *a, **k: pytest.fail("parsed"))
    data = safetensors_bytes(b'{"a":[' + b"[]," * 1_100_000 + b"[]]}")
    with pytest.raises(InvalidInput, match="too many tensors"):
        read_safetensors(write(tmp_path / "m.safetensors", data))


def test_index(tmp_path: Path) -> None:
    table = {
        "metadata": {"total_size": 123.0},
        "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"},
    }
    index = read_safetensors_index(write(tmp_path / "i.json", json.dumps(table).encode()))
    assert index.shards == ("m-1.safetensors", "m-2.safetensors")
    assert index.total_size_bytes == 123


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "a\0b", 3, None, ["a"]]
)
def test_index_shards_are_plain_file_names(tmp_path: Path, shard: Any) -> None:
    path = write(tmp_path / "i.json", json.dumps({"weight_map": {"a": shard}}).encode())
    with pytest.raises(InvalidInput, match="not a file name"):
        read_safetensors_index(path)


@pytest.mark.parametrize("table", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_index_without_a_map(tmp_path: Path, table: Any) -> None:
    with pytest.raises(InvalidInput, match="weight_map"):
        read_safetensors_index(write(tmp_path / "i.json", json.dumps(table).encode()))


# --- GGUF -----------------------------------------------------------------------------------------------------------


def test_gguf_header(tmp_path: Path) -> None:
    header = read_gguf(write(tmp_path / "m.gguf", LLAMA_GGUF))
    assert header.version == 3 and header.architecture == "llama"
    assert header.metadata["llama.embedding_length"] == 64
    assert header.metadata["llama.attention.head_count_kv"] == (2, 2)
    assert header.metadata["general.flag"] is True
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert header.array_lengths["tokenizer.ggml.tokens"] == 3
    assert header.tensors["token_embd.weight"] == TensorInfo((256, 64), "Q4_K")


def test_gguf_long_arrays_are_counted_not_kept(tmp_path: Path) -> None:
    data = gguf_bytes({"scores": [1.0] * 5000, "after": 7}, {})
    header = read_gguf(write(tmp_path / "m.gguf", data))
    assert "scores" not in header.metadata
    assert header.array_lengths["scores"] == 5000 and header.metadata["after"] == 7


@pytest.mark.extra
def test_agrees_with_the_gguf_library(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = library.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_block_count(5)
    writer.add_head_count_kv([1, 2, 3])
    writer.add_token_list(["x", "yy"])
    writer.add_tensor("token_embd.weight", numpy.zeros((6, 4), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(str(tmp_path / "m.gguf"))
    assert header.metadata["llama.block_count"] == 5
    assert header.metadata["llama.attention.head_count_kv"] == (1, 2, 3)
    assert header.array_lengths["tokenizer.ggml.tokens"] == 2
    assert header.tensors["token_embd.weight"] == TensorInfo((6, 4), "F32")


def gguf_counts(n_tensors: int, n_pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + rest


PAD = b"\0" * 200
GGUF_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "two bytes": (b"GG", "not a GGUF file"),
    "wrong magic": (b"PK\x03\x04" + PAD, "not a GGUF file"),
    "older format": (b"tjgg" + PAD, "older GGML"),
    "version 1": (gguf_bytes({}, {}, version=1), "version 1; versions 2 and 3"),
    "version 9": (gguf_bytes({}, {}, version=9), "version 9; versions 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "cut after the magic": (b"GGUF", "needs 4 more bytes"),
    "cut in the counts": (b"GGUF" + struct.pack("<IQ", 3, 1), "needs 8 more bytes"),
    "absurd tensor count": (gguf_counts(2**60, 0, PAD), "claims 1152921504606846976 tensors"),
    "absurd pair count": (gguf_counts(0, 2**60, PAD), "metadata entries"),
    "absurd key": (gguf_counts(0, 1, struct.pack("<Q", 2**50) + PAD), "name in the GGUF header"),
    "absurd string": (
        gguf_counts(0, 1, gguf_string("k") + struct.pack("<IQ", 8, 2**50) + PAD),
        "skips 1125899906842624",
    ),
    "string past the end": (gguf_counts(0, 1, gguf_string("k") + struct.pack("<IQ", 8, 5000) + PAD), "needs 5000 more"),
    "absurd array": (gguf_counts(0, 1, gguf_string("k") + struct.pack("<IIQ", 9, 4, 2**60) + PAD), "skips"),
    "absurd string array": (gguf_counts(0, 1, gguf_string("k") + struct.pack("<IIQ", 9, 8, 2**60) + PAD), "strings"),
    "nested array": (gguf_counts(0, 1, gguf_string("k") + struct.pack("<IIQ", 9, 9, 1) + PAD), "array of the type 9"),
    "unknown type": (gguf_counts(0, 1, gguf_string("k") + struct.pack("<I", 77) + PAD), "unknown type 77"),
    "absurd dimensions": (gguf_counts(1, 0, gguf_string("t") + struct.pack("<I", 2**31) + PAD), "dimensions"),
    "absurd elements": (gguf_bytes({}, {"t": ([2**40, 2**40], 0)}), "has shape"),
    "cut in the tensors": (LLAMA_GGUF[:-9], "GGUF header"),
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_gguf_fault(tmp_path: Path, fault: str) -> None:
    data, message = GGUF_FAULTS[fault]
    path = write(tmp_path / "bad.gguf", data)
    with pytest.raises(InvalidInput, match=message) as error:
        read_gguf(path)
    assert "bad.gguf" in str(error.value) and str(error.value).isprintable()


def test_every_cut_of_a_gguf_header_is_an_error(tmp_path: Path) -> None:
    for length in range(len(LLAMA_GGUF)):
        with pytest.raises(InvalidInput):
            read_gguf(write(tmp_path / "cut.gguf", LLAMA_GGUF[:length]))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [read_gguf, read_safetensors, read_safetensors_index])
def test_what_is_not_a_file(tmp_path: Path, reader: Any) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would block for ever
    for path in (str(tmp_path / "missing"), str(tmp_path), str(tmp_path / "pipe"), "/dev/zero", "a\0b"):
        with pytest.raises(InvalidInput):
            reader(path)


def test_terminal_codes_in_names_do_not_reach_the_message(tmp_path: Path) -> None:
    data = safetensors_bytes({"\x1b[2Jname": {"dtype": "\x1b]0;x\x07"}})
    with pytest.raises(InvalidInput) as error:
        read_safetensors(write(tmp_path / "m.safetensors", data))
    assert "\x1b" not in str(error.value)


def test_fuzz_headers(tmp_path: Path) -> None:
    """12,000 mutated headers: an answer or a PlannerError, never anything else, and no memory taken on a claim."""
    rng = random.Random(20240611)
    table = {"__metadata__": {"format": "pt"}, **{f"layer.{i}.weight": tensor([2, 3], 24 * i) for i in range(6)}}
    seeds = {"m.safetensors": safetensors_bytes(table, b"\0" * 144), "m.gguf": LLAMA_GGUF}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers = 0
    for turn in range(12_000):
        name = rng.choice(sorted(seeds))
        path = write(tmp_path / name, mutate(rng, seeds[name]))
        try:
            answers += bool((read_gguf if name.endswith("gguf") else read_safetensors)(path))
        except PlannerError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, turn
    assert 0 < answers < 12_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
