"""Traces kept in the user's cache folder, by configuration, library releases and the tracer's own sources."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import planner

VERSION = 1
KEPT = 200
"""Newest traces that stay."""


def folder() -> Path:
    """$XDG_CACHE_HOME/loraplan/traces, or ~/.cache/loraplan/traces."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and os.path.isabs(base) else Path(os.path.expanduser("~"), ".cache")
    return root / "loraplan" / "traces"


def key(request: Mapping[str, Any], libraries: Iterable[str]) -> str:
    """Name of the entry: a hash of everything that the answer depends on."""
    releases = {name: _release(name) for name in libraries}
    whole = {"version": VERSION, "request": request, "releases": releases, "sources": _sources()}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _release(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _sources() -> str:
    """A hash of the code that traces: a changed rule must not meet an old answer."""
    root = Path(planner.__file__).resolve().parent.parent
    files = [
        *sorted((root / "calibrate").rglob("*.py")),
        *(root / "planner" / n for n in ("device/cuda_rules.py", "memory/walk.py")),
    ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(name: str) -> dict[str, Any] | None:
    """Return an entry; None if there is none or it cannot be read (a damaged one is made again)."""
    try:
        with gzip.open(folder() / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            held = json.load(file)
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    if not isinstance(held, dict) or held.get("key") != name or not isinstance(held.get("answer"), dict):
        return None
    answer: dict[str, Any] = held["answer"]
    return answer


def write(name: str, answer: Mapping[str, Any]) -> None:
    """Keep an answer, in one piece or not at all; a folder that cannot be written costs only the time."""
    where = folder()
    if not where.is_absolute():
        return  # a user id without a home folder, as containers have: "~" stays "~"
    temporary = ""
    try:
        where.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=where, suffix=".tmp")
        with os.fdopen(handle, "wb") as raw:
            raw.write(gzip.compress(json.dumps({"key": name, "answer": answer}).encode(), 5))
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, where / f"{name}.json.gz")
        _prune(where)
    except OSError:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _prune(where: Path) -> None:
    entries = sorted(where.glob("*.json.gz"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in entries[KEPT:]:
        path.unlink(missing_ok=True)
