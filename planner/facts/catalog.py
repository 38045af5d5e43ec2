"""The catalogue: GPUs, priced instances and model configs read from the data files that ship with the package.

The only reader of data/. Standard library only, and each look-up parses only the file it needs: a GPU and a model
take a few milliseconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from planner.base.data_files import _load, data_path
from planner.base.errors import UnknownName, one_line, unknown
from planner.base.records import record, replace
from planner.base.units import GB, MiB
from planner.device.hardware import Gpu, Instance, context_bytes

_FILLER = frozenset(
    ("nvidia", "geforce", "tesla", "amd", "instinct", "radeon", "intel", "gpu", "generation", "edition", "corporation")
)
"""Words of marketing and NVML names that do not tell two cards apart."""

_BREAKS = {place: " " for place in range(128) if not chr(place).isalnum()}
"""What separates the words of a card's name, in ASCII."""
"""org/name or name, as the hub allows them; what does not match never reaches the file system."""


@record
class ModelRecord:
    """The config of a published model with its provenance."""

    model_id: str
    requested: str
    """The name that was asked for; differs from model_id when an alias was followed."""
    config: Mapping[str, Any]
    source: str
    published_parameters: int | None
    """Exact total somebody else published; None: only rounded figures were seen."""
    published_source: str
    counted_parameters: int
    """Unique parameters of this config, counted without this package (`counted_how`)."""
    counted_how: str
    difference: str
    """Why published and counted totals differ; empty: equal or not published."""
    text_part_only: bool
    confidence: str
    """verified, sourced or unverified."""
    note: str

    @property
    def is_alias(self) -> bool:
        """True when another model's record answers: sizes hold, context length and stored dtype may differ."""
        return self.requested.lower() != self.model_id.lower()


# --- GPUs ---------------------------------------------------------------------------------------------------------


def gpu(name: str) -> Gpu:
    """Return the GPU with this catalogue id, alias or driver name (rtx-4090, 4090, NVIDIA GeForce RTX 4090).

    A name that several cards share (a100) gives the one with the least memory, then the least bandwidth, and says so
    in `notes`: a plan made for it holds on the others.

    Raises:
        UnknownName: no such card, or a name that also means a card with less memory than the catalogue has.
    """
    rows, keys, families, unclear = _gpu_tables()
    key = _gpu_key(name)
    if key in keys:
        return _gpu(keys[key], rows[keys[key]])
    if key in families:
        members = families[key]
        cards = sorted((_gpu(i, rows[i]) for i in members), key=lambda g: (g.memory_bytes, g.bandwidth_bytes_per_s))
        others = ", ".join(g.gpu_id for g in cards[1:])
        note = f"{one_line(name)!r} names several cards; took {cards[0].gpu_id}, the least of them (others: {others})"
        return replace(cards[0], notes="; ".join(filter(None, (note, cards[0].notes))))
    if key in unclear:
        raise UnknownName(f"GPU {one_line(name)!r} is not clear: {unclear[key]}")
    plain = "-".join(_gpu_words(name)) or name
    raise unknown("GPU", plain, [*families, *rows], "(or name a card of your own by its memory: --vram 24GiB)")


def gpus() -> list[Gpu]:
    """Return every GPU of the catalogue in file order."""
    return [_gpu(gpu_id, row) for gpu_id, row in _gpu_tables()[0].items()]


def _gpu_words(name: str) -> list[str]:
    text = name[:200].lower()
    words = text.translate(_BREAKS).split() if text.isascii() else re.split(r"[^a-z0-9]+", text)
    return [w for w in words if w and w not in _FILLER]


def _gpu_key(name: str) -> str:
    return "".join(_gpu_words(name))


GpuTables = tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, list[str]], dict[str, str]]


@lru_cache(maxsize=1)
def _gpu_tables() -> GpuTables:
    """Return rows by id, ids by normalised name, families and unclear names by normalised name."""
    data = _load("gpus.json")
    rows: dict[str, dict[str, Any]] = data["gpus"]
    titles = data["sources"]
    keys: dict[str, str] = {}
    for gpu_id, row in rows.items():
        row["sources"] = tuple(titles[s] for s in row["sources"])
        for alias in (gpu_id, row["name"], *row.get("aliases", ())):
            keys[_gpu_key(alias)] = gpu_id
    families = {_gpu_key(k): v for k, v in data["families"].items()}
    unclear = {_gpu_key(k): v for k, v in data["unclear"].items()}
    return rows, keys, families, unclear


def _gpu(gpu_id: str, row: Mapping[str, Any]) -> Gpu:
    memory_bytes, basis = _memory(row)
    capability = row.get("compute_capability")
    major, minor = map(int, capability.split(".")) if capability else (0, 0)
    return Gpu(
        gpu_id=gpu_id,
        name=row["name"],
        vendor=row["vendor"],
        architecture=row["architecture"],
        memory_bytes=memory_bytes,
        memory_basis=basis,
        compute_capability=(major, minor) if capability else None,
        bandwidth_bytes_per_s=row.get("bandwidth_gb_s", 0) * 1e9,
        fp32_flops_per_s=row.get("fp32_tflops", 0) * 1e12,
        tf32_flops_per_s=row.get("tf32_tflops", 0) * 1e12,
        fp16_flops_per_s=row.get("fp16_tflops", 0) * 1e12,
        bf16_flops_per_s=row.get("bf16_tflops", 0) * 1e12,
        bf16_native=row.get("bf16_native"),
        measured_matmul_flops_per_s=row.get("measured_matmul_tflops", 0) * 1e12,
        measured_bandwidth_bytes_per_s=row.get("measured_bandwidth_gb_s", 0) * 1e9,
        sm_count=int(row.get("sm_count", 0)),
        context_bytes=context_bytes(int(row.get("sm_count", 0)), (major, minor) if capability else None),
        l2_bytes=int(row.get("l2_mib", 0) * MiB),
        tdp_w=float(row.get("tdp_w", 0)),
        sources=row["sources"],
        notes=row.get("note", ""),
    )


