"""What a user says of a run's settings: `Settings`, names and values, its names checked when it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from planner.base.errors import InvalidInput, one_line, unknown
from planner.training.options import OPTIONS
from planner.training.settings import LIBRARIES, SETTINGS
from planner.training.versions import parse_versions

NAMES = tuple(dict.fromkeys((*SETTINGS, *OPTIONS)))
"""Everything that can be set: the keys of `planner.training.stacks`, the framework, the releases of the libraries."""


class Settings(Mapping[str, object]):
    """What was said of the settings, by name; a name that was not said is absent. Nothing in it can be changed.

    Args:
        values: name -> value; None: not said. Values are those of `planner.training.settings`; part numbers may be
            a text ("0,2"), and "none" is no module to skip.

    Raises:
        UnknownName: a name that no setting has, with those that are near.
        InvalidInput: part numbers that are none.
    """

    __slots__ = ("_said",)
    _said: dict[str, object]

    def __init__(self, values: Mapping[str, object] | None = None) -> None:
        said = {}
        for name, value in (values or {}).items():
            if name not in NAMES:
                raise unknown("setting", name, NAMES)
            if value is not None:
                said[name] = _formed(name, value)
        object.__setattr__(self, "_said", said)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("settings cannot be changed; `but` returns others")

    def __getitem__(self, name: str) -> object:
        return self._said[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)

    def __hash__(self) -> int:
        return hash(frozenset(self._said))

    def __repr__(self) -> str:
        return f"Settings({self._said!r})"

    def but(self, changes: Mapping[str, object]) -> Settings:
        """These settings with others beside or instead of them; None takes one away."""
        return Settings({**self._said, **changes})

    @property
    def stack(self) -> str | None:
        """The framework that was named."""
        stack = self._said.get("stack")
        return str(stack) if stack else None

    @property
    def releases(self) -> dict[str, str]:
        """Library -> the release that was named."""
        return {name: str(self._said[name]) for name in LIBRARIES if self._said.get(name)}

    def options(self) -> dict[str, object]:
        """The keys of `planner.training.stacks` that were said, releases as `versions`.

        Raises:
            InvalidInput: a release that is none.
        """
        options = {name: value for name, value in self._said.items() if name in SETTINGS}
        if self.releases:
            options["versions"] = parse_versions(self.releases)
        return options


def _formed(name: str, value: object) -> object:
    """A value in its one form."""
    if name == "target_slices" and isinstance(value, str):
        return parse_slices(value)
    if name == "skip_modules" and value == "none":
        return ()
    return value


def parse_slices(text: str) -> list[int]:
    """Parse part numbers such as `0,2`.

    Raises:
        InvalidInput: for anything but part numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 3 for part in parts):
        raise InvalidInput(f"--target-slices is {one_line(text)!r}; write part numbers, for example 0,2")
    return [int(part) for part in parts]
