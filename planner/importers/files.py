"""From a path to a document: which parser, with what limit on the file's size."""

from __future__ import annotations

from typing import Final

from planner.base.bounded import read_bounded
from planner.base.errors import InvalidInput
from planner.base.units import MiB
from planner.importers.document import Document, flatten, quote

MAX_CONFIG: Final = 1 * MiB
"""The largest published training config is below 20 kB."""

_WEIGHTS: Final = (".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".pkl")


def read_document(path: str) -> Document:
    """Read and parse one config file.

    Raises:
        InvalidInput: not a readable text file of a kind that is known, or too large.
    """
    lower = path.lower()
    if lower.endswith(".bin"):
        raise InvalidInput(
            f"{quote(path)} is a pickle, which can run code; pass the YAML or JSON the run was started with"
        )
    if lower.endswith(_WEIGHTS):
        raise InvalidInput(f"{quote(path)} holds weights, not a training config; pass a YAML, JSON or Python file")
    if lower.endswith(".ipynb"):
        from planner.importers.python_file import MAX_NOTEBOOK, parse_notebook

        return parse_notebook(read_bounded(path, MAX_NOTEBOOK, "notebook"), path)
    data = read_bounded(path, MAX_CONFIG, "training config")
    if lower.endswith(".py"):
        from planner.importers.python_file import parse_script

        return parse_script(_text(data, path), path)
    if lower.endswith(".json") or (data.lstrip()[:1] == b"{" and not lower.endswith((".yml", ".yaml"))):
        from planner.importers import json_file

        return flatten(json_file.parse(data, path), path, "json")
    from planner.importers import yaml_file

    return flatten(yaml_file.parse(_text(data, path), path), path, "yaml")


def _text(data: bytes, path: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InvalidInput(f"{quote(path)} is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{quote(path)} is not text (byte {error.start}); pass a UTF-8 file") from None
    if "\0" in text:
        raise InvalidInput(f"{quote(path)} is not text (it holds NUL characters); pass a UTF-8 file")
    return text
