"""A config file as flat entries: every key with its dotted path, its value and the line it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput, one_line

MAX_DEPTH = 40
"""Nesting; the configs of the frameworks read here have at most six levels."""
MAX_NODES = 20_000
"""Values in one file, aliases counted with all they stand for."""


class Entry(NamedTuple):
    """A value and where it stands."""

    value: Any
    line: int
    place: str = ""
    """"file:line" of an entry that comes from another file than its document (files joined into one)."""


class Unread(NamedTuple):
    """A value of a script that is not written out: it would have to be run to be known."""

    text: str

    def __repr__(self) -> str:
        return self.text


class Node(NamedTuple):
    """A parsed value with its line; mappings hold nodes, lists hold nodes, scalars are plain."""

    value: Any
    line: int


class Document(NamedTuple):
    """One file: its path as given, and its entries by dotted path, mappings among them."""

    path: str
    entries: Mapping[str, Entry]
    kind: str = "yaml"
    """yaml, json, python or notebook."""

    @property
    def name(self) -> str:
        """The file's name for messages."""
        return one_line(self.path.replace("\\", "/").rpartition("/")[2], 60)

    def get(self, key: str) -> Any:
        """Return a value, or None when the key is absent."""
        entry = self.entries.get(key)
        return None if entry is None else entry.value

    def where(self, key: str) -> str:
        """Return "file:line" of a key."""
        entry = self.entries.get(key)
        if entry is None or not entry.line:
            return self.name
        return entry.place or f"{self.name}:{entry.line}"


def flatten(root: Node, path: str, kind: str) -> Document:
    """Turn a tree of nodes into a document.

    Raises:
        InvalidInput: the file holds no mapping at its top.
    """
    if not isinstance(root.value, dict):
        found = "nothing" if root.value is None else f"a {type(root.value).__name__}"
        raise InvalidInput(f"{quote(path)} holds {found}; a training config is a mapping of keys to values")
    entries: dict[str, Entry] = {}
    _fill(root.value, "", entries)
    return Document(path, entries, kind)


def _fill(mapping: Mapping[str, Node], prefix: str, entries: dict[str, Entry]) -> None:
    # depth is bounded by the readers (MAX_DEPTH)
    for key, node in mapping.items():
        name = prefix + key
        if isinstance(node.value, dict) and node.value:
            entries[name] = Entry(plain(node), node.line)
            _fill(node.value, f"{name}.", entries)
        else:
            entries[name] = Entry(plain(node), node.line)


def plain(node: Node) -> Any:
    """Return the value of a node without lines."""
    if isinstance(node.value, dict):
        return {key: plain(item) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    return node.value


def leaves(document: Document) -> list[str]:
    """Return the keys that hold values, not mappings of further keys."""
    return [key for key, entry in document.entries.items() if not (isinstance(entry.value, dict) and entry.value)]


def quote(path: str) -> str:
    """Return a path for a message."""
    return repr(one_line(path, 160))
