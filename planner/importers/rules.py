"""One document against its framework's table: option values with their origin, what was ignored, what is missing.

A key has the value the file gives, else the framework's default. The first row of an option that holds decides it. It
counts as given by the file when the file states one of the keys that made the row hold, else as the framework's
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput, NotPlanned, one_line
from planner.importers.document import Document, Unread, leaves
from planner.importers.frameworks import Framework
from planner.importers.values import option_value
from planner.training.spec import Versions

OFF: tuple[Any, ...] = (None, False, 0, "", "none", "None", "no", [], {})
"""Values by which a key says that its feature is not used."""


class Value(NamedTuple):
    """An option's value and where it comes from."""

    value: Any
    origin: str
    given: bool
    """Stated by the file; else the framework's default."""
    keys: tuple[str, ...] = ()
    line: int = 0
    adapts: bool = False
    """The framework looks at the card first ("auto")."""


class Missing(NamedTuple):
    """Something the file asks for that the estimate lacks."""

    text: str
    where: str
    effect: str = "unknown"
    """What the run needs beside the estimate: more, less, unknown, or none."""

    def __str__(self) -> str:
        bound = {"more": " (the run needs more)", "less": " (the run needs less)"}.get(self.effect, "")
        return f"{self.where}: {self.text}{bound}"


class KeyUse(NamedTuple):
    """How one key of the file, or one default of the framework, was taken."""

    key: str
    use: str
    """used, default, ignored, unsupported or unknown."""
    value: Any
    where: str


class Reading(NamedTuple):
    """One file, read."""

    document: Document
    framework: Framework
    options: Mapping[str, Value]
    model: Value | None
    missing: tuple[Missing, ...]
    keys: tuple[KeyUse, ...]


def apply(document: Document, framework: Framework, versions: Versions, *, one_gpu: bool = False) -> Reading:
    """Read a document by its framework's table.

    Args:
        one_gpu: plan a job of several GPUs as if it ran on one, with a warning instead of a refusal.

    Raises:
        NotPlanned: the job is of a kind that is not planned.
        InvalidInput: a key that matters has a value that it cannot have.
    """
    view = _View(_with_sections(document, framework), framework, versions)
    missing = [*_refusals(view, one_gpu), *_missing(view)]
    options: dict[str, Value] = {}
    for option, rows in framework.options.items():
        found = view.first(option, rows, missing)
        if found is not None:
            options[option] = found
    missing += [Missing(row["text"], view.spot(row["when"]), row.get("effect", "none")) for row in view.hold("warn")]
    model = view.first("model", framework.model, missing)
    return Reading(document, framework, options, model, tuple(dict.fromkeys(missing)), tuple(_key_uses(view)))


def _with_sections(document: Document, framework: Framework) -> Document:
    """File calls that stand in for one another under one section (TrainingArguments given to an SFTTrainer)."""
    entries = dict(document.entries)
    for section, others in framework.sections.items():
        for other in others:
            for key in [k for k in document.entries if k == other or k.startswith(f"{other}.")]:
                entries.setdefault(section + key[len(other) :], entries.pop(key))
    return document._replace(entries=entries)


