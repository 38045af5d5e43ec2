"""The key maps of the training frameworks, as data/frameworks/*.json states them, and which of them a file is for.

A framework's file says by which keys it is recognised, the default of every key that matters with its source, and for
each option of `planner.training.stacks` a list of rows: the first row that holds for a config gives the option's value.
A table may build on others ("extends"), with a prefix for the sections of scripts (LoraConfig.r is peft's r).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput
from planner.facts import catalog
from planner.importers.document import Document, quote
from planner.training import optimizers, quantizations
from planner.training.losses import KERNEL_SETS

WORDS = "words"
"""The table that is no framework: value maps that several frameworks share."""

Condition = Mapping[str, Any]


class Default(NamedTuple):
    """A framework's own default of one of its keys."""

    value: Any
    source: str


class Framework(NamedTuple):
    """One format with everything that is known about its keys."""

    name: str
    title: str
    stack: str | None
    source: str
    versions: str
    recognise: tuple[Condition, ...]
    rank: int
    weak: bool
    """Its values fill what other files leave open and never override them (accelerate beside a trainer's file)."""
    model: tuple[Mapping[str, Any], ...]
    files: tuple[str, ...]
    sections: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Default]
    options: Mapping[str, tuple[Mapping[str, Any], ...]]
    neutral: tuple[str, ...]
    missing: tuple[Mapping[str, Any], ...]
    refuse: tuple[Mapping[str, Any], ...]
    warn: tuple[Mapping[str, Any], ...]
    maps: Mapping[str, Mapping[str, Any]]
    known: frozenset[str]
    """Every key that the table names."""


@lru_cache(maxsize=1)
def frameworks() -> tuple[Framework, ...]:
    """Return every format that can be recognised, the most telling first."""
    tables = catalog.framework_tables()
    made = [_framework(name, tables) for name, table in tables.items() if table.get("recognise")]
    return tuple(sorted(made, key=lambda framework: (framework.rank, framework.name)))


def framework(name: str) -> Framework:
    """Return one format by the name of its data file, recognisable or not."""
    return _framework(name, catalog.framework_tables())


def recognise(document: Document) -> Framework:
    """Return the framework that a document is written for.

    Raises:
        InvalidInput: its keys are those of no framework.
    """
    for candidate in frameworks():
        if any(all(_matches(document, key, value) for key, value in c.items()) for c in candidate.recognise):
            return candidate
    titles = sorted({candidate.title for candidate in frameworks() if "script" not in candidate.title})
    what = "calls that configure a training" if document.kind in ("python", "notebook") else "keys of a training config"
    raise InvalidInput(f"{quote(document.path)} has no {what}; known formats: {', '.join(titles)}")


def _matches(document: Document, key: str, wanted: Any) -> bool:
    """Whether the file itself states `key`: with any value ("*"), with none (null), or with one of some values."""
    if wanted is None:
        return key not in document.entries
    if key not in document.entries:
        return False
    value = document.get(key)
    if isinstance(wanted, str) and wanted.startswith("*") and len(wanted) > 1:
        return isinstance(value, str) and wanted[1:] in value
    return wanted == "*" or value == wanted or (isinstance(wanted, list) and value in wanted)


# --- building -----------------------------------------------------------------------------------------------------


def _framework(name: str, tables: Mapping[str, Mapping[str, Any]]) -> Framework:
    table = tables[name]
    whole = _inherited(name, tables, "")
    rows = [*table.get("model", ()), *(row for rows in whole["options"].values() for row in rows)]
    known = {*whole["defaults"], *whole["files"], *whole["neutral"], *(row["key"] for row in whole["missing"])}
    for row in (*rows, *whole["refuse"], *whole["warn"], *({"when": item} for item in table.get("recognise", ()))):
        known.update(_row_keys(row))
    return Framework(
        name=name,
        title=table.get("title", name),
        stack=table.get("stack"),
        source=table["source"],
        versions=table.get("versions", ""),
        recognise=tuple(table.get("recognise", ())),
        rank=table.get("rank", 50),
        weak=table.get("weak", False),
        model=tuple(table.get("model", ())),
        files=tuple(whole["files"]),
        sections={key: tuple(value) for key, value in table.get("sections", {}).items()},
        defaults=whole["defaults"],
        options={key: tuple(rows) for key, rows in whole["options"].items()},
        neutral=tuple(whole["neutral"]),
        missing=tuple(whole["missing"]),
        refuse=tuple(whole["refuse"]),
        warn=tuple(whole["warn"]),
        maps=word_maps(tables[WORDS]["maps"]),
        known=frozenset(known),
    )


def word_maps(others: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Names that frameworks give to values: those that rows know, and those that only come close to one (`others`)."""
    own = {
        "optimizers": optimizers.by_transformers_name(),
        "torch_optimizers": optimizers.by_class(),
        "quant_types": quantizations.by_bnb_type(),
    }
    # the first word of a value is the one that a change writes into a config
    return {name: {**others.get(name, {}), **own.get(name, {})} for name in (*own, *others)}


def _row_keys(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the foreign keys that a row reads."""
    yield from row.get("when", {})
    yield from (row[part] for part in ("from", "over") if part in row)
    for sub in row.get("collect", ()):
        yield from _row_keys(sub)


def _inherited(name: str, tables: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    """Return a table with those it extends behind it; its own rows and defaults come first."""
    table = tables[name]
    whole: dict[str, Any] = {
        "defaults": {
            prefix + key: Default(value, place[1:] if place.startswith("=") else f"{table['source']}:{place}")
            for place, keys in table.get("defaults", {}).items()
            for key, value in keys.items()
        },
        "options": {
            key: [_prefixed(row, prefix) for written in rows for row in _expanded(written)]
            for key, rows in table.get("options", {}).items()
        },
        "neutral": [prefix + key for key in table.get("neutral", ())],
        "files": [prefix + key for key in table.get("files", ())],
    }
    for part in ("missing", "refuse", "warn"):
        whole[part] = [_prefixed(row, prefix) for row in table.get(part, ())]
    for base in table.get("extends", ()):
        base_name, base_prefix = base if isinstance(base, list) else (base, "")
        inner = _inherited(base_name, tables, prefix + base_prefix)
        whole["defaults"] = {**inner["defaults"], **whole["defaults"]}
        for key, rows in inner["options"].items():
            whole["options"].setdefault(key, []).extend(rows)
        for part in ("neutral", "files", "missing", "refuse", "warn"):
            whole[part].extend(inner[part])
    return whole


def _expanded(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row as it is, or, of the switches of fused kernels, one for each set that has such a switch."""
    if "switch" not in row:
        return [row]
    switches = {name: getattr(kernels, row["switch"]) for name, kernels in KERNEL_SETS.items()}
    return [{"value": name, "when": {key: True}} for name, key in switches.items() if key]


def _prefixed(row: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Return a row that reads keys of a section of a script."""
    if not prefix:
        return row
    moved = dict(row)
    for part in ("from", "over", "key"):
        if part in moved:
            moved[part] = prefix + moved[part]
    if "when" in moved:
        moved["when"] = {prefix + key: value for key, value in moved["when"].items()}
    if "collect" in moved:
        moved["collect"] = [_prefixed(sub, prefix) for sub in moved["collect"]]
    return moved
