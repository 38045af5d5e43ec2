"""The picture of a trace: memory through the step, stacked by owner, the peak marked. Needs matplotlib."""

from __future__ import annotations

import io
from itertools import groupby
from typing import Any

from planner.base.units import GiB
from planner.memory.owners import CATEGORIES
from planner.plan.traced import TracedSegment
from planner.report.trace_view import TraceView, depth_words, peak_words, run_words

_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "|||", "***", "OO")
"""Patterns, so that owners are told apart without colour."""
_SHARE = 0.03
"""Owners that never hold this share of the peak are drawn together."""


def draw(view: TraceView, style: str) -> bytes:
    """Return the picture as png or svg: every segment of the step at its highest level, in order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _stack(axes, view)
    _mark_peak(axes, view)
    _axes(axes, view)
    figure.suptitle(f"{run_words(view)}\n{depth_words(view)}; peak {peak_words(view)}", fontsize=10, parse_math=False)
    out = io.BytesIO()
    metadata = {"Date": None} if style == "svg" else {"Software": None}  # the same trace, the same file
    figure.savefig(out, format=style, dpi=130, metadata=metadata)
    return out.getvalue()


def _stack(axes: Any, view: TraceView) -> None:
    """One band per owner; a segment is a step of width one."""
    from matplotlib import colormaps

    segments = view.traced.segments
    edges = list(range(len(segments) + 1))
    below = [0.0] * len(segments)
    bands = _bands(view)
    colours = colormaps["cividis"]
    for number, (name, values) in enumerate(bands):
        above = [b + v for b, v in zip(below, values, strict=True)]
        axes.fill_between(
            edges, [*below, below[-1]], [*above, above[-1]], step="post", label=name,
            facecolor=colours(0.15 + 0.85 * number / max(len(bands) - 1, 1)), hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor="white" if number < len(bands) / 3 else "black", linewidth=0.2,
        )  # fmt: skip
        below = above
    axes.step([*edges], [*below, below[-1]], where="post", color="black", linewidth=1)


def _bands(view: TraceView) -> list[tuple[str, list[float]]]:
    """GiB of every owner through the segments; small owners together."""
    segments, top = view.traced.segments, view.traced.peak.peak
    ledgers = [dict(s.ledger) for s in segments]
    bands, rest = [], [0.0] * len(segments)
    for name in CATEGORIES:
        values = [ledger.get(name, 0) / GiB for ledger in ledgers]
        if max(values) * GiB >= _SHARE * top:
            bands.append((name, values))
        else:
            rest = [a + b for a, b in zip(rest, values, strict=True)]
    return [*bands, ("other", rest)] if any(rest) else bands


def _mark_peak(axes: Any, view: TraceView) -> None:
    segments, top = view.traced.segments, view.traced.peak
    place = segments.index(top) + 0.5
    axes.plot([place], [top.peak / GiB], marker="v", color="black", markersize=9)
    left = place > len(segments) / 2
    axes.annotate(
        f"peak {top.peak / GiB:,.2f} GiB\n{top.op}", (place, top.peak / GiB), xytext=(-12 if left else 12, 8),
        textcoords="offset points", ha="right" if left else "left", va="bottom", fontsize=9, parse_math=False,
    )  # fmt: skip


def _axes(axes: Any, view: TraceView) -> None:
    ticks, labels, place = [], [], 0
    for name, part in groupby(view.traced.segments, key=_part):
        width = len(list(part))
        ticks.append(place + width / 2)
        labels.append(name)
        place += width
        axes.axvline(place, color="black", linewidth=0.5, linestyle=":")
    axes.set_xticks(ticks, labels, fontsize=9)
    axes.set_xlim(0, place)
    axes.set_ylim(0, view.traced.peak.peak / GiB * 1.2)
    axes.set_ylabel("allocated, GiB")
    axes.grid(axis="y", alpha=0.4)
    handles, found = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], found[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, handlelength=3)


def _part(segment: TracedSegment) -> str:
    """The stretch of the step that a segment is labelled with; the short ones at both ends go unnamed."""
    if segment.layer >= 0:
        return f"{segment.phase} of the layers"
    if segment.phase in ("loss", "head backward"):
        return "head\nand loss"
    return "optimizer" if segment.phase == "optimizer" else ""
