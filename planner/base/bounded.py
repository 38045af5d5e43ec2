"""Reading a stranger's file: of bounded size, and as strict JSON; whatever is wrong is one line of InvalidInput."""

from __future__ import annotations

import json
import math
import os
import stat
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

from planner.base.errors import InvalidInput, one_line

MAX_NESTING: Final = 64


def read_bounded(path: str, limit: int, what: str) -> bytes:
    """Return a regular file's bytes, refusing one larger than `limit`."""
    with opened(path, what) as (file, size):
        if size > limit:
            raise InvalidInput(f"{quoted(path)} has {size} bytes; a {what} has at most {limit}; pass another file")
        return file.read(limit + 1)[:limit]


def parse_json(data: bytes, path: str, what: str = "JSON file") -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, finite numbers of sane length, bounded nesting, an object at the top."""
    try:
        value = json.loads(
            data.removeprefix(BOM_UTF8).decode(), parse_constant=_no_constant, parse_float=_finite, parse_int=_short_int
        )
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{quoted(path)} is not text (byte {error.start}); pass a UTF-8 {what}") from None
    except RecursionError:
        raise InvalidInput(f"{quoted(path)} is nested too deeply; a {what} has a few levels; check the file") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidInput(f"{quoted(path)} is not valid JSON ({error.msg}, {where}); correct the {what}") from None
    except ValueError as error:
        raise InvalidInput(f"{quoted(path)}: {error}; correct the {what}") from None
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number or boolean")
        raise InvalidInput(f"{quoted(path)} holds {kind} at its top; a {what} is an object {{...}}")
    if _deeper_than(value, MAX_NESTING):
        raise InvalidInput(f"{quoted(path)} is nested deeper than {MAX_NESTING} levels; check the {what}")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"the number {text} has no place in a config")


def _finite(text: str) -> float:
    value = float(text) if len(text) <= 400 else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {one_line(text, 40)} is out of range")
    return value


def _short_int(text: str) -> int:
    if len(text) > 40:  # int() is quadratic in the digits
        raise ValueError(f"an integer of {len(text)} digits is out of range")
    return int(text)


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


@contextmanager
def opened(path: str, what: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file with its size; a missing file, a folder or a device is one line of InvalidInput."""
    try:
        # a pipe or a device would block or never end: look before opening
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InvalidInput(f"{quoted(path)} is not a file; pass a {what}")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidInput(f"cannot read {quoted(path)}: {reason}; pass a readable {what}") from None
    except ValueError:  # a path with a zero byte
        raise InvalidInput(f"{quoted(path)} is not a path; pass a readable {what}") from None


def quoted(path: str) -> str:
    """A path as messages name it."""
    return repr(one_line(os.fspath(path), 160))
