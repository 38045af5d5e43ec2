"""The traps of configs for people, machines and GitHub: what, where, the cost, the line to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.base.errors import one_line
from planner.base.units import gib
from planner.importers.writing import line_for
from planner.plan.checks import Linted
from planner.plan.lint import Trap
from planner.report.config_checks import command
from planner.report.tables import json_text, table, wrapped

_REMEDIES = {
    "kbit_preparation": "drop the call of prepare_model_for_kbit_training",
    "experts": "quantize experts at load (axolotl: quantize_moe_experts: true), or choose a card with more memory",
}
"""What to do where the framework has no key for the change."""


def render(found: Sequence[Linted], style: str) -> str:
    """Return the findings as table, json, csv, markdown or github (workflow commands)."""
    if style == "json":
        return json_text({"schema_version": 1, "files": [_document(item) for item in found]})
    if style == "github":
        return "".join(_annotations(item) for item in found)
    if style == "table":
        return "\n".join(_text(item) for item in found)
    return table(style, COLUMNS, rows(found))


COLUMNS = ("file", "trap", "cost bytes", "cost seconds", "share", "where", "change", "what")


def rows(found: Sequence[Linted]) -> list[tuple[Any, ...]]:
    """A row for every trap, warning and file without an answer; sizes in bytes, times in seconds of a step."""
    listed: list[tuple[Any, ...]] = [
        (i.file, t.name, t.nbytes, t.seconds, t.share, _where(i, t)[0], _change(i, t), t.what)
        for i in found
        for t in i.traps
    ]
    listed += [(i.file, "warning", None, None, None, i.file, "", n) for i in found for n in i.notes]
    listed += [(i.file, "error", None, None, None, i.file, "", i.error) for i in found if i.error]
    return listed


def cost(trap: Trap) -> str:
    """Say what a trap costs in bytes and seconds, or that it costs neither."""
    if trap.fails and trap.share <= 0:
        return "does not start"
    parts = []
    if abs(trap.nbytes) >= 2**20:
        parts.append(f"{gib(trap.nbytes)} GiB")
    if trap.seconds > 0 or (parts and trap.seconds):
        parts.append(f"{trap.seconds:+.3f} s a step")
    return " and ".join(parts) + (f" ({trap.share * 100:.0f} %)" if parts else "") or "no memory and no time"


def _where(item: Linted, trap: Trap) -> tuple[str, int]:
    """Return "file:line key" of the setting, and the line (1 where the config leaves it out)."""
    value = item.job.given.get(trap.option) if item.job else None
    if value is None:
        return f"{item.file}: not set", 1
    return value.origin.removeprefix("file "), value.line or 1


def _change(item: Linted, trap: Trap) -> str:
    """Return the line of the config that avoids the trap."""
    for reading in reversed(item.job.readings if item.job else ()):
        line = line_for(reading.framework, trap.option, trap.better, reading.document.entries)
        if line:
            return line
    return _REMEDIES.get(trap.option, f"{trap.option}: {trap.better} (the framework has no key for it)")


def _text(item: Linted) -> str:
    if item.error or item.prediction is None:
        return wrapped(f"{one_line(item.file, 200)}: no answer: {item.error}", 80, "  ") + "\n"
    p = item.prediction
    head = f"{one_line(item.file, 200)}: {one_line(p.model.model_id, 80)}, peak {gib(p.device.expected)} GiB"
    lines = [head if item.traps else f"{head}: no traps"]
    for trap in item.traps:
        mark = "!!" if trap.serious else "  "
        lines.append(wrapped(f"{mark} {trap.name}: costs {cost(trap)}", 80, "     "))
        lines.append(wrapped(f"     {trap.what}", 80, "     "))
        lines.append(wrapped(one_line(f"     {_where(item, trap)[0]} -> {_change(item, trap)}", 1000), 80, "     "))
    lines += [wrapped(f"   warning: {one_line(note, 1000)}", 80, "     ") for note in item.notes]
    return "\n".join(lines) + "\n"


def _document(item: Linted) -> dict[str, Any]:
    if item.prediction is None:
        return {"file": item.file, "error": item.error, "traps": [], "warnings": []}
    found = [
        {
            "name": t.name, "what": t.what, "bytes": t.nbytes, "seconds": t.seconds, "share": t.share,
            "serious": t.serious, "starts": not t.fails, "where": _where(item, t)[0], "change": _change(item, t),
        }
        for t in item.traps
    ]  # fmt: skip
    model, peak = item.prediction.model.model_id, item.prediction.device.expected
    return {
        "file": item.file, "error": None, "model": model, "peak_device_bytes": peak, "traps": found,
        "warnings": list(item.notes),
    }  # fmt: skip


def _annotations(item: Linted) -> str:
    if item.error:
        return command("error", item.file, 1, "loraplan lint: no answer", item.error)
    notes = "".join(command("warning", item.file, 1, "loraplan lint", one_line(note, 500)) for note in item.notes)
    return notes + "".join(
        command(
            "error" if trap.serious else "warning", item.file, _where(item, trap)[1], f"loraplan lint: {trap.name}",
            f"costs {cost(trap)}: {trap.what}; change to {_change(item, trap)}",
        )
        for trap in item.traps
    )  # fmt: skip
