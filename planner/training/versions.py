"""Releases of libraries: read and compared."""

from __future__ import annotations

import re
from collections.abc import Mapping

from planner.base.errors import InvalidInput, one_line
from planner.base.records import fields
from planner.training.spec import Versions

_RELEASE = r"(\d{1,4})\.(\d{1,4})"


def parse_versions(texts: Mapping[str, str]) -> Versions:
    """Parse release texts ("2.4.1+cu121"); a library that is not named is taken to be of the others' time.

    Raises:
        InvalidInput: for a text that does not start with MAJOR.MINOR.
    """
    stated = stated_versions(texts)
    if not stated or len(stated) == len(fields(Versions)):
        return Versions(**stated)
    from planner.training.releases import contemporary  # a data file that a run with the newest releases does not need

    return Versions(**{**contemporary(stated), **stated})


def stated_versions(texts: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Parse the release texts of the libraries that are named.

    Raises:
        InvalidInput: for a text that does not start with MAJOR.MINOR.
    """
    names = [f.name for f in fields(Versions)]
    return {name: _release(name, text) for name, text in texts.items() if name in names and text}


def _release(name: str, text: str) -> tuple[int, int]:
    match = re.match(_RELEASE, text)
    if match is None:
        raise InvalidInput(f"{name} version is {one_line(text, 40)!r}; must start with MAJOR.MINOR, for example 2.4.1")
    return int(match.group(1)), int(match.group(2))
