"""The agreement suite: the analytical program against the trace of the real libraries, case by case.

`python -m calibrate.oracle.agreement --cases 200` draws configurations (calibrate.oracle.cases), runs both sides and
prints each difference; nothing is filtered. The program is run with the rule of a dispatch mode (gradients are added
out of place), because that is what the trace sees. What agreement means:

- peak: requested bytes of the second step; within 0.1 % in 95 % of the cases, never beyond 1 %;
- moment: both peaks lie in the same segment (embedding, forward of layer i, head and loss, their backward, backward of
  layer i, optimizer), or the trace's level in the program's segment is within 0.1 % of its peak (a tie);
- components: every category of planner.memory.owners.CATEGORIES, at that moment, within 1 % of the trace's bytes or
within
  0.1 % of its peak.

A configuration that both sides refuse is listed with the reasons; one that a single side refuses is a failure.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.oracle.cases import MODELS, Case, cases, draw, shrunk
from planner.base.errors import PlannerError
from planner.device.cuda_rules import Architecture
from planner.memory import walk
from planner.memory.owners import CATEGORIES
from planner.model.families import build_spec
from planner.step import program
from planner.step.engine import Record

if TYPE_CHECKING:  # torch is loaded when the first case runs
    from calibrate.oracle.result import TraceResult

PEAK_PCT, WORST_PCT = 0.1, 1.0
COMPONENT_PCT, COMPONENT_OF_PEAK_PCT = 1.0, 0.1
REFUSALS = (PlannerError, ValueError, RuntimeError, AttributeError, TypeError, KeyError, AssertionError)


class Refused(Exception):
    """The program, the libraries or both do not run a case; the reason of each that does not."""

    def __init__(self, ours: Exception | None, theirs: Exception | None) -> None:
        reasons = {"program": ours, "libraries": theirs}
        told = [f"{who}: {type(e).__name__} {str(e).splitlines()[0][:110]}" for who, e in reasons.items() if e]
        super().__init__("; ".join(told))
        self.by_both = ours is not None and theirs is not None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What both sides said about one case; bytes of the second step."""

    case: Case
    program_bytes: int
    trace_bytes: int
    program_segment: str
    program_op: str
    trace_segment: str
    trace_phase: str
    trace_op: str
    same_moment: bool
    components: tuple[tuple[str, int, int], ...]
    """(category, program, trace) of categories that do not agree."""
    layers: int
    seconds: float

    @property
    def error_pct(self) -> float:
        """Program against trace."""
        return 100 * (self.program_bytes - self.trace_bytes) / self.trace_bytes

    @property
    def moment(self) -> str:
        """Where the trace peaks, in words that do not depend on the depth."""
        return moment_name(self.trace_segment, self.trace_phase, self.layers)

    def describe(self) -> dict[str, Any]:
        """Return the outcome as plain JSON values."""
        return {
            "case": self.case.label(), "error_pct": self.error_pct, "program_bytes": self.program_bytes,
            "trace_bytes": self.trace_bytes, "moment": self.moment, "same_moment": self.same_moment,
            "program_place": f"{self.program_segment} {self.program_op}",
            "trace_place": f"{self.trace_segment} {self.trace_op}",
            "components": [list(c) for c in self.components], "seconds": self.seconds,
        }  # fmt: skip


def run(case: Case, arch: Architecture | None = None) -> Outcome:
    """Run both sides of one case.

    Raises:
        Refused: at least one side does not run it.
    """
    from calibrate.oracle.ledger import ledger_at

    start = time.perf_counter()
    record, theirs = _both(case, arch or Architecture())
    ours = walk.breakdown(record, block=1)
    segment, at = segment_of(record, ours), theirs.peak_event
    levels = theirs.segment_peak_events
    peak = theirs.events[at]
    same = segment == merged(peak.segment)
    if not same:
        tied = [n for n in levels if merged(n) == segment]
        tied = [n for n in tied if theirs.segment_peaks[n] >= theirs.peak_bytes * (1 - PEAK_PCT / 100)]
        if tied:
            same, at = True, levels[tied[0]]
    return Outcome(
        case=case,
        program_bytes=ours.peak_allocated_bytes,
        trace_bytes=theirs.peak_bytes,
        program_segment=segment,
        program_op=ours.moment.op,
        trace_segment=merged(peak.segment),
        trace_phase=peak.phase,
        trace_op=peak.op,
        same_moment=same,
        components=differing(ours.ledger, ledger_at(theirs, at), theirs.peak_bytes),
        layers=theirs.layers,
        seconds=time.perf_counter() - start,
    )


def _both(case: Case, arch: Architecture) -> tuple[Record, TraceResult]:
    from calibrate.oracle.trace import trace

    record = result = failed = None
    try:
        spec = build_spec(case.config, model_id=case.model_id)
        record = program.run(spec, case.training, arch, full_depth=True, accumulates_in_place=False).record
    except REFUSALS as error:
        failed = error
    try:
        result = trace(case.config, case.training, arch=arch)
    except REFUSALS as error:
        raise Refused(failed, error) from error
    if record is None:
        raise Refused(failed, None)
    return record, result


