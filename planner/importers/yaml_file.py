"""YAML by its events, never by its constructors: plain values with line numbers, bounded in depth, nodes and aliases.

Nothing is built from tags, and an alias stands for the node it names (counted again), so that a file of a few lines
cannot grow into millions of values. Scalars follow YAML 1.1 as PyYAML reads them, and "1e-4" is a number as OmegaConf
and Hugging Face's parser read it.
"""

from __future__ import annotations

import re
from typing import Any

from planner.base.errors import InvalidInput, one_line
from planner.importers.document import MAX_DEPTH, MAX_NODES, Node, quote

_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_TRUE = frozenset(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"))
_FALSE = frozenset(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"))
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]{0,30}")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]{0,30})?(?:\.[0-9_]{0,30})?(?:[eE][-+]?[0-9]{1,3})?")
_PLAIN_TAGS = frozenset(
    (None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "set")))
)


def parse(text: str, path: str) -> Node:
    """Return the first document of a YAML text.

    Raises:
        InvalidInput: not YAML, a tag that builds an object, or more depth or values than a config has.
        MissingDependency: PyYAML is not installed.
    """
    yaml = _library()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        stream = loader(text)
        try:
            return _Builder(yaml, path).build(stream)
        finally:
            stream.dispose()
    except yaml.YAMLError as error:
        raise InvalidInput(f"{_place(path, error)} is not YAML: {_problem(error)}; correct the file") from None


def _library() -> Any:
    try:
        import yaml
    except ImportError:
        from planner.base.errors import MissingDependency

        raise MissingDependency("reading YAML needs PyYAML; pip install pyyaml, or pass the config as JSON") from None
    return yaml


def _place(path: str, error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{quote(path)} line {mark.line + 1}" if mark is not None else quote(path)


def _problem(error: Any) -> str:
    return one_line(str(getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"), 80)


class _Builder:
    """Builds nodes from parser events with a stack of its own: no recursion, so depth is a number to check."""

    def __init__(self, yaml: Any, path: str) -> None:
        self.yaml, self.path = yaml, path
        self.count = 0
        self.anchors: dict[str, tuple[Node, int]] = {}
        self.stack: list[_Open] = []
        self.root: Node | None = None

    def build(self, stream: Any) -> Node:
        events = self.yaml.events
        while self.root is None and stream.check_event():
            event = stream.get_event()
            line = event.start_mark.line + 1
            if isinstance(event, events.ScalarEvent):
                self._check_tag(event.tag, line)
                self._add(Node(_scalar(event), line), event.anchor, 1)
            elif isinstance(event, events.AliasEvent):
                self._alias(event.anchor, line)
            elif isinstance(event, (events.SequenceStartEvent, events.MappingStartEvent)):
                self._check_tag(event.tag, line)
                if len(self.stack) >= MAX_DEPTH:
                    raise self._error(line, f"is nested deeper than {MAX_DEPTH} levels")
                self.stack.append(_Open(isinstance(event, events.MappingStartEvent), line, event.anchor, self.count))
            elif isinstance(event, (events.SequenceEndEvent, events.MappingEndEvent)):
                done = self.stack.pop()
                self._add(Node(done.value(), done.line), done.anchor, 1, self.count - done.before)
        return self.root if self.root is not None else Node(None, 1)

    def _alias(self, name: str, line: int) -> None:
        if name not in self.anchors:
            raise self._error(line, f"names an anchor that is not there: {one_line(name, 40)}")
        node, size = self.anchors[name]
        self._add(node, None, size)

    def _add(self, node: Node, anchor: str | None, size: int, inside: int = 0) -> None:
        self.count += size
        if self.count > MAX_NODES:
            raise self._error(node.line, f"stands for more than {MAX_NODES:,} values")
        if anchor:
            self.anchors[anchor] = (node, size + inside)
        if not self.stack:
            self.root = node
        else:
            self.stack[-1].add(node, self)

    def _check_tag(self, tag: str | None, line: int) -> None:
        if tag not in _PLAIN_TAGS:
            raise self._error(line, f"has the tag {one_line(str(tag), 60)!r}, and tags are not read")

    def _error(self, line: int, what: str) -> InvalidInput:
        return InvalidInput(f"{quote(self.path)} line {line} {what}; correct the file")

    def key_error(self, node: Node) -> InvalidInput:
        """A key that is a list or a mapping."""
        return self._error(node.line, "has a key that is no word")


class _Open:
    """A list or mapping whose end has not come yet."""

    def __init__(self, is_map: bool, line: int, anchor: str | None, before: int) -> None:
        self.line, self.anchor, self.before = line, anchor, before
        self.items: list[Node] = []
        self.mapping: dict[str, Node] | None = {} if is_map else None
        self.merged: dict[str, Node] = {}
        self.key: Node | None = None

    def add(self, node: Node, builder: _Builder) -> None:
        """Take the next value: an item of a list, a key, or the value of the last key."""
        if self.mapping is None:
            self.items.append(node)
        elif self.key is None:
            if isinstance(node.value, (dict, list)):
                raise builder.key_error(node)
            self.key = node
        else:
            key, self.key = self.key, None
            if key.value == "<<":
                for part in node.value if isinstance(node.value, list) else [node]:
                    if isinstance(part, Node) and isinstance(part.value, dict):
                        self.merged = {**part.value, **self.merged}
                return
            # the line of a key is where a reader looks for it; the value may start below
            self.mapping[_key_text(key.value)] = Node(node.value, key.line)

    def value(self) -> Any:
        """Return what was collected."""
        return self.items if self.mapping is None else {**self.merged, **self.mapping}


def _key_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _scalar(event: Any) -> Any:
    """Return the value of a scalar: quoted text as it is, plain text (no style) by the rules of YAML 1.1."""
    text = event.value
    if event.style or event.tag == "tag:yaml.org,2002:str":
        return text
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    return number(text)


def number(text: str) -> Any:
    """Return a plain scalar as a number if it is written as one, else the text."""
    if len(text) > 64 or not any(ch.isdigit() for ch in text):
        return text
    digits = text.replace("_", "")
    if _INTEGER.fullmatch(text):
        # PyYAML reads a leading zero as octal; nobody means that in a training config, and int() agrees with JSON
        return int(digits)
    return float(digits) if _FLOAT.fullmatch(text) else text
