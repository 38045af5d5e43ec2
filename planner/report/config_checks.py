"""What a check of several training configs found, one row per file; as GitHub annotations too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.base.errors import one_line
from planner.base.units import GiB, gib
from planner.device.hardware import Gpu
from planner.plan.checks import Check
from planner.plan.request import counted
from planner.plan.verdict import ANSWERS, CLOSE, FITS, NO, Verdict
from planner.report.answer import run_words
from planner.report.tables import escape, json_text, table, wrapped

HEADERS = ("file", "verdict", "peak GiB", "up to", "left", "run")


def render(checks: Sequence[Check], card: Gpu, style: str) -> str:
    """Return the checks as table, json, csv, markdown or github (workflow commands)."""
    if style == "json":
        return json_text(document(checks, card))
    if style == "github":
        return "".join(annotation(check, card) for check in checks) + _summary(checks, card)
    text = table(style, HEADERS, [_row(check) for check in checks])
    if style == "markdown":
        return text + "".join(f"\n- {escape(line)}" for line in notes(checks)) + ("\n" if notes(checks) else "")
    if style == "csv":
        return text
    return f"{text}\n{_summary(checks, card)}" + "".join(f"{wrapped(line, indent='  ')}\n" for line in notes(checks))


def notes(checks: Sequence[Check]) -> list[str]:
    """Distinct warnings of all files, with how many of them each concerns where that is not all."""
    answered = [check.answer.prediction for check in checks if check.answer is not None]
    found = counted((tuple(dict.fromkeys(p.warnings)), 1) for p in answered)
    return [
        f"warning{f' ({n} of {len(checks)} files)' if n < len(checks) else ''}: {one_line(note, 1000)}"
        for note, n in found
    ]


def document(checks: Sequence[Check], card: Gpu) -> dict[str, Any]:
    """Return the checks as plain JSON values; bytes are whole numbers."""
    return {
        "schema_version": 1,
        "gpu": card.gpu_id,
        "fits": all(check.verdict == FITS for check in checks),
        "files": [_entry(check) for check in checks],
    }


def _entry(check: Check) -> dict[str, Any]:
    entry: dict[str, Any] = {"file": check.file, "verdict": check.verdict, "error": check.error or None}
    if check.answer is not None:
        p = check.answer.prediction
        entry |= {
            "model": p.model.model_id,
            "run": run_words(check.answer),
            "device": {"low": p.device.low, "expected": p.device.expected, "high": p.device.high},
            "headroom_bytes": p.headroom_bytes,
            "warnings": list(p.warnings),
        }
    return entry


def _row(check: Check) -> tuple[Any, ...]:
    if check.answer is None:
        return (check.file, "?", None, None, None, check.error)
    p = check.answer.prediction
    sizes = (p.device.expected / GiB, p.device.high / GiB, p.headroom_bytes / GiB)
    return (check.file, ANSWERS[p.verdict], *sizes, run_words(check.answer))


def _summary(checks: Sequence[Check], card: Gpu) -> str:
    counts = {word: sum(1 for c in checks if c.verdict == verdict) for verdict, word in COUNTED}
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    return f"{len(checks)} files on {one_line(card.name, 40)} ({gib(card.memory_bytes)} GiB): {', '.join(parts)}\n"


COUNTED: tuple[tuple[Verdict | None, str], ...] = (
    (FITS, "fit"),
    (NO, "do not fit"),
    (CLOSE, CLOSE),
    (None, "without an answer"),
)

# --- GitHub -------------------------------------------------------------------------------------------------------


def annotation(check: Check, card: Gpu) -> str:
    """Return a workflow command for a file that is not known to fit, a notice for one that does.

    The format is that of actions/toolkit docs/commands.md: `%`, CR and LF are escaped in the message, and `:` and `,`
    in properties too, so that a file's name or a model's cannot start a command of its own.
    """
    if check.answer is None:
        return command("error", check.file, 1, "loraplan: no answer", check.error)
    p = check.answer.prediction
    size = f"{gib(p.device.expected)} GiB (up to {gib(p.device.high)}) of {gib(p.capacity_bytes)} on {card.name}"
    kind = "notice" if p.verdict == FITS else "error"
    lines = [
        command(kind, check.file, check.line, f"loraplan: {p.verdict or NO}", f"{run_words(check.answer)}: peak {size}")
    ]
    for warning in p.warnings:
        lines.append(command("warning", check.file, check.line, "loraplan", one_line(warning, 500)))
    return "".join(lines)


def command(kind: str, file: str, line: int, title: str, message: str) -> str:
    """Return a workflow command that annotates a line of a file; its parts cannot end it or start another."""
    return f"::{kind} file={_property(file)},line={line},title={_property(title)}::{_data(message)}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