class _View:
    """A document over its framework's defaults."""

    def __init__(self, document: Document, framework: Framework, versions: Versions) -> None:
        self.document, self.framework, self.versions = document, framework, versions
        self.used: set[str] = set()

    def value(self, key: str) -> Any:
        """Return the file's value, else the default; None: neither."""
        value = self.document.get(key)
        if value is None:
            default = self.framework.defaults.get(key)
            return None if default is None else default.value
        return value

    def stated(self, key: str) -> bool:
        """Whether the file gives the key a value."""
        return self.document.get(key) is not None

    def holds(self, when: Mapping[str, Any]) -> bool:
        """Whether every condition is met."""
        return all(self._meets(key, wanted) for key, wanted in when.items())

    def _meets(self, key: str, wanted: Any) -> bool:
        value = self.value(key)
        if isinstance(wanted, dict):
            return all(_TESTS[test](self, key, value, argument) for test, argument in wanted.items())
        return any(_same(value, item) for item in wanted) if isinstance(wanted, list) else _same(value, wanted)

    def hold(self, part: str) -> list[Mapping[str, Any]]:
        """Return the rows of a part of the table whose conditions are met."""
        return [row for row in getattr(self.framework, part) if self.holds(row["when"])]

    def spot(self, when: Mapping[str, Any]) -> str:
        """Return file and line of the first key of a condition that the file states."""
        return next((self.document.where(key) for key in when if key in self.document.entries), self.document.name)

    def first(self, option: str, rows: tuple[Mapping[str, Any], ...], missing: list[Missing]) -> Value | None:
        """Return what the first row that holds says about an option."""
        for row in rows:
            if "before" in row and not self._is_before(row["before"]):
                continue
            if not self.holds(row.get("when", {})):
                continue
            value, notes, keys = self._row(option, row)
            self.used.update(row.get("when", {}), keys)
            missing += notes
            if value is None:
                continue
            return self._valued(row, value, [*keys, *row.get("when", {})])
        return None

    def _is_before(self, before: list[Any]) -> bool:
        library, release = before
        major, minor = release.split(".")
        return bool(getattr(self.versions, library) < (int(major), int(minor)))

    def _valued(self, row: Mapping[str, Any], value: Any, keys: list[str]) -> Value:
        stated = [key for key in keys if self.stated(key)]
        if stated and not row.get("soft"):
            key = stated[0]
            entry = self.document.entries[key]
            return Value(value, f"file {self.document.where(key)} {one_line(key, 60)}", True, tuple(stated), entry.line)
        where = next((self.framework.defaults[key].source for key in keys if key in self.framework.defaults), "")
        source = row.get("source") or where or self.framework.source
        adapts = bool(row.get("soft"))
        return Value(value, f"{self.framework.title} default: {source}", False, tuple(keys), adapts=adapts)

    def _row(self, option: str, row: Mapping[str, Any]) -> tuple[Any, list[Missing], list[str]]:
        """Return a row's value (None: it has none), what it leaves out, and the keys it was made from."""
        notes: list[Missing] = []
        if "collect" in row:
            names: list[str] = []
            keys: list[str] = []
            for sub in row["collect"]:
                if self.holds(sub.get("when", {})):
                    part, more, used = self._row(option, sub)
                    names += [part] if isinstance(part, str) else list(part or ())
                    notes += more
                    keys += [*used, *sub.get("when", {})]
            return tuple(dict.fromkeys(names)) or None, notes, keys
        if "from" not in row:
            return _tupled(row.get("value")), notes, []
        key = row["from"]
        raw = self.value(key)
        if raw is None:
            return None, notes, [key]
        where = self.document.where(key)
        if isinstance(raw, Unread):
            notes.append(
                Missing(f"{key} is {raw.text}, which only running the script would tell; give the option", where)
            )
            return None, notes, [key]
        if raw == "auto" and "map" not in row:
            return None, notes, [key]
        if "map" in row:
            raw = self._mapped(option, key, raw, row["map"], notes)
            if raw is None:
                return None, notes, [key]
        try:
            value = option_value(option, raw, row)
            if "over" in row:
                value = max(1, value // max(1, option_value(option, self.value(row["over"]) or 1, {})))
        except ValueError as error:
            raise InvalidInput(f"{where} {one_line(key, 60)} is {one_line(repr(raw))}; {error}; correct it") from None
        return value, notes, [key, *([row["over"]] if "over" in row else [])]

    def _mapped(self, option: str, key: str, raw: Any, name: Any, notes: list[Missing]) -> Any:
        """Translate a word, or each word of a list; an unknown one is reported and leaves the default."""
        table = self.framework.maps[name] if isinstance(name, str) else name
        if isinstance(raw, list):
            return [_plain_word(table.get(str(item), item)) for item in raw]
        found = table.get(_word(raw), table.get("*"))
        where = self.document.where(key)
        if found is None:
            text = f"{key} {one_line(str(raw), 40)!r} is not modelled; the default {option} is planned"
            notes.append(Missing(text, where))
            return None
        if isinstance(found, dict):
            if self.stated(key):
                notes.append(Missing(f"{key} {one_line(str(raw), 40)}: {found['note']}", where, found["effect"]))
            return found["value"]
        return raw if found == "=" else found


def _plain_word(found: Any) -> Any:
    return found["value"] if isinstance(found, dict) else found


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip().lower()[:200] if isinstance(value, (str, int, float)) else "?"


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _same(value: Any, wanted: Any) -> bool:
    """Compare as the frameworks do: words ignore case, "true" is true, 1 is not true."""
    if isinstance(wanted, bool) or isinstance(value, bool):
        return _word(value) == _word(wanted) if value is not None and wanted is not None else value is wanted
    if isinstance(value, str) and isinstance(wanted, str):
        return value.strip().lower() == wanted.lower()
    return bool(value == wanted)


def _contains(value: Any, text: str) -> bool:
    parts = value if isinstance(value, list) else [value]
    return any(text in str(part).lower()[:500] for part in parts[:1000] if isinstance(part, (str, dict)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TESTS: Mapping[str, Any] = {
    "not": lambda view, key, value, wanted: not view._meets(key, wanted),
    "contains": lambda view, key, value, text: _contains(value, text),
    "lacks": lambda view, key, value, text: not _contains(value, text),
    "over": lambda view, key, value, limit: _is_number(value) and value > limit,
    "given": lambda view, key, value, wanted: view.stated(key) is wanted,
    "on": lambda view, key, value, wanted: any(_same(value, off) for off in OFF) is not wanted,
    "null": lambda view, key, value, wanted: (key in view.document.entries and value_is_null(view, key)) is wanted,
    "list": lambda view, key, value, wanted: isinstance(value, (list, dict)) is wanted,
}
"""Conditions beyond equality: test name -> (view, key, value, argument) -> whether it is met."""


def value_is_null(view: _View, key: str) -> bool:
    """Whether the file writes the key without a value."""
    return view.document.get(key) is None


def _refusals(view: _View, one_gpu: bool) -> list[Missing]:
    """Raise for a job that is not planned; several GPUs become a warning where one is asked for."""
    taken = []
    for row in view.hold("refuse"):
        view.used.update(row["when"])
        where = view.spot(row["when"])
        if not row.get("gpus"):
            raise NotPlanned(f"{where}: {row['text']}")
        if not one_gpu:
            raise NotPlanned(
                f"{where}: {row['text']}, and loraplan plans one GPU; add --one-gpu to plan the same job unsharded"
            )
        taken.append(Missing(f"{row['text']}; planned unsharded on one GPU (--one-gpu)", where, "unknown"))
    return taken


def _missing(view: _View) -> list[Missing]:
    """Return the features a file asks for that the estimate lacks."""
    found = []
    for row in view.framework.missing:
        key = row["key"]
        entry = view.document.entries.get(key)
        if entry is None or isinstance(entry.value, Unread):
            continue
        if any(_same(entry.value, off) for off in row.get("unless", OFF)) or not view.holds(row.get("when", {})):
            continue
        found.append(Missing(f"{key}: {row['text']}", view.document.where(key), row.get("effect", "unknown")))
    return found


def _key_uses(view: _View) -> list[KeyUse]:
    """List every key of the file and every default that was looked at, with how it was taken."""
    framework = view.framework
    unsupported = {row["key"] for row in framework.missing} | {key for row in framework.refuse for key in row["when"]}
    neutral = set(framework.neutral)
    known = framework.known
    uses = []
    for key in leaves(view.document):
        value, where = view.document.get(key), view.document.where(key)
        prefixes = {key, *(key[:place] for place, ch in enumerate(key) if ch == ".")}
        if prefixes & view.used and prefixes & known:
            use = "used" if value is not None else "ignored"
        elif prefixes & unsupported:
            use = "unsupported"
        elif prefixes & (neutral | known):
            use = "ignored"
        else:
            use = "unknown"
        uses.append(KeyUse(key, use, value, where))
    for key in sorted(view.used):
        if not view.stated(key) and key in framework.defaults and framework.defaults[key].value is not None:
            uses.append(KeyUse(key, "default", framework.defaults[key].value, framework.defaults[key].source))
    return uses
