"""Seconds and memory of a micro batch as functions of its length: predicted on a grid of lengths, linear between."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

from planner.base.errors import InvalidInput
from planner.base.records import replace
from planner.model.spec import ModelSpec
from planner.plan.predict import Prediction, predict
from planner.step import program
from planner.step.architecture import architecture
from planner.timing import step_time

POINTS = 16
"""Lengths at which a full batch is predicted; smaller batches and memory take fewer."""
FEW_POINTS = 6


class Point(NamedTuple):
    """Seconds of one micro batch of a length."""

    micro_s: float
    """Forward, recomputation and backward."""
    forward_s: float


class Curve:
    """A function of the length, evaluated on a grid when first asked there."""

    def __init__(self, lengths: list[int], evaluate: Callable[[int], tuple[float, ...]]) -> None:
        self.grid = lengths
        self.evaluate = evaluate
        self.known: dict[int, tuple[float, ...]] = {}

    def at(self, length: int) -> tuple[float, ...]:
        """The values at a length; outside the grid those of its nearest end."""
        place = bisect_left(self.grid, length)
        if place == len(self.grid):
            return self._point(self.grid[-1])
        if self.grid[place] == length or place == 0:
            return self._point(self.grid[place])
        low, high = self.grid[place - 1], self.grid[place]
        share = (length - low) / (high - low)
        pairs = zip(self._point(low), self._point(high), strict=True)
        return tuple(a + (b - a) * share for a, b in pairs)

    def _point(self, length: int) -> tuple[float, ...]:
        if length not in self.known:
            self.known[length] = self.evaluate(length)
        return self.known[length]


def grid(shortest: int, longest: int, points: int) -> list[int]:
    """Lengths from the shortest to the longest, both included, at equal ratios."""
    if longest <= shortest or points < 2:
        return [longest]
    ratio = (longest / shortest) ** (1 / (points - 1))
    inner = (round(shortest * ratio**i) for i in range(1, points - 1))
    return sorted({shortest, *inner, longest})


class StepCost:
    """Seconds of micro batches of any size and length, of the optimizer step around them, and their memory.

    `prediction` is of the longest batch; its coefficients and context serve for all lengths.

    Raises:
        InvalidInput: the card's rates are not known.
    """

    def __init__(self, prediction: Prediction, shortest: int) -> None:
        gpu, time = prediction.gpu, prediction.time
        if gpu is None or time is None:
            name = gpu.name if gpu else "no card"
            raise InvalidInput(f"no source states the rates of {name}: no time can be predicted; name another card")
        if not isinstance(prediction.model, ModelSpec):
            raise InvalidInput(f"{prediction.model.model_id} is known from a trace only: runs of it are not planned")
        self.prediction, self.gpu, self.time = prediction, gpu, time
        self.model, self.training = prediction.model, prediction.training
        self.shortest, self.longest = max(1, shortest), prediction.training.seq_len
        self.step_s = time.optimizer_s + time.overhead_s
        """Seconds of an optimizer step beside its micro batches."""
        self._curves: dict[int, Curve] = {}
        self._memory = Curve(grid(self.shortest, self.longest, FEW_POINTS), self._device_bytes)

    def micro_s(self, rows: int, length: int) -> float:
        """Seconds of a micro batch, forward and backward; 0 for no tokens."""
        return self._curve(rows).at(length)[0] if length else 0.0

    def forward_s(self, rows: int, length: int) -> float:
        """Seconds of its forward alone, as an evaluation runs it."""
        return self._curve(rows).at(length)[1] if length else 0.0

    def memory_bytes(self, length: int) -> float:
        """Expected device memory of a run whose longest batch so far has this length."""
        return self._memory.at(length)[0]

    def spread(self) -> tuple[float, float]:
        """Low and high end of predicted seconds, as factors on the expected ones."""
        s = self.time.step_s
        return s.low / s.expected, s.high / s.expected

    def _curve(self, rows: int) -> Curve:
        if rows not in self._curves:
            points = POINTS if rows == self.training.micro_batch_size else FEW_POINTS
            self._curves[rows] = Curve(
                grid(self.shortest, self.longest, points), lambda length: self._micro(rows, length)
            )
        return self._curves[rows]

    def _micro(self, rows: int, length: int) -> Point:
        t = self._time(rows, length)
        return Point(t.forward_s + t.recomputation_s + t.backward_s, t.forward_s)

    def _time(self, rows: int, length: int) -> step_time.StepTime:
        training = replace(self.training, micro_batch_size=rows, seq_len=length)
        run = program.run(self.model, training, architecture(self.gpu, training))
        return step_time.step_time(run.record, training, self.gpu, self.time.coefficients)

    def _device_bytes(self, length: int) -> tuple[float, ...]:
        if length == self.longest:
            return (float(self.prediction.device.expected),)
        training = replace(self.training, seq_len=length)
        found = predict(self.model, training, self.gpu, coefficients=self.time.coefficients)
        return (float(found.device.expected),)
