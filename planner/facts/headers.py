"""Tensor shapes and metadata read from safetensors and GGUF headers, without reading any weights.

Every length in a file is a claim: it is compared with the file's size and with a limit before anything is read or
allocated by it. Whatever is wrong ends in one InvalidInput line that names the file and what to do.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from planner.base.bounded import opened, parse_json, quoted, read_bounded
from planner.base.errors import InvalidInput, one_line
from planner.base.records import field, record

MAX_SAFETENSORS_HEADER: Final = 100_000_000  # bytes; the limit of the safetensors library
MAX_INDEX_BYTES: Final = 50_000_000  # an index of 100,000 tensors is about 10 MB
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 8
MAX_ELEMENTS: Final = 2**50  # of one tensor; the largest published model has 2**40 parameters
MAX_SHARDS: Final = 2_000
MAX_GGUF_METADATA: Final = 100_000  # key-value pairs
MAX_GGUF_NAME: Final = 65_535  # bytes; the format's own limit for keys
MAX_GGUF_STRING: Final = 2**20  # a longer value is skipped, not kept
MAX_GGUF_WALK: Final = 8_000_000  # array entries that have to be stepped over one by one, whole file
MAX_GGUF_KEPT: Final = 4_096  # longer arrays (vocabularies) are counted, not kept

SAFETENSORS_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

GGML_TYPES: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and stored type of one tensor; `shape` is outermost first (rows, columns) for both formats."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@record
class SafetensorsHeader:
    """The header of one .safetensors file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


@record
class SafetensorsIndex:
    """model.safetensors.index.json: which shard holds which tensor."""

    weight_map: Mapping[str, str]
    total_size_bytes: int
    """As the index states it; 0: not stated."""

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.weight_map.values())))


@record
class GgufHeader:
    """The header of a GGUF file: scalars, short arrays and tensor shapes."""

    version: int
    metadata: Mapping[str, Any]
    """Key to value; arrays that are long or hold strings are left out."""
    array_lengths: Mapping[str, int]
    """Length of every array, kept or not (tokenizer.ggml.tokens gives the vocabulary)."""
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""


# --- safetensors --------------------------------------------------------------------------------------------------


