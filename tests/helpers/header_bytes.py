"""Encoders of safetensors and GGUF headers, sound and mutated, for the tests."""

from __future__ import annotations

import json
import random
import struct
from typing import Any


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], begin: int = 0, dtype: str = "F32") -> dict[str, Any]:
    size = 4
    for n in shape:
        size *= n
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


def gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    """Encode a value with its type: str, bool, int (u32), float, list of one of these."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    kind = gguf_value(value[0])[:4] if value else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(gguf_value(v)[4:] for v in value)


def gguf_bytes(
    metadata: dict[str, Any], tensors: dict[str, tuple[list[int], int]], version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    """Encode a header; tensor dims are given innermost first, as the format stores them."""
    out = magic + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += gguf_string(key) + gguf_value(value)
    for name, (dims, kind) in tensors.items():
        out += gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, 0)
    return out


LLAMA_GGUF = gguf_bytes(
    {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": [2, 2],
        "llama.feed_forward_length": 128,
        "llama.rope.freq_base": 10000.0,
        "general.flag": True,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    },
    {"token_embd.weight": ([64, 256], 12), "blk.0.attn_q.weight": ([64, 64], 0), "output_norm.weight": ([64], 0)},
)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Overwrite, cut, repeat or insert at random places, with a taste for lengths and signs."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(6):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del out[at:]
            case 2:
                word = rng.choice([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
                out[at : at + 8] = struct.pack("<Q", word)
            case 3:
                out[at:at] = out[at : at + rng.randrange(40)]
            case 4:
                del out[at : at + rng.randrange(20)]
            case _:
                out[at:at] = rng.choice(
                    [b"{", b"[", b"]", b'"', b"-", b"1e999", b"9" * 60, b"NaN", b"\xff", b"null", b"\0"]
                )
    return bytes(out)
