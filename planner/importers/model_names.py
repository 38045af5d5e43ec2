"""The model that a config names, as something `facts.sources` can read: an id, or a path that stays in its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from planner.base.errors import InvalidInput, one_line
from planner.facts import catalog
from planner.importers.document import Document, quote

_QUANTIZED = re.compile(r"(-unsloth)?(-bnb-(4bit|8bit|nf4(-bf16)?)|-gptq(-int[48])?|-awq|-4bit)$", re.IGNORECASE)
"""Ends of names under which quantized copies of a model are published; the shapes are those of the model."""


def readable(name: str, document: Document, *, models: dict[str, str], allow_outside: bool = False) -> str:
    """Return what to load for a model named in a config.

    Args:
        models: builder names of the framework with the catalogue ids they stand for (torchtune).

    Raises:
        InvalidInput: a path that leads out of the config's folder.
    """
    if not name or len(name) > 500 or "\0" in name:
        raise InvalidInput(f"{document.name} names a model that is none: {one_line(name)!r}; pass MODEL too")
    if models:
        return _built(name, document, models)
    if name.startswith("checkpoints/"):  # litgpt downloads to checkpoints/<org>/<name>
        name = name.removeprefix("checkpoints/").rstrip("/")
    if not _is_path(name):
        return name
    return inside(name, document.path, allow_outside=allow_outside)


def _built(name: str, document: Document, models: dict[str, str]) -> str:
    builder = re.sub(r"^q?lora_", "", name.rpartition(".")[2])
    found = models.get(builder)
    if found is None:
        raise InvalidInput(f"{document.name} builds {one_line(builder)!r}, which is not known; pass MODEL too")
    return found


def _is_path(name: str) -> bool:
    climbing = name.startswith((".", "/", "~", "\\")) or ".." in name or (len(name) > 1 and name[1] == ":")
    return climbing or name.count("/") > 1 or name.lower().endswith((".json", ".gguf", ".safetensors"))


def inside(name: str, config: str, *, allow_outside: bool = False) -> str:
    """Return the path of a file named in a config, relative to it; links count for where they lead.

    Raises:
        InvalidInput: outside the config's folder, unless that is allowed.
    """
    if not name or len(name) > 4096 or "\0" in name:
        raise InvalidInput(f"{quote(config)} names a file that is none: {one_line(name)!r}; correct the config")
    folder = os.path.dirname(os.path.abspath(config))
    path = os.path.normpath(os.path.join(folder, os.path.expanduser(name) if name.startswith("~") else name))
    root = os.path.realpath(folder)
    if not allow_outside and os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise InvalidInput(
            f"{quote(config)} names {one_line(name)!r}, which lies outside its folder; "
            "add --allow-outside to read it, or pass that file (or MODEL) yourself"
        )
    return path


def stand_ins(name: str) -> Iterator[str]:
    """Yield catalogue names under which the shapes of a copy may be known: without suffix, without organisation."""
    plain = _QUANTIZED.sub("", name)
    for candidate in dict.fromkeys((plain, name.rpartition("/")[2], plain.rpartition("/")[2])):
        if candidate != name and catalog.model_record(candidate) is not None:
            yield candidate
