"""The report of `loraplan simulate`: five blocks and the timeline as a table, JSON, JSON lines, CSV or Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from planner.base.errors import one_line
from planner.base.units import gib, seconds
from planner.plan.simulate import DISK_BYTES_PER_S, Step, Timeline, Totals
from planner.plan.simulated import Simulated
from planner.report.answer import run_words
from planner.report.tables import aligned, csv_text, escape, json_text, markdown, wrapped

SCHEMA_VERSION = 1
SYNTHETIC = "synthetic_loss and synthetic_grad_norm are an illustration drawn from the seed, not a prediction"
MAX_LINES = 20
"""Steps that the table shows unless it is told how many."""


class Simulation(NamedTuple):
    """A timeline with the words around it."""

    timeline: Timeline
    closed: Totals
    """The same run without drawing batches."""
    run_words: str
    card: str
    data: str
    """Where the lengths come from."""
    every: int
    """Print every so many steps; 0: about twenty of them."""
    notes: tuple[str, ...] = ()
    price: str = ""


def simulation_of(played: Simulated, every: int = 0) -> Simulation:
    """The words around a run that was played through; every so many steps are printed (0: about twenty of them)."""
    card = played.answer.prediction.gpu
    price = played.price
    where = " ".join(part for part in (price.instance_type or price.source, price.date) if part) if price else ""
    return Simulation(
        timeline=played.timeline,
        closed=played.closed,
        run_words=run_words(played.answer),
        card=card.name if card is not None else "",
        data=_data_words(played),
        every=every,
        notes=played.notes,
        price=f"{price.usd_per_hour:,.3f} USD/h ({where})" if price else "",
    )


def _data_words(played: Simulated) -> str:
    """Where the lengths come from."""
    if played.answer.data is None:
        training, lengths = played.answer.prediction.training, played.timeline.plan.lengths
        tokens = f"{played.rows:,} rows of {lengths.longest or 1:,} tokens"
        return f"{tokens}, padded to {training.seq_len:,} (no data given)"
    scan = played.answer.data.found
    return f"{len(scan.lengths):,} rows as {scan.template.name}, {scan.lengths.total:,} tokens ({scan.token_label})" + (
        f"; {scan.num_problems:,} rows left out" if scan.num_problems else ""
    )


COLUMNS = (
    "step", "epoch", "learning_rate", "synthetic_loss", "synthetic_grad_norm", "rows", "tokens", "useful_tokens",
    "step_s", "pause_s", "event", "tokens_per_s", "memory_gib", "elapsed_s", "remaining_s", "usd",
)  # fmt: skip


def shown(simulation: Simulation) -> Iterator[Step]:
    """The steps that are printed: every n-th, those with a pause, the first and the last."""
    steps = len(simulation.timeline)
    every = simulation.every or max(1, -(-steps // MAX_LINES))
    for step in simulation.timeline:
        if step.step % every == 0 or step.step in (1, steps) or (step.event and not simulation.every):
            yield step


def cells(step: Step) -> dict[str, Any]:
    """One step as plain values, memory in GiB."""
    row = step._asdict()
    memory = row.pop("memory_bytes")
    row["memory_gib"] = memory / 2**30
    return {name: row[name] for name in COLUMNS}


def render(simulation: Simulation, style: str) -> str:
    """Return the report in one of its formats."""
    if style == "json":
        return json_text(document(simulation))
    if style == "jsonl":
        return "".join(f"{line(step)}\n" for step in all_steps(simulation))
    if style == "csv":
        return csv_text(COLUMNS, [tuple(cells(step).values()) for step in all_steps(simulation)])
    return _markdown(simulation) if style == "markdown" else _text(simulation)


def all_steps(simulation: Simulation) -> Iterator[Step]:
    """Machines get every step unless --every says otherwise."""
    return shown(simulation) if simulation.every else iter(simulation.timeline)


def line(step: Step) -> str:
    """One step as a line of JSON."""
    return json.dumps(cells(step), allow_nan=False)


def document(simulation: Simulation) -> dict[str, Any]:
    """The whole run as plain JSON values."""
    timeline, totals = simulation.timeline, simulation.timeline.totals()
    low, high = timeline.cost.spread()
    return {
        "schema_version": SCHEMA_VERSION,
        "synthetic": SYNTHETIC,
        "assumed": {"checkpoint_bytes_per_s": DISK_BYTES_PER_S},
        "seed": timeline.plan.seed,
        "steps": {
            "total": timeline.steps.total,
            "per_epoch": timeline.steps.per_epoch,
            "per_epoch_floor": timeline.steps.per_epoch_floor,
            "per_epoch_trainer": timeline.steps.per_epoch_ceil,
            "total_floor": timeline.steps.floor_total,
            "total_trainer": timeline.steps.ceil_total,
            "warmup": timeline.schedule.warmup_steps,
        },
        "learning_rate": {"peak": timeline.schedule.peak, "peak_reached": timeline.schedule.peak_reached},
        "totals": _totals(totals),
        "closed_form": _totals(simulation.closed),
        "interval": {"low": low, "high": high},
        "history": history(simulation),
        "warnings": [*simulation.notes, *timeline.warnings()],
        "timeline": [cells(step) for step in all_steps(simulation)],
    }


def _totals(totals: Totals) -> dict[str, Any]:
    return {
        "steps": totals.steps,
        "rows": totals.rows,
        "tokens": totals.tokens,
        "useful_tokens": totals.useful_tokens,
        "train_s": totals.train_s,
        "pause_s": totals.pause_s,
        "hours": totals.seconds / 3600,
        "useful_tokens_per_s": totals.useful_tokens_per_s,
        "usd": totals.usd,
        "memory_gib": totals.memory_bytes / 2**30,
    }


def history(simulation: Simulation) -> dict[str, Any] | None:
    """Summaries of the steps: synthetic losses, and seconds and tokens/s at the median and the 95th percentile."""
    times = sorted(simulation.timeline.step_s)
    if not times:
        return None
    losses = [step.synthetic_loss for step in simulation.timeline]
    rates = sorted(t / s for t, s in zip(simulation.timeline.tokens, simulation.timeline.step_s, strict=True))
    return {
        "synthetic_loss": {
            "first": losses[0],
            "last": losses[-1],
            "min": min(losses),
            "mean": sum(losses) / len(losses),
        },
        "step_s": {"p50": _rank(times, 0.5), "p95": _rank(times, 0.95), "max": times[-1]},
        "tokens_per_s": {"p5": _rank(rates, 0.05), "p50": _rank(rates, 0.5)},
    }


def _rank(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


# --- text -----------------------------------------------------------------------------------------------------------

HEADERS = ("step", "epoch", "lr", "loss*", "norm*", "tokens", "s", "tokens/s", "GiB", "elapsed", "left", "USD", "pause")


def table_row(step: Step) -> tuple[str, ...]:
    """One step as the table prints it."""
    return (
        f"{step.step:,}", f"{step.epoch:.2f}", f"{step.learning_rate:.2e}", f"{step.synthetic_loss:.3f}",
        f"{step.synthetic_grad_norm:.2f}", f"{step.tokens:,}", f"{step.step_s:.2f}", f"{step.tokens_per_s:,.0f}",
        gib(step.memory_bytes), clock(step.elapsed_s), clock(step.remaining_s), f"{step.usd:.2f}", step.event,
    )  # fmt: skip


def clock(value: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(int(value), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def summary(simulation: Simulation) -> list[str]:
    """The run in lines: data, adapter, steps, schedule, totals."""
    timeline, totals, closed = simulation.timeline, simulation.timeline.totals(), simulation.closed
    plan, steps, rate = timeline.plan, timeline.steps, timeline.schedule
    how = plan.batching
    low, high = timeline.cost.spread()
    lines = [
        f"run      {simulation.run_words}{f', on {simulation.card}' if simulation.card else ''}",
        f"data     {simulation.data}",
        f"batches  {how.batch} x {plan.accumulation} rows, padding {how.padding}, cut at {how.limit:,} tokens",
        f"steps    {steps.total:,}: {steps.per_epoch:,} per epoch x {plan.epochs:g} "
        f"(floor {steps.per_epoch_floor:,}, the Trainer's ceil {steps.per_epoch_ceil:,}; "
        f"in all {steps.floor_total:,} or {steps.ceil_total:,})",
        f"rate     {rate.shape}, peak {rate.peak:g} (reached: {rate.peak_reached:.3g}), "
        f"warm-up {rate.warmup_steps:,} steps",
    ]  # fmt: skip
    if not totals.steps:
        return lines
    lines += [
        f"time     {clock(totals.seconds)} ({clock(totals.seconds * low)} to {clock(totals.seconds * high)}), of it "
        f"{seconds(totals.pause_s)} checkpoints ({DISK_BYTES_PER_S / 1e9:g} GB/s assumed) and evaluations; closed form "
        f"{clock(closed.seconds)}",
        f"tokens   {totals.tokens:,.0f} computed, {totals.useful_tokens:,.0f} useful: "
        f"{totals.useful_tokens_per_s:,.0f} useful tokens/s",
        f"memory   {gib(totals.memory_bytes)} GiB expected at the longest batch",
    ]
    if simulation.price:
        lines.append(f"cost     {totals.usd:,.2f} USD at {simulation.price}")
    return lines


def _text(simulation: Simulation) -> str:
    lines = [wrapped(one_line(text, 400), 80, " " * 9) for text in summary(simulation)]
    table = aligned(HEADERS, [table_row(step) for step in shown(simulation)]) if len(simulation.timeline) else ""
    star = f"* {SYNTHETIC}\n" if table else ""
    notes = [*simulation.notes, *simulation.timeline.warnings()]
    warnings = "".join(f"{wrapped(f'warning: {note}', 80, '  ')}\n" for note in notes)
    return "\n".join(block for block in ("\n".join(lines) + "\n", table + star, warnings) if block)


def _markdown(simulation: Simulation) -> str:
    notes = [*simulation.notes, *simulation.timeline.warnings()]
    blocks = [
        "\n".join(f"- {escape(text)}" for text in summary(simulation)),
        markdown(HEADERS, [table_row(step) for step in shown(simulation)]).rstrip(),
        f"\\* {escape(SYNTHETIC)}.",
        "\n".join(f"- Warning: {escape(note)}" for note in notes),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"