def read_safetensors(path: str) -> SafetensorsHeader:
    """Return the tensors of a .safetensors file: 8 bytes of header length, then that much JSON."""
    with opened(path, "safetensors file") as (file, size):
        if size < 8:
            raise _damaged(path, f"{size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_SAFETENSORS_HEADER:
            raise InvalidInput(
                f"{quoted(path)} claims a header of {length} bytes (limit {MAX_SAFETENSORS_HEADER}); "
                "not a safetensors file; pass the file as the hub serves it"
            )
        if length > size - 8:
            raise _damaged(path, f"the header should have {length} bytes, the file has {size - 8} left")
        data = file.read(length)
    # every tensor is one object with two lists; far more brackets would only fill the memory
    entries = data.count(b'"dtype"')
    if entries > MAX_TENSORS or data.count(b"[") + data.count(b"{") > 3 * entries + 1_000_000:
        raise InvalidInput(f"{quoted(path)} describes too many tensors; not a model this tool can plan")
    table = parse_json(data, path, "safetensors header")
    metadata = table.pop("__metadata__", None)
    plain = metadata if isinstance(metadata, dict) else {}
    tensors = {name: _safetensor(path, name, entry, size - 8 - length) for name, entry in table.items()}
    return SafetensorsHeader(tensors=tensors, metadata={k: v for k, v in plain.items() if isinstance(v, str)})


def _safetensor(path: str, name: str, entry: Any, data_bytes: int) -> TensorInfo:
    """Check one header entry against the format and the size of the data behind the header."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    where = f"tensor {one_line(name, 60)!r}"
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        raise _damaged(path, f"{where} has dtype {one_line(dtype, 20)!r}, which safetensors does not have")
    sizes = _natural_numbers(shape)
    if sizes is None or len(sizes) > MAX_DIMENSIONS or math.prod(sizes) > MAX_ELEMENTS:
        raise _damaged(path, f"{where} has shape {one_line(shape, 40)}")
    span = _natural_numbers(offsets)
    if span is None or len(span) != 2 or not span[0] <= span[1]:
        raise _damaged(path, f"{where} has data offsets {one_line(offsets, 40)}")
    if (span[1] - span[0]) * 8 != math.prod(sizes) * SAFETENSORS_BITS[dtype]:
        raise _damaged(path, f"{where} has {span[1] - span[0]} bytes, which its shape and dtype {dtype} contradict")
    if span[1] > data_bytes:
        raise _damaged(path, f"{where} ends at byte {span[1]} of {data_bytes}")
    return TensorInfo(sizes, dtype)


def _natural_numbers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > 64:
        return None
    whole = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 2**62 for v in value)
    return tuple(value) if whole else None


def read_safetensors_index(path: str) -> SafetensorsIndex:
    """Return the weight map of a model.safetensors.index.json."""
    table = parse_json(read_bounded(path, MAX_INDEX_BYTES, "safetensors index"), path, "safetensors index")
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "no weight_map in the safetensors index")
    for name, shard in weight_map.items():
        # a shard lies beside its index: a path that leads elsewhere is not followed
        if not _is_file_name(shard):
            raise _damaged(path, f"tensor {one_line(name, 60)!r} lies in {one_line(shard, 60)!r}, not a file name")
    index = SafetensorsIndex(weight_map=weight_map, total_size_bytes=_total_size(table))
    if len(index.shards) > MAX_SHARDS:
        raise _damaged(path, f"{len(index.shards)} shards (limit {MAX_SHARDS})")
    return index


def _is_file_name(value: Any) -> bool:
    if not isinstance(value, str) or not value or len(value) > 255 or value in (".", ".."):
        return False
    return not any(c in value for c in "/\\\0")


def _total_size(table: Mapping[str, Any]) -> int:
    metadata = table.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    whole = isinstance(size, (int, float)) and not isinstance(size, bool) and 0 <= size < 2**60
    return int(size) if whole and size is not None else 0


# --- GGUF ---------------------------------------------------------------------------------------------------------

_GGUF_SCALARS: Final[Mapping[int, str]] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def read_gguf(path: str) -> GgufHeader:
    """Return the header of a GGUF file of version 2 or 3."""
    with opened(path, "GGUF file") as (file, size):
        reader = _GgufReader(path, file, size)
        version = _gguf_version(path, reader)
        n_tensors, n_pairs = reader.scalar("<Q"), reader.scalar("<Q")
        # the smallest entries: a tensor has 24 bytes beside its name, a pair 13
        if n_tensors > min(MAX_TENSORS, reader.left // 24) or n_pairs > min(MAX_GGUF_METADATA, reader.left // 13):
            raise _damaged(path, f"GGUF header claims {n_tensors} tensors and {n_pairs} metadata entries")
        for _ in range(n_pairs):
            reader.pair()
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            name, info = reader.tensor()
            tensors[name] = info
    return GgufHeader(version=version, metadata=reader.metadata, array_lengths=reader.array_lengths, tensors=tensors)


def _gguf_version(path: str, reader: _GgufReader) -> int:
    if reader.left == 0:
        raise _damaged(path, "the file is empty")
    magic = reader.take(min(4, reader.left))
    if magic != b"GGUF":
        older = magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")
        what = "an older GGML file" if older else f"not a GGUF file (it begins with {one_line(repr(magic))})"
        raise InvalidInput(f"{quoted(path)} is {what}; pass a GGUF file of version 2 or 3, or the model's config.json")
    version = int(reader.scalar("<I"))
    if version in (2, 3):
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
        raise InvalidInput(f"{quoted(path)} is a big-endian GGUF file; pass the little-endian one or the config.json")
    raise InvalidInput(f"{quoted(path)} is GGUF version {version}; versions 2 and 3 can be read; convert it again")


class _GgufReader:
    """Steps through a GGUF header; no step passes the end of the file."""

    def __init__(self, path: str, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.left = path, file, size
        self.walked = 0
        self.metadata: dict[str, Any] = {}
        self.array_lengths: dict[str, int] = {}

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _damaged(self.path, f"the GGUF header needs {count} more bytes, the file has {self.left}")
        data = self.file.read(count)
        if len(data) != count:
            raise _damaged(self.path, "the file became shorter while it was read")
        self.left -= count
        return data

    def skip(self, count: int) -> None:
        if count > self.left:
            raise _damaged(self.path, f"the GGUF header skips {count} bytes, the file has {self.left}")
        self.file.seek(count, os.SEEK_CUR)
        self.left -= count

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def name(self) -> str:
        length = self.scalar("<Q")
        if length > MAX_GGUF_NAME:
            raise _damaged(self.path, f"a name in the GGUF header claims {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def pair(self) -> None:
        key, kind = self.name(), self.scalar("<I")
        if kind in _GGUF_SCALARS:
            self.metadata[key] = self.scalar(_GGUF_SCALARS[kind])
        elif kind == _GGUF_STRING:
            length = self.scalar("<Q")
            if length <= MAX_GGUF_STRING:
                self.metadata[key] = self.take(length).decode("utf-8", "replace")
            else:
                self.skip(length)
        elif kind == _GGUF_ARRAY:
            self.array(key)
        else:
            raise _damaged(self.path, f"metadata {one_line(key, 60)!r} has the unknown type {kind}")

    def array(self, key: str) -> None:
        kind, length = self.scalar("<I"), self.scalar("<Q")
        self.array_lengths[key] = length
        if kind in _GGUF_SCALARS:
            code = _GGUF_SCALARS[kind]
            if length <= MAX_GGUF_KEPT:
                self.metadata[key] = tuple(self.scalar(code) for _ in range(length))
            else:
                self.skip(length * struct.calcsize(code))
        elif kind == _GGUF_STRING:
            self.walked += length
            if length > self.left // 8 or self.walked > MAX_GGUF_WALK:
                raise _damaged(self.path, f"metadata {one_line(key, 60)!r} claims {length} strings")
            for _ in range(length):
                self.skip(self.scalar("<Q"))
        else:
            raise _damaged(self.path, f"metadata {one_line(key, 60)!r} is an array of the type {kind}")

    def tensor(self) -> tuple[str, TensorInfo]:
        name, n_dims = self.name(), self.scalar("<I")
        if n_dims > MAX_DIMENSIONS:
            raise _damaged(self.path, f"tensor {one_line(name, 60)!r} claims {n_dims} dimensions")
        dims = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))
        kind = self.scalar("<I")
        self.skip(8)  # offset of the data
        if math.prod(dims) > MAX_ELEMENTS:
            raise _damaged(self.path, f"tensor {one_line(name, 60)!r} has shape {one_line(list(dims), 60)}")
        return name, TensorInfo(tuple(reversed(dims)), GGML_TYPES.get(kind, f"type {kind}"))


def _damaged(path: str, what: str) -> InvalidInput:
    return InvalidInput(f"{quoted(path)} is damaged or cut short: {what}; download it again or pass the config.json")
