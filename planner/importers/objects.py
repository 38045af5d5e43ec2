"""Configs that a program holds: PEFT's and transformers' objects as a job, single names of theirs as options.

An object is read by its `to_dict`, under the name of the class that it is of or comes from, by the same tables as the
calls of a script. Neither library is imported. A value that is also the framework's default is the framework's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from planner.base.errors import Contradiction, InvalidInput, UnknownName, one_line
from planner.importers import frameworks, rules
from planner.importers.document import Document, Entry
from planner.importers.job import Job, _merged
from planner.importers.python_file import CALLS, SAME
from planner.importers.rules import Reading, Value
from planner.training.spec import Versions
from planner.training.stacks import CUSTOM

PLACE = "arguments"
"""What messages call a value's place: the arguments of a call."""

WORDS = "script-trl"
"""The table that names of single settings are looked up in: it holds those of all four classes below."""

SECTIONS = ("SFTConfig", "LoraConfig", "BitsAndBytesConfig", "from_pretrained", "SFTTrainer")
"""Where a name is looked for, in this order."""


def section_of(held: object) -> str:
    """The call that makes such an object, by its class or one that it comes from.

    Raises:
        InvalidInput: no class that is known.
    """
    for kind in type(held).__mro__:
        if kind.__name__ in CALLS:
            return SAME.get(kind.__name__, kind.__name__)
    known = ", ".join(name for name in CALLS if "." not in name and name[0].isupper())
    raise InvalidInput(f"{one_line(type(held).__name__)} is no config that is known; known: {known}")


def read_objects(objects: Sequence[object], versions: Versions | None = None, *, one_gpu: bool = False) -> Job:
    """Read the objects that configure one job.

    Args:
        objects: with a `to_dict` (LoraConfig, TrainingArguments, SFTConfig, BitsAndBytesConfig, ...).
        versions: releases of the libraries, where they are not the usual ones.
        one_gpu: plan a job of several GPUs as if it ran on one.

    Raises:
        PlannerError: an object of no known class, or a job that is not planned.
    """
    entries: dict[str, Entry] = {}
    for held in objects:
        section = section_of(held)
        values = {name: plain(value) for name, value in _to_dict(held).items()}
        entries[section] = Entry(values, 0)
        _fill(values, f"{section}.", entries)
    document = Document(PLACE, entries, "python")
    framework = frameworks.recognise(document)
    reading = rules.apply(_without_defaults(document, framework), framework, versions or Versions(), one_gpu=one_gpu)
    given, defaults = _merged([reading])
    return Job(
        files=(),
        stack=framework.stack or CUSTOM,
        stack_origin=f"{PLACE}: {framework.title.replace('script', 'objects')}",
        model=None,
        model_origin="",
        given={option: value._replace(origin="given") for option, value in given.items()},
        defaults=defaults,
        missing=reading.missing,
        keys=reading.keys,
        readings=(reading,),
    )


def _to_dict(held: object) -> Mapping[str, Any]:
    read = getattr(held, "to_dict", None)
    found = read() if callable(read) else None
    if not isinstance(found, Mapping):
        raise InvalidInput(f"{one_line(type(held).__name__)} has no to_dict() that says what it holds")
    return found


def plain(value: Any) -> Any:
    """A value as a config file would write it."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _fill(values: Mapping[str, Any], prefix: str, entries: dict[str, Entry]) -> None:
    for name, value in values.items():
        entries[prefix + name] = Entry(value, 0)
        if isinstance(value, dict) and value:
            _fill(value, f"{prefix}{name}.", entries)


def _without_defaults(document: Document, framework: frameworks.Framework) -> Document:
    """Leave out what the framework does unasked: an object holds every field, whoever set it."""
    defaults = dict(framework.defaults)
    for section, others in framework.sections.items():  # an SFTConfig's default is no TrainingArguments'
        for other in others:
            for key in [key for key in defaults if key.startswith(f"{section}.")]:
                defaults.setdefault(other + key[len(section) :], defaults[key])
    kept = {
        key: entry
        for key, entry in document.entries.items()
        if key not in defaults or not _same(entry.value, defaults[key].value)
    }
    return document._replace(entries=kept)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


class Words(NamedTuple):
    """What names of single settings say."""

    options: Mapping[str, Any]
    """By the names of `planner.training.settings`."""
    remarks: tuple[str, ...]
    """What was asked for and is not planned."""


def known_words() -> dict[str, str]:
    """Name of a setting in transformers, PEFT, TRL or bitsandbytes -> the key of the table that holds it."""
    known = frameworks.framework(WORDS).known
    found: dict[str, str] = {}
    for section in SECTIONS:
        for key in sorted(known):
            name = key.removeprefix(f"{section}.")
            if name != key and "." not in name:
                found.setdefault(name, key)
    return found


def read_words(words: Mapping[str, Any], versions: Versions | None = None) -> Words:
    """Read settings by their names in transformers, PEFT, TRL and bitsandbytes; all must be of `known_words`.

    Raises:
        PlannerError: a value that a setting does not take, a job that is not planned, or a name that changes nothing
            beside the others.
    """
    known = known_words()
    framework = frameworks.framework(WORDS)
    entries: dict[str, Entry] = {}
    for name, value in words.items():
        entries[known[name]] = Entry(plain(value), 0)
        if isinstance(value, Mapping):
            _fill(plain(value), f"{known[name]}.", entries)
    reading = rules.apply(Document(PLACE, entries, "python"), framework, versions or Versions())
    options = {option: value.value for option, value in reading.options.items() if value.given}
    for name in words:
        _refuse_idle(name, known[name], entries[known[name]].value, reading)
    return Words(options, tuple(str(missing) for missing in reading.missing))


def _refuse_idle(name: str, key: str, value: Any, reading: Reading) -> None:
    """Refuse a name that is switched on and that nothing was read of: its user expects something else.

    A config's word that is not known leaves the default, with a note; here its user is at hand.
    """
    if any(value == off for off in rules.OFF) or key in reading.framework.neutral:
        return
    told = {row["key"] for row in reading.framework.missing} | {
        k for row in reading.framework.warn for k in row["when"]
    }
    if key in told or any(_read(key, found) for found in reading.options.values()):
        return
    if any(missing.text.startswith(f"{key} ") for missing in reading.missing):
        raise UnknownName(f"{name} is {one_line(value)!r}, which is not modelled; choose another, or drop it")
    raise Contradiction(f"{name} has no effect beside the other settings; drop it, or set what it belongs to")


def _read(key: str, found: Value) -> bool:
    return any(used == key or used.startswith(f"{key}.") for used in found.keys)
