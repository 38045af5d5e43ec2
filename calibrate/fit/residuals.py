"""Predicted against measured: errors of times and of memory (of which nothing is fitted), and the CUDA context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calibrate.fit.measurements import Measurement
from planner.model import families
from planner.plan.predict import predict

if TYPE_CHECKING:
    from calibrate.fit.points import Point


def errors(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """Signed relative errors of predicted against measured seconds."""
    return [row["predicted_s"] / row["measured_s"] - 1 for row in rows]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`summary_of` the seconds of bursts."""
    return summary_of(errors(rows))


def summary_of(found: Sequence[float]) -> dict[str, Any]:
    """Number, mean and worst absolute value, and mean of signed relative errors, in percent."""
    if not found:
        return {"bursts": 0}
    worst = max(found, key=abs)
    return {
        "bursts": len(found),
        "mean_error_pct": 100 * sum(abs(e) for e in found) / len(found),
        "bias_pct": 100 * sum(found) / len(found),
        "worst_pct": 100 * worst,
    }


def memory_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Predicted and measured peaks of every GPU burst; nothing of the prediction is fitted."""
    rows, known = [], {}
    for item in points:
        measured = item.measurement.memory_bytes
        if not measured:
            continue
        key = item.measurement.key
        if key not in known:
            spec = families.build_spec(item.measurement.config, model_id=item.measurement.model)
            known[key] = predict(spec, item.training, item.gpu)
        predicted = {name: getattr(known[key], name).expected for name in measured}
        rows.append({"key": key, "measured_bytes": measured, "predicted_bytes": predicted})
    return rows


def memory_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and worst error by counter."""
    found = {}
    for name in ("allocated", "reserved", "device"):
        off = [
            row["predicted_bytes"][name] / row["measured_bytes"][name] - 1
            for row in rows
            if row["measured_bytes"].get(name)
        ]
        if off:
            found[name] = summary_of(off)
    return found


def context(items: Iterable[Measurement]) -> tuple[int, int, int] | None:
    """Device memory beyond the reserved peak: what formulas cannot know (context, libraries, workspaces)."""
    beyond = []
    for item in items:
        marks = item.result.get("memory", {}).values()
        reserved = max((mark.get("reserved", 0) for mark in marks), default=0)
        if reserved and "device" in item.memory_bytes:
            beyond.append(item.memory_bytes["device"] - reserved)
    beyond.sort()
    if not beyond:
        return None
    return max(beyond[0], 0), max(beyond[len(beyond) // 2], 0), max(beyond[-1], 0)
