"""Writing YAML, JSON and Python so that a user's text stays text: no new line, key, comment end or code comes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from planner.base.errors import one_line

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_RESERVED = frozenset(("true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf"))


def yaml(value: Mapping[str, Any]) -> str:
    """Return a mapping as YAML that versions 1.1 and 1.2 read alike; None values are left out."""
    return "".join(f"{line}\n" for line in _lines(value, 0))


def _lines(value: Mapping[str, Any], depth: int) -> list[str]:
    pad = "  " * depth
    lines = []
    for key, item in value.items():
        if item is None:
            continue
        if isinstance(item, Mapping):
            lines += [f"{pad}{scalar(key)}:", *_lines(item, depth + 1)] if item else [f"{pad}{scalar(key)}: {{}}"]
        elif isinstance(item, (list, tuple)):
            lines.append(f"{pad}{scalar(key)}:" if item else f"{pad}{scalar(key)}: []")
            for part in item:
                if isinstance(part, Mapping):
                    inner = _lines(part, depth + 2)
                    lines += [f"{pad}  - {inner[0].lstrip()}", *inner[1:]]
                else:
                    lines.append(f"{pad}  - {scalar(part)}")
        else:
            lines.append(f"{pad}{scalar(key)}: {scalar(item)}")
    return lines


def scalar(value: Any) -> str:
    """Return one YAML scalar; text that is not a plain word is quoted and escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 reads 2e-05 as text: the mantissa needs its point
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    return '"' + "".join(_escaped(ch) for ch in text) + '"'


def _escaped(ch: str) -> str:
    if ch in '"\\':
        return "\\" + ch
    if ch.isprintable():
        return ch
    code = ord(ch)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_file(value: Any) -> str:
    """Return a JSON file."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def python(value: Any) -> str:
    """Return a Python literal in ASCII: text cannot end its quotes."""
    return ascii(value)


def comment(text: str, mark: str = "#") -> str:
    """Return a comment of one line, whatever the text holds."""
    return f"{mark} {one_line(text, 300)}"
