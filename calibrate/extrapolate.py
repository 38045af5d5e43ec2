"""Peaks of a deep stack from traces of a few of its layers, exact to the byte.

The global peak is not linear in depth (its place moves), but the peak inside each segment is: linear in how often each
part of the stack repeats and in the layer's place in it, with the first and the last layer of a part apart. A part is a
unit of one or several unlike layers in a row (sliding, sliding, full) that repeats. One trace holds every part a few
times, one more trace for each part holds it once more.

    python -m calibrate.extrapolate MODEL [--batch 1] [--length 2048] [--full]
        prints the seconds and the peak of a QLoRA run of a catalogue model; --full traces every layer
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibrate import fake_model
from calibrate.trace import TraceResult, trace
from planner.cuda_rules import Architecture
from planner.training import LoraSpec, QuantizationSpec, TrainingSpec

LONGEST_UNIT = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolated:
    """Static bytes and peaks of the full stack; `traced` holds the depths that were run."""

    layers: int
    static_bytes: int
    segment_peaks: dict[str, int]
    traced: tuple[int, ...]

    @property
    def peak_segment(self) -> str:
        """Where the highest level of the step is reached."""
        return max(self.segment_peaks, key=self.segment_peaks.__getitem__)

    @property
    def peak_bytes(self) -> int:
        """Peak of the step with the optimizer state."""
        return self.segment_peaks[self.peak_segment]

    def describe(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {
            "layers": self.layers, "traced_layers": list(self.traced), "static_bytes": self.static_bytes,
            "peak_bytes": self.peak_bytes, "peak_place": {"segment": self.peak_segment},
            "segment_peak_bytes": self.segment_peaks,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """`count` repetitions of `period` layers, the first of them being layer `start` of the stack."""

    start: int
    period: int
    count: int

    @property
    def kept(self) -> int:
        """Repetitions in the short trace: first, middle and last layer must exist, and one more must be possible."""
        shallow = 3 if self.period == 1 else 2
        return shallow if self.count > shallow + 1 else self.count

    def layers(self, count: int) -> list[int]:
        """The layers that stand for `count` repetitions."""
        return list(range(self.start, self.start + count * self.period))


def parts(kinds: Sequence[Any]) -> list[Part]:
    """Cut the stack into repeated units: at each place the unit that covers most, the shortest of equals."""
    found: list[Part] = []
    start = 0
    while start < len(kinds):
        best = Part(start, 1, 1)
        for period in range(1, min(LONGEST_UNIT, len(kinds) - start) + 1):
            unit, count = kinds[start : start + period], 1
            while kinds[start + count * period : start + (count + 1) * period] == unit:
                count += 1
            if (count > 1 or period == 1) and count * period > best.count * best.period:
                best = Part(start, period, count)
        found.append(best)
        start += best.count * best.period
    return found


class _Samples:
    """The traces: all parts short, and for each shortened part one with a repetition more."""

    def __init__(self, stack: list[Part], run: Any) -> None:
        self.stack = stack
        self.short = {part: part.kept for part in stack}
        self.longer = [part for part in stack if part.kept < part.count]
        self.counts = [self.short, *({**self.short, part: part.kept + 1} for part in self.longer)]
        self.traces: list[TraceResult] = [
            run([layer for part in stack for layer in part.layers(counts[part])]) for counts in self.counts
        ]

    def at(self, read: Any) -> int:
        """Extrapolate `read(trace, its counts)`, a number at a place that every trace has."""
        base = int(read(self.traces[0], self.short))
        total = base
        for part, deep, counts in zip(self.longer, self.traces[1:], self.counts[1:], strict=True):
            total += (part.count - part.kept) * (int(read(deep, counts)) - base)
        return total

    def layer(self, part: Part, repetition: int, offset: int, direction: str) -> int:
        """The peak inside one layer's segment."""

        def read(result: TraceResult, counts: dict[Part, int], where: int) -> int:
            before = sum(counts[p] * p.period for p in self.stack[: self.stack.index(part)])
            repeated = where if where >= 0 else counts[part] + where
            index = before + repeated * part.period + offset
            return result.segment_peaks[f"layer.{index} {direction}"]

        last = (part.count - 1, part.period - 1)
        if part not in self.longer or (repetition, offset) == (0, 0):
            return self.at(lambda result, counts: read(result, counts, repetition))
        if (repetition, offset) == last:
            return self.at(lambda result, counts: read(result, counts, -1))
        middle = 1 if offset == 0 else 0  # the first repetition that neither begins nor ends the part
        number = 1 + self.longer.index(part)
        deep, counts = self.traces[number], self.counts[number]
        step = read(deep, counts, middle + 1) - read(deep, counts, middle)
        return self.at(lambda result, counts: read(result, counts, middle)) + (repetition - middle) * step


def extrapolate(config: dict[str, Any], training: TrainingSpec, *, arch: Architecture | None = None) -> Extrapolated:
    """Return the peaks of the model's own depth."""
    kinds = fake_model.layer_kinds(config, training)
    stack = parts(kinds)
    samples = _Samples(stack, lambda keep: trace(config, training, keep=keep, arch=arch))
    segments: dict[str, int] = {}
    for name in samples.traces[0].segment_peaks:
        if not name.startswith("layer."):
            segments[name] = samples.at(lambda result, counts, name=name: result.segment_peaks[name])
    for direction in ("forward", "backward"):
        for part in stack:
            for index in part.layers(part.count):
                repetition, offset = divmod(index - part.start, part.period)
                segments[f"layer.{index} {direction}"] = samples.layer(part, repetition, offset, direction)
    return Extrapolated(
        layers=len(kinds),
        static_bytes=samples.at(lambda result, counts: result.static_bytes),
        segment_peaks=segments,
        traced=tuple(result.layers for result in samples.traces),
    )


def main(arguments: list[str] | None = None) -> int:
    """Time the trace of a catalogue model; imports are not counted."""
    import logging
    import warnings

    from planner import catalog

    parser = argparse.ArgumentParser(prog="python -m calibrate.extrapolate", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--full", action="store_true", help="trace every layer")
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    record = catalog.model_record(given.model)
    if record is None:
        print(f"{given.model} is not in the catalogue", file=sys.stderr)
        return 2
    training = TrainingSpec(
        lora=LoraSpec(r=16), quantization=QuantizationSpec(kind="nf4", double_quant=True),
        micro_batch_size=given.batch, seq_len=given.length,
    )  # fmt: skip
    config = dict(record.config)
    fake_model.layer_kinds({**config}, training)  # what transformers imports for this family is not timed
    start = time.perf_counter()
    result: Any = trace(config, training) if given.full else extrapolate(config, training)
    seconds = time.perf_counter() - start
    print(f"{given.model}: {seconds:.1f} s, peak {result.peak_bytes} bytes, {result.layers} layers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
