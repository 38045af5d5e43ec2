"""The picture of a fit: predicted over measured step times, of all bursts and of the held-out ones."""

from __future__ import annotations

import io
import math
from typing import Any

from planner.timing.coefficients import Calibration


def draw(c: Calibration, style: str) -> bytes:
    """Return the residual plot as png or svg. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = {"fitted": (c.report["rows"], "o"), **_held_out(c)}
    for name, (rows, marker) in series.items():
        times = [row["measured_s"] for row in rows]
        errors = [100 * (row["predicted_s"] / row["measured_s"] - 1) for row in rows]
        axes.plot(times, errors, marker, label=name, markersize=5, alpha=0.7)
    half = 100 * math.expm1(1.645 * (c.coefficients.formula_error or 0.0))
    axes.axhspan(100 * (1 / (1 + half / 100) - 1), half, color="0.9", label=f"interval, +/- {half:.0f} %")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("measured step (s)")
    axes.set_ylabel("predicted - measured (%)")
    axes.set_title(c.label, fontsize=10, parse_math=False)
    axes.legend(fontsize=8)
    out = io.BytesIO()
    metadata = {"Date": None} if style == "svg" else {"Software": None}  # the same calibration, the same file
    figure.savefig(out, format=style, dpi=130, metadata=metadata)
    return out.getvalue()


def _held_out(c: Calibration) -> dict[str, tuple[Any, str]]:
    marks = {"model": "x", "length": "+"}
    found = c.report.get("held_out_rows", {})
    return {f"left out by {name}": (rows, marks.get(name, ".")) for name, rows in found.items() if rows}