def _memory(row: Mapping[str, Any]) -> tuple[int, str]:
    """Return the memory to plan on and where it comes from.

    What a host reported, else what a cloud's API states, else the marketed GB read as 10**9 bytes: every card whose
    host-reported size is known has at least that much, while many have less than the same number of GiB (L4 92 to 94
    per cent, T4 94 per cent). An API figure that is just the marketed number times 1024 is no better than marketing
    (EC2 states 16384 MiB for the T4, hosts report 15360), so it counts as such.
    """
    reported, api, marketed = row.get("memory_mib_reported"), row.get("memory_mib_cloud_api"), row["memory_gb"]
    if reported is not None:
        return reported * MiB, "reported"
    if api is not None and api != marketed * 1024:
        return api * MiB, "cloud-api"
    return int(marketed * GB), "marketing"


# --- instances ----------------------------------------------------------------------------------------------------


def instances() -> list[Instance]:
    """Return the priced instances with whole GPUs of the catalogue, in file order.

    Rows without a price, without a GPU count, with a slice of a GPU or a card the catalogue lacks stay in the file
    only: nothing can be planned or priced on them.
    """
    data = _load("instances.json")
    titles = data["sources"]
    found = []
    for row in data["instances"]:
        count = row.get("gpu_count", 0)
        if not row.get("gpu") or "usd_per_hour" not in row or count < 1 or count != int(count):
            continue
        found.append(
            Instance(
                provider=row["provider"],
                instance_type=row["type"],
                region=row.get("region", ""),
                gpu_id=row["gpu"],
                gpu_count=int(count),
                usd_per_hour=float(row["usd_per_hour"]),
                price_date=row.get("price_date", ""),
                source="; ".join(titles[s] for s in row["sources"]),
                notes=row.get("note", ""),
            )
        )
    return found


# --- models -------------------------------------------------------------------------------------------------------


def model_record(name: str) -> ModelRecord | None:
    """Return the record of a model by id, alias or unique short name, ignoring case; None when there is none."""
    if len(name) > 200 or not name.isascii():
        return None
    files, short = _model_index()
    wanted = name.lower()
    stem = files.get(wanted) or short.get(wanted)
    if stem is None:
        target = _aliases().get(wanted)
        stem = files.get(target.lower()) if target else None
    if stem is None:
        return None
    data = _load("models", f"{stem}.json")
    return ModelRecord(
        model_id=data["model_id"],
        requested=data["model_id"] if wanted in short else name,
        config=data["config"],
        source=data["source"],
        published_parameters=data.get("published_parameters"),
        published_source=data.get("published_source", ""),
        counted_parameters=data["counted_parameters"],
        counted_how=data["counted_how"],
        difference=data.get("difference", ""),
        text_part_only=data.get("text_part_only", False),
        confidence=data["confidence"],
        note=data.get("note", ""),
    )


def model_ids() -> list[str]:
    """Return the ids of all models with a record, sorted ignoring case."""
    return sorted((stem.replace("--", "/", 1) for stem in _model_index()[0].values()), key=str.lower)


def model_aliases() -> dict[str, str]:
    """Return other names with the id of the record that has their sizes."""
    aliases: dict[str, str] = _load("models", "aliases.json")
    return dict(aliases)


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    """Return alias targets by lower-case alias and by its part after the slash, where that is unique."""
    aliases = {alias.lower(): target for alias, target in model_aliases().items()}
    short: dict[str, set[str]] = {}
    for alias, target in aliases.items():
        short.setdefault(alias.rpartition("/")[2], set()).add(target)
    return {**{k: next(iter(v)) for k, v in short.items() if len(v) == 1}, **aliases}


@lru_cache(maxsize=1)
def _model_index() -> tuple[dict[str, str], dict[str, str]]:
    """Return file stems by lower-case id, and by lower-case name without the organisation where that is unique."""
    stems = [f[:-5] for f in os.listdir(data_path("models")) if f.endswith(".json") and "--" in f]
    full = {stem.lower().replace("--", "/", 1): stem for stem in stems}
    short: dict[str, list[str]] = {}
    for stem in stems:
        short.setdefault(stem.lower().split("--", 1)[1], []).append(stem)
    return full, {name: found[0] for name, found in short.items() if len(found) == 1}


# --- training frameworks ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def framework_tables() -> dict[str, dict[str, Any]]:
    """Return the key maps of the training frameworks by file name (data/frameworks, data/README.md), words included."""
    names = sorted(name for name in os.listdir(data_path("frameworks")) if name.endswith(".json"))
    return {name[:-5]: _load("frameworks", name) for name in names}
