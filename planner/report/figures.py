"""Pictures of a report: memory bars against the card, memory through the step, time by class, speed over the batch.

Readable without colour and in print: every part has a pattern and a label. Needs matplotlib (the `plots` extra).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from planner.base.errors import MissingDependency, one_line
from planner.base.units import GiB
from planner.memory.walk import SegmentPeak
from planner.plan.compared import Compared
from planner.plan.speeds import Speed, speeds_of
from planner.report.comparison import Part, memory_parts, time_parts

HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++", "|||", "***", "OO", "//", "..")
SMALL_SHARE = 0.02
"""Parts that never reach this share of the largest bar are drawn together."""


class Picture(NamedTuple):
    """A drawn figure: its name, what it shows in words, and how to write it."""

    name: str
    caption: str
    figure: Any

    def svg(self) -> str:
        """The figure as an element to put into HTML; its text stays text."""
        text = self.data("svg").decode()
        start = text.index("<svg")
        label = one_line(self.caption, 300).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        body = re.sub(r"<metadata>.*?</metadata>", "", text[start:], flags=re.DOTALL)
        return body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def data(self, style: str) -> bytes:
        """The figure as png, svg or pdf."""
        import matplotlib

        out = io.BytesIO()
        metadata = {"Date": None} if style == "svg" else {}
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(out, format=style, dpi=150, metadata=metadata)
        return out.getvalue()


def drawn(items: Sequence[Compared]) -> list[Picture]:
    """Draw everything that the answers have, speed over the micro batch too."""
    return pictures(items, speeds_of([(label_of(item).replace("\n", ", "), item) for item in items]))


def pictures(items: Sequence[Compared], speeds: Sequence[Speed]) -> list[Picture]:
    """Draw everything that the answers have.

    Raises:
        MissingDependency: without matplotlib.
    """
    made = [memory_bars(items), *(timeline(item) for item in items)]
    if time_parts(items):
        made.append(time_bars(items))
    if speeds:
        made.append(speed_curve(speeds))
    return made


def _new(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("figures need matplotlib; pip install 'loraplan[plots]'") from error
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _large(parts: Sequence[Part]) -> list[Part]:
    """The parts worth drawing by themselves, the rest together."""
    number = len(parts[0].values)
    tops = [sum(max(part.values[n], 0) for part in parts) for n in range(number)]
    kept = [part for part in parts if any(part.values[n] > SMALL_SHARE * tops[n] for n in range(number))]
    rest = [part for part in parts if part not in kept]
    if rest:
        values = tuple(sum(max(part.values[n], 0) for part in rest) for n in range(number))
        kept.append(Part(rest[0].section, "other", values))
    return kept


def _bars(axes: Any, items: Sequence[Compared], parts: Sequence[Part], scale: float) -> None:
    from matplotlib import colormaps

    colours = colormaps["cividis"]
    below = [0.0] * len(items)
    places = list(range(len(items)))
    for number, part in enumerate(parts):
        shade = 0.12 + 0.88 * number / max(len(parts) - 1, 1)
        widths = [max(value, 0) / scale for value in part.values]
        axes.barh(
            places, widths, left=below, height=0.6, label=part.name, facecolor=colours(shade),
            hatch=HATCHES[number % len(HATCHES)], edgecolor="white" if shade < 0.45 else "black", linewidth=0.4,
        )  # fmt: skip
        below = [a + b for a, b in zip(below, widths, strict=True)]
    for place, total in zip(places, below, strict=True):
        axes.annotate(
            f" {total:,.2f}", (total, place), va="center", ha="left", fontsize=9, parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.set_yticks(places, [label_of(item) for item in items], fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, fontsize=8, frameon=False, handlelength=2.5)


def label_of(item: Compared) -> str:
    """A configuration on an axis: its letter, model and card."""
    p = item.prediction
    model = one_line(p.model.model_id.rpartition("/")[2], 28)
    return f"{item.label}  {model}\n{p.training.method}" + (f", {p.gpu.gpu_id}" if p.gpu else "")


def memory_bars(items: Sequence[Compared]) -> Picture:
    """A bar per configuration, stacked by component, against the card's capacity."""
    figure, axes = _new(9, 2.2 + 0.75 * len(items))
    _bars(axes, items, _large(memory_parts(items)), GiB)
    for place, item in enumerate(items):
        capacity = item.prediction.capacity_bytes / GiB
        if capacity:
            axes.plot([capacity, capacity], [place - 0.42, place + 0.42], color="black", linewidth=2.5)
            axes.annotate(
                f"card {capacity:,.1f}", (capacity, place - 0.42), ha="center", va="bottom", fontsize=8,
                parse_math=False,
            )  # fmt: skip
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_ylim(len(items) - 0.4, -0.7)
    axes.set_xlabel("GiB on the device at the peak")
    return Picture("memory", "Memory at the peak by component, against what the card has (thick line)", figure)


