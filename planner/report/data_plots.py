"""Pictures of lengths and of a simulated run, as PNG, SVG or PDF (the `plots` extra)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from planner.base.errors import InvalidInput, MissingDependency, one_line
from planner.base.outputs import whole_file

if TYPE_CHECKING:
    from planner.plan.simulate import Timeline
    from planner.runs.dataset.scan import Scan

KINDS = (".png", ".svg", ".pdf")


def _figure(path: str, panels: int) -> tuple[Any, list[Any]]:
    """A figure with `panels` stacked axes, without a window.

    Raises:
        PlannerError: an unknown ending, or no matplotlib.
    """
    if os.path.splitext(path)[1].lower() not in KINDS:
        raise InvalidInput(f"--plot {one_line(path, 100)!r}: the ending says the format; known: {', '.join(KINDS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("pictures need matplotlib (pip install 'loraplan[plots]')") from None
    figure = Figure(figsize=(8, 2.6 * panels + 0.6), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    return figure, list(axes)


def _save(figure: Any, path: str) -> None:
    # no date inside: the same input gives the same file
    style = os.path.splitext(path)[1].lower()
    extra = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(style, {})
    with whole_file(path, "wb") as file:
        figure.savefig(file, format=style.removeprefix("."), dpi=120, metadata=extra)


def lengths(found: Scan, limit: int, path: str) -> None:
    """Draw the histogram of row lengths with the length limit."""
    figure, (axis,) = _figure(path, 1)
    bins = found.lengths.histogram(60)
    axis.bar([a for a, _, _ in bins], [rows for _, _, rows in bins], width=bins[0][1] - bins[0][0] + 1, align="edge")
    if limit <= bins[-1][1]:
        axis.axvline(limit, color="tab:red", linestyle="--", label=f"cut at {limit:,}")
        axis.legend()
    axis.set_xlabel(f"tokens per row ({'counted' if not found.token_error else 'estimated'})")
    axis.set_ylabel("rows")
    axis.set_title(f"{len(found.lengths):,} rows, {found.lengths.total:,} tokens, template {found.template.name}")
    _save(figure, path)


def timeline(run: Timeline, path: str) -> None:
    """Draw learning rate, synthetic loss, step time and memory over the optimizer steps."""
    figure, (rate, loss, time, memory) = _figure(path, 4)
    rows = list(run)
    steps = [row.step for row in rows]
    rate.plot(steps, [row.learning_rate for row in rows])
    rate.set_ylabel("learning rate")
    loss.plot(steps, [row.synthetic_loss for row in rows], color="tab:gray")
    loss.set_ylabel("loss (synthetic)")
    loss.set_title("an illustration, not a prediction", fontsize=9)
    time.plot(steps, [row.step_s for row in rows], linewidth=0.8)
    time.set_ylabel("step (s)")
    memory.plot(steps, [row.memory_bytes / 2**30 for row in rows])
    memory.set_ylabel("device (GiB)")
    memory.set_xlabel("optimizer step")
    _save(figure, path)
