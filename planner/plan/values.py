"""Words as values of settings: what kind each setting takes, which words mean the same, lists and ranges.

The kinds and words are those of `planner.training.options`, which the command line gives click too.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.base.errors import InvalidInput, one_line, unknown
from planner.training.kinds import Choice, Names, Number, Parts, Whole, YesNo
from planner.training.options import OPTIONS, flag_of

MOST_VALUES = 1_000_000


def value_of(key: str, value: object) -> object:
    """One value of a setting from how a user writes it: a word or its alias, a number, a truth value, names.

    Raises:
        PlannerError: an unknown setting, or a value that it does not take.
    """
    if key not in OPTIONS:
        raise unknown("setting", key, OPTIONS)
    if _is_list(key):
        return ",".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)
    found = _parsed(key, value)
    if len(found) != 1:
        raise InvalidInput(f"{flag_of(key)} is {one_line(value)!r}; must be one value")
    return found[0]


def parse_values(key: str, texts: Sequence[object]) -> tuple[object, ...]:
    """Return the values of a setting: repeated options, comma lists, and ranges of numbers (1..8, 512..8192:512).

    Raises:
        PlannerError: a value that the setting does not take.
    """
    if key not in OPTIONS:
        raise unknown("setting", key, OPTIONS)
    found: list[object] = []
    for text in texts:
        if isinstance(text, str) and not _is_list(key):
            for part in text.split(","):
                found += _parsed(key, part.strip())
        else:
            found += _parsed(key, text)
        if len(found) > MOST_VALUES:
            raise InvalidInput(f"{flag_of(key)} has more than {MOST_VALUES:,} values")
    return tuple(dict.fromkeys(found))


def _is_list(key: str) -> bool:
    """Whether a setting's own value is a list: alternatives are repeated options."""
    return isinstance(OPTIONS[key].kind, (Names, Parts))


def _parsed(key: str, value: object) -> list[object]:
    kind = OPTIONS[key].kind
    if isinstance(kind, Whole):
        return [*_whole_numbers(key, value)]
    if isinstance(kind, Number):
        return [_number(key, value)]
    if isinstance(kind, YesNo):
        return [_truth(key, value)]
    if isinstance(kind, Choice):
        if isinstance(value, bool):  # yaml reads an unquoted on, off, no as a truth value
            value = "on" if value else "none"
        return [kind.word(OPTIONS[key].words, value)]
    return [",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]


def _truth(key: str, value: object) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise InvalidInput(f"{flag_of(key)} is {one_line(value)!r}; must be true or false")
    return found


def _number(key: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise InvalidInput(f"{flag_of(key)} is {one_line(value)!r}; must be a number") from None


def _whole_numbers(key: str, value: object) -> list[int]:
    start, dots, rest = str(value).partition("..")
    end, _, step = rest.partition(":")
    parts = [start, end, step or "1"] if dots else [start]
    if not all(part.strip().isascii() and part.strip().isdigit() and len(part) < 13 for part in parts):
        raise InvalidInput(f"{flag_of(key)} is {one_line(value)!r}; write whole numbers, 1,2,4 or 512..8192:512")
    numbers = [int(part) for part in parts]
    if not dots:
        return numbers
    first, last, by = numbers
    if by < 1 or last < first or (last - first) // by >= MOST_VALUES:
        raise InvalidInput(f"{flag_of(key)} is {one_line(value)!r}; a range goes up, in at most {MOST_VALUES:,} steps")
    return list(range(first, last + 1, by))


def key_of(name: object) -> str:
    """The setting that a name means: its key, or the name of its option; `model`, `gpu` and `vram` mean themselves.

    Raises:
        UnknownName: it means none.
    """
    word = str(name).strip().lower().lstrip("-")
    known = {"model": "model", "models": "model", "gpu": "gpu", "gpus": "gpu", "vram": "vram"}
    for option in OPTIONS.values():
        known[option.key] = option.key
        known.update({flag.partition("/")[0].lstrip("-"): option.key for flag in option.flags})
    found = known.get(word) or known.get(word.replace("_", "-"))
    if found is None:
        raise unknown("name", name, known)
    return found
