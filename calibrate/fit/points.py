"""Recorded bursts as points to fit: which are usable, and how repeats are pooled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from calibrate.fit.measurements import Measurement, Run
from planner.base.errors import PlannerError, one_line
from planner.base.records import record
from planner.device.hardware import Gpu
from planner.model import families
from planner.step import program
from planner.step.architecture import architecture
from planner.step.engine import Record, Segment
from planner.step.kernels import ATTENTION, DEQUANTIZATION, LEDGER, PRODUCTS, REST, Kernel
from planner.timing import step_time
from planner.timing.coefficients import Coefficients
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec

MEASURED = {
    measured: tuple(name for name, row in LEDGER.items() if row.compared_as == measured)
    for measured in (PRODUCTS, ATTENTION, DEQUANTIZATION, REST)
}
"""Classes of a profile's kernels that are compared, and the ledger's classes in each."""


@record
class Point:
    """A measured burst, its kernels summed up, ready to be priced again and again."""

    measurement: Measurement
    training: TrainingSpec
    kernels: Record
    gpu: Gpu

    def price(self, coefficients: Coefficients) -> tuple[dict[str, float], float]:
        """Seconds of the parts and of the step under these coefficients, without a training framework around it."""
        parts, total, _ = step_time.phase_seconds(self.kernels, self.training, self.gpu, coefficients)
        return parts, float(total) - self.overhead_s(coefficients)

    def overhead_s(self, coefficients: Coefficients) -> float:
        """Seconds in `price` of a training framework that this run did not have."""
        if self.measurement.request.get("source") == "trainer":
            return 0.0
        return coefficients.value("framework_step")

    def predicted(self, coefficients: Coefficients) -> list[float]:
        """Seconds to compare with `measured`."""
        parts, total, classes = step_time.phase_seconds(self.kernels, self.training, self.gpu, coefficients)
        found = [float(total) - self.overhead_s(coefficients)]
        if self.measurement.phases_s is not None:
            steps = self.training.gradient_accumulation_steps
            backward = (parts["backward"] + parts["recomputation"]) * steps
            found = [parts["forward"] * steps, backward, parts["optimizer"]]
        return found + self._by_class(classes, MEASURED)

    def step_s(self, coefficients: Coefficients) -> float:
        """Predicted seconds of the whole step."""
        return self.price(coefficients)[1]

    @property
    def measured(self) -> list[float]:
        """Seconds of the phases where they were timed, else of the step; then of a busy GPU's kernels by class."""
        phases = self.measurement.phases_s
        found = [self.measurement.step_s] if phases is None else list(phases)
        return found + self._by_class(self.measurement.kernels_s, MEASURED)

    def _by_class(self, seconds: Mapping[str, float], members: Mapping[str, tuple[str, ...]]) -> list[float]:
        """Sums over the classes of kernels that are compared."""
        sums = {name: sum(seconds.get(part, 0.0) for part in parts) for name, parts in members.items()}
        return [sum(sums[name] for name in group) for group in self.compared]

    @property
    def compared(self) -> tuple[tuple[str, ...], ...]:
        """Which measured classes are compared, together where names do not tell them apart; none of an idle device."""
        kernels = self.measurement.kernels_s
        if not self.measurement.busy:
            return ()
        if not kernels.get(ATTENTION):  # products and softmax of eager or math attention
            return (tuple(MEASURED),)
        if QUANTIZATIONS[self.training.quantization.kind].by_rows:
            return ((PRODUCTS,), (ATTENTION,), (DEQUANTIZATION, REST))
        some = ((DEQUANTIZATION,),) if kernels.get(DEQUANTIZATION) else ()
        return ((PRODUCTS,), (ATTENTION,), *some, (REST,))

    @property
    def weights(self) -> list[float]:
        """A phase or class counts by the root of its share of the step: the step's own error is what is made small."""
        values = self.measured
        first = len(values) - len(self.compared)
        shares = [value / sum(part) for part in (values[:first], values[first:]) for value in part]
        return [math.sqrt(max(share, 0.0)) for share in shares]


def point(measurement: Measurement, gpu: Gpu) -> Point:
    """Run the step program of a burst's configuration and sum equal kernels up.

    Raises:
        PlannerError: a configuration that the planner does not know.
    """
    training = measurement.training
    spec = families.build_spec(measurement.config, model_id=measurement.model)
    found = program.run(spec, training, architecture(gpu, training))
    return Point(measurement=measurement, training=training, kernels=compressed(found.record), gpu=gpu)


def compressed(run: Record) -> Record:
    """Equal kernels of one part of the step as one kernel of a segment repeated as often: the same price, sooner."""
    sums: dict[tuple[Any, ...], float] = {}
    for kernel in run.kernels:
        segment = run.segments[kernel.segment]
        key = (
            segment.phase, min(segment.layer, 0), kernel.op, kernel.dtype, kernel.flops, kernel.bytes, kernel.count,
            kernel.shape, kernel.recomputed, kernel.layout, kernel.elements,
        )  # fmt: skip
        sums[key] = sums.get(key, 0) + segment.repeat
    out = Record()
    places: dict[tuple[Any, ...], int] = {}
    for (phase, layer, op, dtype, flops, moved, count, shape, again, layout, elements), times in sums.items():
        where = (phase, layer, times)
        if where not in places:
            places[where] = len(out.segments)
            out.segments.append(Segment(phase, layer, int(times), 0))
        out.kernels.append(Kernel(op, dtype, flops, moved, count, places[where], shape, again, layout, elements))
    return out


def usable(runs: Iterable[Run], gpu: Gpu) -> tuple[list[Point], list[str]]:
    """Points of the bursts that were timed undisturbed, and a line for each of the others."""
    points: list[Point] = []
    skipped: list[str] = []
    known: dict[str, Point] = {}
    for run in runs:
        for item in run.measurements:
            reason = _unusable(item)
            if not reason and item.key not in known:
                try:
                    known[item.key] = point(item, gpu)
                except PlannerError as error:
                    reason = str(error)
            if reason:
                skipped.append(reason)
            else:
                points.append(replace(known[item.key], measurement=item))
    return points, skipped


POOLED = ("steps_s", "steps_ran_s", "phases_s")
"""What the repeats of a burst have together."""


def pooled(points: Sequence[Point]) -> list[Point]:
    """One point for each configuration and host, with the steps of all its repeats.

    On a CPU the least of them counts: a neighbour on the host may slow a whole burst down, less likely all repeats.
    """
    groups: dict[tuple[str, str], list[Point]] = {}
    for item in points:
        groups.setdefault((item.measurement.key, str(item.measurement.device.get("host", ""))), []).append(item)
    found = []
    for members in groups.values():
        results = [p.measurement.result for p in members]
        steps = {
            name: [value for r in results for value in r[name]] for name in POOLED if all(name in r for r in results)
        }
        first = members[0]
        found.append(replace(first, measurement=replace(first.measurement, result={**results[0], **steps})))
    return found


def _unusable(item: Measurement) -> str:
    if not item.ok:
        return f"{item.result.get('status', 'no result')}: {one_line(str(item.result.get('message', '')), 100)}"
    return item.disturbed
