"""The reports of `loraplan max` and `loraplan pick`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from planner.base.errors import one_line
from planner.base.units import gib
from planner.plan.largest import Largest
from planner.plan.limits import UNITS, Picked, Reached
from planner.plan.pick import Judgement
from planner.plan.rows import Block, Caption
from planner.plan.verdict import ANSWERS
from planner.report import grid
from planner.report.tables import wrapped

CACHE = (
    "live memory (without unsplit blocks) and time exact; room is left for the allocator's cache, estimated from a "
    "replay of one pair"
)

Row = tuple[Any, ...]


def render_reached(answer: Reached, style: str, width: int = 0) -> str:
    """Return the largest number, or the largest pairs, as table, json, csv or markdown.

    Args:
        answer: what was found.
        style: the format; csv has no place for the warnings.
        width: columns that a table may take; 0: any.
    """
    if answer.found is None:
        return _laid_out(*frontier_rows(answer), style, width, Caption((CACHE,), {"basis": CACHE}), answer.warnings)
    if style == "table":
        return _words(answer, answer.found)
    columns, rows = number_rows(answer, answer.found)
    return _laid_out(columns, rows, style, width, Caption((), {}), answer.warnings)


def reached_table(answer: Reached) -> tuple[list[str], list[Row], Caption]:
    """Columns, rows and caption of the largest number, or of the largest pairs."""
    if answer.found is None:
        return *frontier_rows(answer), _captioned(Caption((CACHE,), {"basis": CACHE}), answer.warnings)
    return *number_rows(answer, answer.found), _captioned(Caption((), {}), answer.warnings)


def picked_table(answer: Picked) -> tuple[list[str], list[Row], Caption]:
    """Columns, rows and caption of the machine that was picked and of the others."""
    return *picked_rows(answer), _captioned(Caption((), {}), answer.warnings)


def _captioned(caption: Caption, warnings: Sequence[str]) -> Caption:
    """The caption with the notes of the plan."""
    lines = (*caption.lines, *(f"warning: {note}" for note in warnings))
    return Caption(lines, {**caption.data, "warnings": list(warnings)})


def number_rows(answer: Reached, found: Largest) -> tuple[list[str], list[Row]]:
    """The largest number as columns and one row."""
    p, card = found.prediction, answer.card
    row = (
        answer.plan.spec.model_id, card.gpu_id, found.value, found.probability, p.verdict if p else None,
        p.allocated.expected if p else None, p.device.expected if p else None,
        p.time.step_s.expected if p and p.time else None, p.time.tokens_per_s if p and p.time else None,
        found.limited_by,
    )  # fmt: skip
    columns = ["model", "gpu", found.key, "probability", "verdict", "allocated_bytes", "device_bytes", "step_s",
               "tokens_per_s", "limited_by"]  # fmt: skip
    return columns, [row]


def frontier_rows(answer: Reached) -> tuple[list[str], list[Row]]:
    """The largest pairs as columns and rows."""
    model, card = answer.plan.spec, answer.card
    rows = [(model.model_id, card.gpu_id, c.first, c.second, c.allocated_bytes, c.tokens_per_s) for c in answer.corners]
    return ["model", "gpu", *answer.keys, "allocated_bytes", "tokens_per_s"], rows


def _words(answer: Reached, found: Largest) -> str:
    p, card = found.prediction, answer.card
    if p is None or found.value is None:
        lines = [f"none: not even the smallest fits {card.name}; limit: {_why(found)}"]
        return "".join(f"{line}\n" for line in (*lines, *_notes(answer.warnings)))
    need = f"{gib(p.device.expected)} GiB ({gib(p.device.low)} to {gib(p.device.high)}) of {gib(p.capacity_bytes)}"
    lines = [
        f"{found.value:,} {UNITS[found.key]} on {card.name}",
        f"limit: {_why(found)}",
        f"peak {need}; fits says {ANSWERS[p.verdict]}",
    ]
    if p.time is not None:
        lines.append(f"{p.time.step_s.expected:,.3f} s per step, {p.time.tokens_per_s:,.0f} tokens/s")
    return "".join(f"{line}\n" for line in (*lines, *_notes(answer.warnings)))


def _notes(warnings: Sequence[str]) -> list[str]:
    return [wrapped(f"warning: {one_line(note, 1000)}", indent="  ") for note in warnings]


def _why(found: Largest) -> str:
    """What limits the answer, and how sure the part of it is that has a probability."""
    share = "over 99.9 %" if found.probability > 0.999 else f"{100 * found.probability:.1f} %"
    live = f"live memory, {share} sure to fit"
    if found.limited_by == "live memory":
        return live
    if found.limited_by == "what was tried":
        return f"what was tried (--up-to raises it); {live}"
    return f"the allocator's replay, which has no probability; {live}"


def render_picked(answer: Picked, style: str, width: int = 0) -> str:
    """Return the machine that was picked and why not the others, in a format of `render_reached`."""
    columns, rows = picked_rows(answer)
    head = ""
    if style == "table":
        if not any(row[2] and row[2] > 1 for row in rows):  # a line of 80 columns has little room
            columns, rows = [c for c in columns if c != "cards"], [(*row[:2], *row[3:]) for row in rows]
        if answer.found.answer is not None:
            head = f"{_headline(answer, answer.found.answer)}\n\n"
    return head + _laid_out(columns, rows, style, width, Caption((), {}), answer.warnings)


def picked_rows(answer: Picked) -> tuple[list[str], list[Row]]:
    """Every candidate with what it takes and why it was not taken, the answer first."""
    found = answer.found
    rows = [_row(item, f"picked{_paid_for(found.answer)}") for item in ([found.answer] if found.answer else [])]
    rows += [_row(item, item.reason) for item in found.rejected]
    return ["gpu", "machine", "cards", "usd_per_hour", "device_bytes", "hours", "usd", "reason"], rows


def _headline(answer: Picked, taken: Judgement) -> str:
    price = taken.candidate.price
    where = f" ({price.instance_type})" if price and price.instance_type else ""
    cost_words = f"{taken.usd:,.2f} USD" if taken.usd is not None else "no price known"
    return f"{taken.candidate.gpu.name}{where}: {taken.hours:,.2f} h, {cost_words} for {answer.much}"


def _row(item: Judgement, reason: str) -> Row:
    price = item.candidate.price
    machine = price.instance_type if price else None
    rate, cards = (price.usd_per_hour, price.gpu_count) if price else (None, None)
    return item.candidate.gpu.gpu_id, machine, cards, rate, item.device_bytes, item.hours, item.usd, reason


def _paid_for(item: Judgement | None) -> str:
    """That a machine has more cards than the run uses."""
    price = item.candidate.price if item is not None else None
    return f": pays for {price.gpu_count} cards, uses one" if price and price.gpu_count > 1 else ""


def _laid_out(
    columns: list[str], rows: list[Row], style: str, width: int, caption: Caption, warnings: Sequence[str]
) -> str:
    """A table with the notes of its plan: below it, under `warnings` in JSON, nowhere in CSV."""
    caption = _captioned(caption, warnings)
    if style == "csv":
        out = io.StringIO()
        arrays = {name: [row[n] for row in rows] for n, name in enumerate(columns)}
        grid.write_streamed("csv", out, columns, [Block({}, arrays, len(rows))], caption)
        return out.getvalue()
    return grid.whole(style, columns, rows, caption, width if style == "table" else 0).rstrip("\n") + "\n"
