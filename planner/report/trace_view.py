"""What the reports about a trace share: its inputs, the timeline in few rows, the comparison with the program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from planner.base.errors import one_line
from planner.device.cuda_rules import Architecture
from planner.device.hardware import Gpu
from planner.facts.sources import LoadedConfig
from planner.memory.owners import CATEGORIES
from planner.memory.walk import MemoryBreakdown
from planner.plan.request import Plan
from planner.plan.traced import Traced, TracedSegment
from planner.plan.traced_answer import TracedStep
from planner.report.answer import moment_words, training_words
from planner.training.settings import Resolved
from planner.training.spec import TrainingSpec


class TraceView(NamedTuple):
    """Everything a report about one trace may print."""

    traced: Traced
    training: TrainingSpec
    gpu: Gpu | None
    arch: Architecture
    loaded: LoadedConfig
    resolved: Resolved
    stack: str | None
    program: MemoryBreakdown | None
    warnings: tuple[str, ...]
    explain: bool


def view_of(plan: Plan, step: TracedStep, *, explain: bool = False) -> TraceView:
    """What a report about a traced step may print."""
    return TraceView(
        step.traced, plan.training, plan.card, step.arch, plan.config, plan.resolved, plan.stack, step.program,
        step.notes, explain,
    )  # fmt: skip


class Stretch(NamedTuple):
    """A row of the timeline: one segment, or a run of equal layers by its first, highest and last level."""

    name: str
    start: int
    peak: int
    end: int
    segments: int = 1


class Difference(NamedTuple):
    """One owner of memory as the trace and the program see it; bytes."""

    name: str
    trace: int
    program: int


def run_words(view: TraceView) -> str:
    """Describe the run in a line."""
    return training_words(one_line(view.traced.model.model_id.rpartition("/")[2], 50), view.training)


def card_words(view: TraceView) -> str:
    """Name the card whose kernels were imitated."""
    capability = ".".join(map(str, view.arch.capability))
    if view.gpu is None:
        return f"kernels of compute capability {capability} (an A100's; --gpu names another card)"
    return f"kernels of {one_line(view.gpu.name, 40)} (compute capability {capability})"


def peak_words(view: TraceView) -> str:
    """Say where in the step the peak is."""
    recomputed = view.training.gradient_checkpointing != "none"
    return moment_words(view.traced.moment, view.traced.model.num_layers, recomputed)


def program_peak_words(view: TraceView) -> str:
    """Say where in the step the program's peak is."""
    assert view.program is not None
    recomputed = view.training.gradient_checkpointing != "none"
    return moment_words(view.program.moment, view.traced.model.num_layers, recomputed)


def depth_words(view: TraceView) -> str:
    """Say which stacks were run."""
    t = view.traced
    if not t.extrapolated:
        return f"all {t.model.num_layers} layers traced"
    return f"{' and '.join(map(str, t.traced_layers))} of {t.model.num_layers} layers traced, the rest extrapolated"


def version_words(view: TraceView) -> str:
    """Name the releases that ran."""
    return ", ".join(f"{name} {release.split('+')[0]}" for name, release in view.traced.versions)


def stretches(segments: tuple[TracedSegment, ...]) -> Iterator[Stretch]:
    """Yield the timeline with the layers between the first and the last of a direction as one row."""
    middle: list[TracedSegment] = []
    for before, segment, after in zip((None, *segments), segments, (*segments[1:], None), strict=False):
        inside = before is not None and after is not None and before.phase == segment.phase == after.phase
        if segment.layer >= 0 and inside:
            middle.append(segment)
            continue
        if middle:
            yield _run_of(middle)
            middle = []
        name = f"layer {segment.layer + 1}, {segment.phase}" if segment.layer >= 0 else segment.name
        yield Stretch(name, segment.start, segment.peak, segment.end)


def _run_of(middle: list[TracedSegment]) -> Stretch:
    first, last = middle[0], middle[-1]
    numbers = f"layers {first.layer + 1} to {last.layer + 1}" if first is not last else f"layer {first.layer + 1}"
    return Stretch(f"{numbers}, {first.phase}", first.start, max(s.peak for s in middle), last.end, len(middle))


def differences(view: TraceView) -> tuple[Difference, ...]:
    """Return the ledgers of trace and program side by side, then their totals."""
    assert view.program is not None
    ours, theirs = dict(view.program.ledger), dict(view.traced.peak.ledger)
    rows = [Difference(n, theirs.get(n, 0), ours.get(n, 0)) for n in CATEGORIES if n in ours or n in theirs]
    rows.append(Difference("static", view.traced.static_bytes, view.program.static_bytes))
    rows.append(Difference("peak", view.traced.peak.peak, view.program.peak_allocated_bytes))
    return tuple(rows)


def operations(view: TraceView) -> list[tuple[str, dict[str, float]]]:
    """Return (operation, FLOPs by phase), most first."""
    phases = view.traced.flops
    names = dict.fromkeys(op for counts in phases.values() for op in counts)
    rows = [(name, {phase: counts.get(name, 0.0) for phase, counts in phases.items()}) for name in names]
    return sorted(rows, key=lambda row: -sum(row[1].values()))
