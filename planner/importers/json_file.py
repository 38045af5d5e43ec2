"""JSON with line numbers: the strict parser of `base.bounded` for the values, one pass of tokens for the lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from planner.base.bounded import parse_json
from planner.base.errors import InvalidInput
from planner.importers.document import MAX_DEPTH, MAX_NODES, Node, quote

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:\n]|[^\s\[\]{},:"]+')


def parse(data: bytes, path: str) -> Node:
    """Return a JSON object as nodes.

    Raises:
        InvalidInput: not a JSON object, or nested deeper or larger than a config is.
    """
    value = parse_json(data, path, "JSON config")
    lines = _lines(data.decode("utf-8-sig"))
    return _Numbered(path, lines).node(value, 1)


def _lines(text: str) -> Iterator[int]:
    """Yield the line of every key in the order of the file (the text is known to be valid JSON)."""
    line = 1
    last = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "\n":
            line += 1
        elif token == ":":
            yield last
        elif token[0] == '"':
            last = line


class _Numbered:
    """Walks parsed JSON in the order of the text and takes one line per key."""

    def __init__(self, path: str, lines: Iterator[int]) -> None:
        self.path, self.lines, self.count = path, lines, 0

    def node(self, value: Any, line: int, depth: int = 0) -> Node:
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_NODES:
            what = f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_NODES:,} values"
            raise InvalidInput(f"{quote(self.path)} is {what}; pass a training config")
        if isinstance(value, dict):
            return Node({key: self.node(item, next(self.lines, line), depth + 1) for key, item in value.items()}, line)
        if isinstance(value, list):
            return Node([self.node(item, line, depth + 1) for item in value], line)
        return Node(value, line)
