"""The other way: how a framework writes an option of `planner.training.stacks`, from the same rows that read it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from planner.importers.frameworks import Framework


def key_values(framework: Framework, option: str, value: Any, stated: Container[str] = ()) -> dict[str, Any] | None:
    """Return the keys, with their values, that make a framework set `option` to `value`; None: it has no key for it.

    Where several spellings would do, one of the `stated` keys is taken, else one that the framework has a default for.
    """
    found = [w for row in framework.options.get(option, ()) if (w := _written(framework, row, value))]
    for wanted in (stated, framework.defaults):
        for written in found:
            if all(key in wanted for key in written):
                return written
    return found[0] if found else None


def _written(framework: Framework, row: Mapping[str, Any], value: Any) -> dict[str, Any] | None:
    if "before" in row or "collect" in row or "over" in row or "times" in row:
        return None
    if "from" in row:
        word = _word(framework, row, value)
        return None if word is None else {row["from"]: word}
    if row.get("value") != value or not row.get("when"):
        return None
    keys = {key: _stated(wanted) for key, wanted in row["when"].items()}
    return None if any(word is None for word in keys.values()) else keys


def _word(framework: Framework, row: Mapping[str, Any], value: Any) -> Any:
    if "map" not in row:
        return (not value) if row.get("invert") else list(value) if isinstance(value, tuple) else value
    table = framework.maps[row["map"]] if isinstance(row["map"], str) else row["map"]
    return next((word for word, ours in table.items() if ours == value), None)


def _stated(wanted: Any) -> Any:
    """Return a value that meets a condition, None if the condition names none."""
    if isinstance(wanted, list):
        return next((item for item in wanted if item is not None), None)
    return None if isinstance(wanted, dict) else wanted


def line_for(framework: Framework, option: str, value: Any, stated: Container[str] = ()) -> str:
    """Return the line of a config (or the arguments of a script) for an option; empty: the framework has none."""
    found = key_values(framework, option, value, stated)
    if not found:
        return ""
    script = "script" in framework.title
    return ", ".join(_script_words(found) if script else _yaml_words(found))


def _script_words(found: Mapping[str, Any]) -> Iterator[str]:
    for key, word in found.items():
        call, _, name = key.rpartition(".")
        yield f"{call}({name}={word!r})" if call else f"{name}={word!r}"


def _yaml_words(found: Mapping[str, Any]) -> Iterator[str]:
    for key, word in found.items():
        text = str(word).lower() if isinstance(word, bool) else str(word)
        yield ": ".join(key.split(".")) + f": {text}"