def timeline(item: Compared) -> Picture:
    """The highest level in every part of one step, in order, with the peak marked."""
    figure, axes = _new(9, 3.4)
    segments = [s for s in item.prediction.breakdown.segments if s.bytes]
    levels = [segment.bytes / GiB for segment in segments]
    edges = list(range(len(levels) + 1))
    axes.stairs(levels, edges, fill=True, facecolor="0.85", edgecolor="none")
    axes.stairs(levels, edges, color="black", linewidth=1.2)
    top = max(range(len(levels)), key=lambda n: levels[n])
    moment = item.prediction.breakdown.moment
    axes.plot([top + 0.5], [levels[top]], marker="v", color="black", markersize=8)
    left = top > len(levels) / 2
    axes.annotate(
        f"peak {levels[top]:,.2f} GiB: {moment} ({moment.op})", (top + 0.5, levels[top]),
        xytext=(-10 if left else 10, 8), textcoords="offset points", ha="right" if left else "left", fontsize=9,
        parse_math=False,
    )  # fmt: skip
    _phases(axes, segments)
    axes.set_xlim(0, len(levels))
    axes.set_ylim(0, max(levels) * 1.2)
    axes.set_ylabel("allocated, GiB")
    axes.grid(axis="y", alpha=0.4)
    caption = (
        f"{item.label}: highest level of allocated memory in every part of one step; "
        "runs of equal layers are drawn as four"
    )
    return Picture(f"timeline-{item.label}", caption, figure)


def _phases(axes: Any, segments: Sequence[SegmentPeak]) -> None:
    """Names of the phases below the stretch each takes."""
    ticks, labels, start = [], [], 0
    for number in range(1, len(segments) + 1):
        if number == len(segments) or segments[number].phase != segments[start].phase:
            if start:
                axes.axvline(start, color="0.5", linewidth=0.6, linestyle=":")
            ticks.append((start + number) / 2)
            labels.append(segments[start].phase)
            start = number
    axes.set_xticks(ticks, labels, rotation=30, ha="right", fontsize=8)


def time_bars(items: Sequence[Compared]) -> Picture:
    """A bar per configuration: seconds of a step by class of operation."""
    figure, axes = _new(9, 2.2 + 0.75 * len(items))
    _bars(axes, items, _large(time_parts(items)), 1.0)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_xlabel("seconds per optimizer step")
    return Picture("time", "Time of one optimizer step by class of operation", figure)


def speed_curve(speeds: Sequence[Speed]) -> Picture:
    """Tokens per second over the micro batch; hollow where it does not surely fit."""
    figure, axes = _new(9, 3.8)
    for number, speed in enumerate(speeds):
        style = ("-", "--", ":", "-.")[number % 4]
        marker = "osD^vP"[number % 6]
        colour = str(0.55 * (number % 3) / 2)
        axes.plot(speed.batches, speed.tokens_per_s, linestyle=style, color=colour, linewidth=1.3)
        for inside in (True, False):
            some = [
                (b, t) for b, t, f in zip(speed.batches, speed.tokens_per_s, speed.fits, strict=True) if f == inside
            ]
            axes.plot(
                [b for b, _ in some], [t for _, t in some], linestyle="none", marker=marker, color=colour,
                markerfacecolor=colour if inside else "white", label=speed.label if inside else None,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("micro batch, rows")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(0, 1.1 * max(rate for speed in speeds for rate in speed.tokens_per_s))
    axes.grid(alpha=0.4)
    axes.legend(fontsize=8)
    return Picture("speed", "Throughput over the micro batch; hollow points do not surely fit the card", figure)
