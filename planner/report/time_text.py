"""The time and cost part of a report: seconds of a step and where they go, hours and USD of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from planner.base.errors import one_line
from planner.base.units import seconds
from planner.plan.answer import Answer
from planner.report.tables import aligned, wrapped
from planner.timing.step_time import Seconds, StepTime

if TYPE_CHECKING:
    from planner.runs.cost import RunPlan

PARTS = ("forward", "recomputation", "backward", "optimizer", "overhead")


def step_block(answer: Answer) -> str:
    """Seconds of an optimizer step, its parts, throughput and what bounds it; empty without a card."""
    p = answer.prediction
    if p.time is None:
        return "" if p.gpu is None else "time: no source states this card's rates\n"
    t = p.time
    interval = f"{seconds(t.step_s.low)} to {seconds(t.step_s.high)}"
    lines = [f"{'optimizer step':<23}{seconds(t.step_s.expected):>13}  {interval}"]
    parts = ", ".join(f"{name} {seconds(value)}" for name, value in parts_of(t) if value)
    repeated = f" (the first three {t.gradient_accumulation_steps} times)" if t.gradient_accumulation_steps > 1 else ""
    lines.append(wrapped(f"  {parts}{repeated}", 78, "  "))
    rate = f"{t.tokens_per_s:,.0f} tokens/s"
    if answer.mean_tokens:
        rate += f", {useful_rate(answer):,.0f} of them useful"
    utilization = f"MFU {t.model_flops_utilization * 100:.0f} %, HFU {t.hardware_flops_utilization * 100:.0f} %"
    lines.append(wrapped(f"  {rate}; {utilization}; bound by {t.bound}", 78, "  "))
    if t.coefficients.formula_error is not None:
        lines.append(wrapped(f"  {one_line(t.coefficients.label, 200)}", 78, "  "))
    return "\n".join(lines) + "\n" + (run_block(answer.run) if answer.run else "")


def parts_of(t: StepTime) -> Iterator[tuple[str, float]]:
    """(part, seconds): forward, recomputation and backward per micro batch, optimizer and overhead per step."""
    for name in PARTS:
        yield name, getattr(t, f"{name}_s")


def useful_rate(answer: Answer) -> float:
    """Useful tokens per second."""
    from planner.runs.cost import useful_tokens_per_step

    p = answer.prediction
    assert p.time is not None
    tokens = useful_tokens_per_step(p.time, answer.mean_tokens, p.training.seq_len)
    return float(tokens / p.time.step_s.expected)


def run_block(run: RunPlan) -> str:
    """Steps, hours, USD and energy of the whole run."""
    tokens = f"{run.tokens:,.0f} tokens in {run.optimizer_steps:,} optimizer steps"
    lines = [wrapped(f"{'run':<23}{_interval(run.hours, 'h')}: {tokens}", 78, "  ")]
    if run.usd is not None and run.price is not None:
        what = f"{run.price.usd_per_hour:,.3f} USD/h"
        where = " ".join(part for part in (run.price.instance_type, run.price.source, run.price.date) if part)
        lines.append(wrapped(f"  {_interval(run.usd, 'USD')} at {what} ({where})", 78, "  "))
    if run.energy_kwh is not None:
        lines.append(f"  at most {run.energy_kwh:,.2f} kWh (the card's power limit)")
    return "\n".join(lines) + "\n"


def _interval(value: Seconds, unit: str) -> str:
    return f"{value.expected:,.2f} {unit} ({value.low:,.2f} to {value.high:,.2f})"


def ledger_block(t: StepTime) -> str:
    """The time ledger by class of operation, which sums to the step, and the coefficients behind it."""
    rows: list[tuple[Any, ...]] = [
        (line.name, line.seconds, line.flops / 1e12, line.bytes / 1e9, round(line.launches), line.bound)
        for line in t.ledger
    ]
    rows.append(("launch wait", t.launch_wait_s, None, None, None, "host"))
    rows.append(("training loop", t.overhead_s, None, None, None, "host"))
    rows.append(("optimizer step", t.step_s.expected, t.hardware_flops / 1e12, None, None, t.bound))
    title = "where an optimizer step's time goes:\n"
    table = aligned(("class", "s", "TFLOP", "GB moved", "launches", "bound"), rows)
    bounds = f"bounds: {seconds(t.perfect_overlap_s)} if all overlaps, {seconds(t.no_overlap_s)} if nothing does\n"
    return title + table + bounds + _coefficients(t)


def _coefficients(t: StepTime) -> str:
    lines = ["coefficients of the time model, and what each adds to the interval:"]
    shares = dict(t.uncertainty)
    lines += [f"  +/- {100 * shares['formulas']:4.1f} %  what the formulas leave out  [assumed]"]
    for name, share in t.uncertainty:
        if name == "formulas":
            continue
        c = t.coefficients[name]
        text = f"  +/- {100 * share:4.1f} %  {name} = {c.value:.4g} {c.unit}  [{c.origin}: {c.source}]"
        lines.append(wrapped(text, 80, " " * 14))
    return "\n".join(lines) + "\n"


def time_data(answer: Answer) -> dict[str, Any] | None:
    """The time part of the JSON document; seconds, tokens and FLOPs as plain numbers."""
    t = answer.prediction.time
    if t is None:
        return None
    return {
        "step_s": _triple(t.step_s),
        **{f"{name}_s": value for name, value in parts_of(t)},
        "launch_wait_s": t.launch_wait_s,
        "perfect_overlap_s": t.perfect_overlap_s,
        "no_overlap_s": t.no_overlap_s,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "tokens_per_step": t.tokens,
        "tokens_per_s": t.tokens_per_s,
        "useful_tokens_per_s": useful_rate(answer) if answer.mean_tokens else None,
        "model_flops": t.model_flops,
        "hardware_flops": t.hardware_flops,
        "model_flops_utilization": t.model_flops_utilization,
        "hardware_flops_utilization": t.hardware_flops_utilization,
        "bound": t.bound,
        "ledger": [
            {"class": i.name, "s": i.seconds, "flops": i.flops, "bytes": i.bytes, "launches": i.launches,
             "bound": i.bound}
            for i in t.ledger
        ],
        "calibration": t.coefficients.label,
        "coefficients": [
            {"name": c.name, "value": c.value, "standard_error": c.standard_error, "unit": c.unit, "origin": c.origin,
             "source": c.source}
            for c in t.coefficients.values()
        ],
        "uncertainty": [{"reason": reason, "share": share} for reason, share in t.uncertainty],
    }  # fmt: skip


def run_data(run: RunPlan | None) -> dict[str, Any] | None:
    """The whole run in the JSON document."""
    if run is None:
        return None
    price = run.price
    return {
        "optimizer_steps": run.optimizer_steps,
        "rows_per_step": run.rows_per_step,
        "tokens": run.tokens,
        "hours": _triple(run.hours),
        "usd": _triple(run.usd) if run.usd else None,
        "energy_kwh_upper_bound": run.energy_kwh,
        "price": None if price is None else {
            "usd_per_hour": price.usd_per_hour, "source": price.source, "instance_type": price.instance_type,
            "gpu_count": price.gpu_count, "date": price.date,
        },
    }  # fmt: skip


def _triple(value: Seconds) -> dict[str, float]:
    return {"low": value.low, "expected": value.expected, "high": value.high}
