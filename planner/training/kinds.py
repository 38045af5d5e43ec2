"""Kinds of settings: what a value may be, how one that is given is brought into its form, and what its words are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.base.config_values import names
from planner.base.errors import InvalidInput, one_line, unknown
from planner.base.records import record
from planner.training.choices import _positive
from planner.training.spec import Versions
from planner.training.versions import parse_versions


@record
class Choice:
    """One of a few words, with the names that other tools give them."""

    words: tuple[str, ...]
    aliases: Mapping[str, str]

    def checked(self, key: str, value: Any) -> object:
        """Return the word."""
        if value not in self.words:
            raise unknown(key, value, self.words)
        return value

    def word(self, what: str, text: Any) -> str:
        """Return the word that a text on the command line means.

        Raises:
            UnknownName: naming the text and what is allowed.
        """
        word = str(text).strip().lower()
        word = self.aliases.get(word, word)
        if word not in self.words:
            raise unknown(what, text, self.words)
        return word


@record
class YesNo:
    """True or false."""

    def checked(self, key: str, value: Any) -> object:
        """Return the truth value."""
        if not isinstance(value, bool):
            raise InvalidInput(f"{key} is {one_line(value)!r}; must be true or false")
        return value


@record
class Whole:
    """A whole number with bounds, or a polynomial of a sweep."""

    low: int
    high: int

    def checked(self, key: str, value: Any) -> object:
        """Return the number; the cells of an array are checked one by one, when they are used."""
        if not hasattr(value, "shape"):
            _positive(key, value, self.low, self.high)
        return value


@record
class Number:
    """A number with bounds; `below`: the upper one is not reached."""

    low: float
    high: float
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds; nan is not."""
        return self.low <= value < self.high or (value == self.high and not self.below)

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        low, high = (f"{bound:g}".replace("e+0", "e") for bound in (self.low, self.high))
        return f"must be at least {low} and below {high}" if self.below else f"must be a number from {low} to {high}"

    def checked(self, key: str, value: Any) -> object:
        """Return the number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.holds(value):
            shown = value if isinstance(value, float) else repr(one_line(value))
            raise InvalidInput(f"{key} is {shown}; {self.allowed}")
        return value


@record
class Names:
    """Names of modules; alternatives are repeated options."""

    def checked(self, key: str, value: Any) -> object:
        """Return the names, from a list or from words with commas between."""
        return names(key, value)


@record
class Parts:
    """Numbers of the parts of a fused projection, from 0; alternatives are repeated options."""

    def checked(self, key: str, value: Any) -> object:
        """Return the part numbers."""
        if not isinstance(value, (list, tuple)) or not all(type(part) is int and 0 <= part < 8 for part in value):
            raise InvalidInput(f"{key} is {one_line(value)!r}; must be a list of part numbers, for example [0, 2]")
        return tuple(value)


@record
class Releases:
    """A release of each library that changes the answer; each has an option of its own."""

    def checked(self, key: str, value: Any) -> object:
        """Return the releases, from texts such as 2.4.1 by library."""
        return value if isinstance(value, Versions) else parse_versions(value)


@record
class Text:
    """Any text: what names a thing of a table that is read later."""

    def checked(self, key: str, value: Any) -> object:
        """Return the text."""
        return value


Kind = Choice | YesNo | Whole | Number | Names | Parts | Releases | Text
"""What a setting's value may be. `checked(key, value)` returns a given value in its one form; InvalidInput says what is
allowed."""


def table_of(rows: Mapping[str, Any], words: Callable[[], Mapping[str, str]] = dict) -> Choice:
    """The names of a table of rows as a choice; `words` gives what else they are called."""
    return Choice(words=tuple(rows), aliases=words())