def differing(
    ours: tuple[tuple[str, int], ...], theirs: tuple[tuple[str, int], ...], peak: int
) -> tuple[tuple[str, int, int], ...]:
    """The categories that disagree: by more than 1 % of the trace's bytes and more than 0.1 % of its peak."""
    left, right = dict(ours), dict(theirs)
    found = []
    for name in CATEGORIES:
        a, b = left.get(name, 0), right.get(name, 0)
        if abs(a - b) > max(b * COMPONENT_PCT, peak * COMPONENT_OF_PEAK_PCT) / 100:
            found.append((name, a, b))
    return tuple(found)


def merged(segment: str) -> str:
    """The trace tells the head from the loss, the program does not."""
    return "head and loss" if segment in ("head", "loss") else segment


def segment_of(record: Record, found: walk.MemoryBreakdown) -> str:
    """The name that the trace gives to the segment of the program's peak."""
    phase, layer = found.moment.phase, found.moment.layer
    if phase in ("inputs", "embedding"):
        return "embedding"
    if phase in ("forward", "backward") and layer >= 0:
        return f"layer.{layer} {phase}"
    if phase != "backward":
        return {"loss": "head and loss"}.get(phase, phase)
    began = False
    for segment in found.segments:  # outside the layers: the head before them, the embedding after
        began = began or (segment.phase == "backward" and segment.layer >= 0)
        if (segment.phase, segment.layer, segment.bytes) == (phase, layer, found.peak_allocated_bytes):
            break
    return "layer.0 backward" if began else "head backward"


def moment_name(segment: str, phase: str, layers: int) -> str:
    """A segment of a trace in words that do not depend on the depth."""
    if not segment.startswith("layer."):
        return segment
    index = int(segment.removeprefix("layer.").split()[0])
    which = "first layer" if index == 0 else "last layer" if index == layers - 1 else "middle layer"
    return f"{which}, {'recomputation' if phase == 'recompute' else segment.split()[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; exit 0 if everything agrees as the module's docstring says, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="run these case numbers only (from 0)")
    parser.add_argument("-o", "--output", type=Path, help="write one JSON line per case")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    outcomes: list[Outcome] = []
    refused: Counter[str] = Counter()
    alone = 0
    lines: list[str] = []
    for number, case in enumerate(cases(options.cases, options.seed)):
        if options.only and number not in options.only:
            continue
        try:
            found = run(case)
        except Refused as error:
            refused[str(error)] += 1
            alone += not error.by_both
            print(
                f"{number:4d} {'refused' if error.by_both else 'REFUSED BY ONE'}  {case.label()}: {error}", flush=True
            )
            lines.append(json.dumps({"case": case.label(), "refused": str(error), "by_both": error.by_both}))
            continue
        outcomes.append(found)
        _show(number, found)
        lines.append(json.dumps(found.describe()))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _summary(outcomes, refused, alone)


def _show(number: int, found: Outcome) -> None:
    mark = " " if abs(found.error_pct) <= PEAK_PCT else "!" if abs(found.error_pct) <= WORST_PCT else "X"
    moment = " " if found.same_moment else "M"
    part = "C" if found.components else " "
    place = f"{found.program_segment}: {found.program_op}"
    if found.program_segment != found.trace_segment:
        place += f" | trace {found.trace_segment}"
    place += f" | {found.trace_op}"
    print(f"{number:4d}{mark}{moment}{part}{found.error_pct:+8.3f} %  {found.case.label()}  [{place}]", flush=True)
    for name, ours, theirs in found.components:
        share = 100 * (ours - theirs) / found.trace_bytes
        print(f"            {name}: program {ours:,d}, trace {theirs:,d} ({share:+.2f} % of the peak)", flush=True)


def _summary(outcomes: list[Outcome], refused: Counter[str], alone: int) -> int:
    if not outcomes:
        print("no case ran", file=sys.stderr)
        return 1
    number = len(outcomes)
    errors = [o.error_pct for o in outcomes]
    near = sum(abs(e) <= PEAK_PCT for e in errors)
    worst = max(errors, key=abs)
    moments = sum(o.same_moment for o in outcomes)
    parts = sum(not o.components for o in outcomes)
    print(f"\n{number} cases, {refused.total() - alone} more refused by both sides, {alone} by one alone")
    for reason, count in refused.most_common():
        print(f"  refused {count}: {reason}")
    print(f"peak: {near} within {PEAK_PCT} %, mean {sum(map(abs, errors)) / number:.3f} %, worst {worst:+.3f} %")
    print(f"moment: {moments} the same; components: {parts} with every category agreeing")
    for moment, count in Counter(o.moment for o in outcomes).most_common():
        there = [o for o in outcomes if o.moment == moment]
        print(f"  {count:4d}  {moment}: worst {max((o.error_pct for o in there), key=abs):+.3f} %")
    good = near >= 0.95 * number and abs(worst) <= WORST_PCT and moments == number and parts == number
    return 0 if good and not alone else 1


__all__ = ["MODELS", "Case", "Outcome", "cases", "draw", "run", "shrunk"]

if __name__ == "__main__":
    raise SystemExit(main())
