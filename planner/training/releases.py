"""Which library releases were current together: a source that states some of them means the others of that time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from planner.base.data_files import _load

Release = tuple[int, int]


def contemporary(stated: Mapping[str, Release]) -> dict[str, Release]:
    """Return releases of the libraries that `stated` leaves out, as an environment of that time would have them.

    The stated library that was released last dates the environment; every other one is taken to be the newest released
    before that one's successor. Empty where nothing is stated, or where the stated one has no successor yet.
    """
    dates = release_dates()
    known = {name: release for name, release in stated.items() if name in dates}
    if not known:
        return {}
    latest = max(known, key=lambda name: _day(dates[name], known[name]))
    end = _successor_day(dates[latest], known[latest])
    if not end:
        return {}
    found = {}
    for name, days in dates.items():
        before = [release for release, day in days.items() if day < end]
        if name not in stated and before:
            found[name] = max(before)
    return found


def _day(days: Mapping[Release, str], release: Release) -> str:
    """The day of a release; one that is not listed (a development version, an old one) takes its predecessor's."""
    return max((day for known, day in days.items() if known <= release), default="")


def _successor_day(days: Mapping[Release, str], release: Release) -> str:
    """The day on which the next release came; empty: not yet."""
    return min((day for known, day in days.items() if known > release), default="")


@lru_cache(maxsize=1)
def release_dates() -> dict[str, dict[tuple[int, int], str]]:
    """Return the day (YYYY-MM-DD) of the first release of each (major, minor) by library."""
    table: dict[str, dict[str, str]] = _load("releases.json")["releases"]
    return {name: {_release(text): day for text, day in days.items()} for name, days in table.items()}


def _release(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)
