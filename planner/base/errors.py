"""The errors a user can cause, each with what was wrong, what is allowed and what to do next."""

from __future__ import annotations

from collections.abc import Iterable


class PlannerError(Exception):
    """Base of every error that means "could not answer" (exit code 2).

    The message is one line: what was wrong (with the value), what is allowed, what to do next.
    """


class UnknownName(PlannerError):
    """A model, GPU, family, module or option value that nothing here knows."""


class UnknownFamily(UnknownName):
    """A model_type that no family of the registry covers."""


class InvalidInput(PlannerError):
    """A file or value that cannot be read as what it claims to be."""


class Contradiction(PlannerError):
    """Two settings that exclude each other."""


class NotPlanned(PlannerError):
    """A job that can be read but is of a kind that is not planned here (several GPUs, reinforcement learning)."""


class MissingDependency(PlannerError):
    """An optional library that this answer needs; the message names the extra to install."""


def require(what: str, extra: str, *modules: str) -> None:
    """Check that optional libraries are installed before work begins.

    Raises:
        MissingDependency: naming what needs them, all that are missing, and the extra that brings them.
    """
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"{what} needs {', '.join(missing)}; pip install 'loraplan[{extra}]'")


def one_line(value: object, limit: int = 80) -> str:
    """Return `value` as printable text on one line, shortened to `limit` characters.

    Messages quote hostile input: control characters are escaped so that a terminal is not driven by them.
    """
    text = value if isinstance(value, str) else repr(value)
    text = "".join(ch if ch.isprintable() else ch.encode("unicode_escape", "replace").decode() for ch in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def unknown(what: str, value: object, allowed: Iterable[str], remedy: str = "") -> UnknownName:
    """Build the error for a value outside a known list, naming close matches first."""
    import difflib  # only needed on the error path

    names = list(allowed)
    close = difflib.get_close_matches(str(value)[:200], names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {one_line(', '.join(names), 300)}"
    return UnknownName(f"unknown {what} {one_line(value)!r}; {hint}" + (f" {remedy}" if remedy else ""))
