"""Words as values of settings: what kind each setting takes, which words mean the same, lists and ranges.

The kinds and words are those of `planner.training.settings`; the command line's options say the same in click's types.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.base.errors import InvalidInput, one_line, unknown
from planner.plan.flags import ALSO, flag_of
from planner.plan.given import NAMES
from planner.training import optimizers, quantizations, settings
from planner.training.choices import CHOICES

MOST_VALUES = 1_000_000

OPTIONS = tuple(name for name in NAMES if name != "versions")
"""Settings that a user names; releases are named by library."""

WHOLE = ("target_modules", "modules_to_save", "skip_modules", "target_slices")
"""Settings whose own value is a list: alternatives are repeated options."""

_ALIASES = {
    "quantization": quantizations.words(), "optimizer": optimizers.words(), "attention": settings._ATTENTION,
    "gradient_checkpointing": settings._CHECKPOINTING, "base_dtype": settings._DTYPES,
    "compute_dtype": settings._DTYPES, "adapter_dtype": settings._DTYPES, "autocast": settings._DTYPES,
}  # fmt: skip
_INTEGERS = frozenset(
    ("r", "micro_batch_size", "seq_len", "gradient_accumulation_steps", "group_size", "added_tokens")
)  # fmt: skip


def words_of(key: str) -> tuple[str, ...]:
    """The words that a setting chooses from; none: it is no choice of words."""
    if key in settings._FIXED:
        return settings._FIXED[key]
    return CHOICES[settings._CHOSEN[key]] if key in settings._CHOSEN else ()


def value_of(key: str, value: object) -> object:
    """One value of a setting from how a user writes it: a word or its alias, a number, a truth value, names.

    Raises:
        PlannerError: an unknown setting, or a value that it does not take.
    """
    if key not in OPTIONS:
        raise unknown("setting", key, OPTIONS)
    if key in WHOLE:
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
        if isinstance(text, str) and key not in WHOLE:
            for part in text.split(","):
                found += _parsed(key, part.strip())
        else:
            found += _parsed(key, text)
        if len(found) > MOST_VALUES:
            raise InvalidInput(f"{flag_of(key)} has more than {MOST_VALUES:,} values")
    return tuple(dict.fromkeys(found))


def _parsed(key: str, value: object) -> list[object]:
    if key in _INTEGERS:
        return [*_whole_numbers(key, value)]
    if key in settings._NUMBERS:
        return [_number(key, value)]
    if words_of(key):
        return [_word(key, value)]
    if key in settings._BOOLEANS:
        return [_truth(key, value)]
    return [",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]


def _word(key: str, value: object) -> str:
    if isinstance(value, bool):  # yaml reads an unquoted on, off, no as a truth value
        value = "on" if value else "none"
    word = str(value).strip().lower()
    word = _ALIASES.get(key, {}).get(word, word)
    if word not in words_of(key):
        raise unknown(flag_of(key).removeprefix("--").replace("-", " "), value, words_of(key))
    return word


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
    for key in OPTIONS:
        known[key] = key
        known.update(dict.fromkeys((*ALSO.get(key, ()), flag_of(key).lstrip("-")), key))
    found = known.get(word) or known.get(word.replace("_", "-"))
    if found is None:
        raise unknown("name", name, known)
    return found
