"""Optimizer steps of a run and the learning rate at each, as transformers' Trainer counts and schedules them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

from planner.base.errors import Contradiction, InvalidInput, unknown
from planner.base.records import record

Shape = Literal["cosine", "linear", "constant"]
SHAPES: tuple[str, ...] = get_args(Shape)
LONG_WARMUP = 0.2
"""Share of the run above which a warm-up is worth a warning."""


@record
class Steps:
    """Optimizer steps of a run."""

    rows: int
    micro_batches: int
    """Per epoch."""
    per_epoch_floor: int
    """Whole effective batches only, as the course counts: rows // (batch * accumulation)."""
    per_epoch_ceil: int
    """The Trainer's: the last batches of an epoch make a step of their own."""
    per_epoch: int
    """The one of the two that this run takes."""
    total: int
    floor_total: int
    ceil_total: int

    @property
    def drops_last(self) -> bool:
        """Whether the run leaves out what does not fill an effective batch."""
        return self.per_epoch == self.per_epoch_floor and self.per_epoch_floor != self.per_epoch_ceil


def count_steps(rows: int, batch: int, accumulation: int, epochs: float, *, drop_last: bool = False) -> Steps:
    """Count the steps of `epochs` passes over `rows` rows.

    The Trainer makes ceil(rows / batch) micro batches and ceil(those / accumulation) steps an epoch, and
    ceil(epochs * steps) in all (transformers 5.24 trainer.py set_initial_training_values).
    """
    if not 0 < epochs <= 1e6:
        raise InvalidInput(f"epochs is {epochs:g}; must be above 0 and at most 1e6")
    micro = math.ceil(rows / batch)
    floor, ceil = rows // (batch * accumulation), math.ceil(micro / accumulation)
    chosen = floor if drop_last else ceil
    return Steps(
        rows=rows,
        micro_batches=floor * accumulation if drop_last else micro,
        per_epoch_floor=floor,
        per_epoch_ceil=ceil,
        per_epoch=chosen,
        total=math.ceil(epochs * chosen),
        floor_total=math.ceil(epochs * floor),
        ceil_total=math.ceil(epochs * ceil),
    )


@record
class Schedule:
    """A learning rate over the steps of a run."""

    peak: float = 2e-4
    shape: Shape = "cosine"
    warmup_steps: int = 0
    total_steps: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise unknown("learning rate schedule", self.shape, SHAPES)
        if not 0 < self.peak < 1e6:
            raise InvalidInput(f"the learning rate is {self.peak:g}; must be above 0")
        if self.warmup_steps < 0:
            raise InvalidInput(f"warm-up is {self.warmup_steps} steps; must be at least 0")

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0 (transformers optimization.py lr lambdas)."""
        if step < self.warmup_steps:
            return self.peak * step / max(1, self.warmup_steps)
        left = max(1, self.total_steps - self.warmup_steps)
        if self.shape == "constant":
            return self.peak
        if self.shape == "linear":
            return self.peak * max(0.0, (self.total_steps - step) / left)
        return self.peak * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / left)))

    @property
    def peak_reached(self) -> float:
        """The highest learning rate of any step of the run."""
        if not self.total_steps:
            return 0.0
        return self.rate(min(self.warmup_steps, self.total_steps - 1))


def warmup_of(total_steps: int, steps: int | None, ratio: float | None) -> int:
    """Warm-up steps from a number or a share of the run (Trainer get_warmup_steps: rounded up)."""
    if steps is not None and ratio is not None:
        raise Contradiction("warm-up steps and a warm-up ratio say the same thing twice; give one of them")
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise InvalidInput(f"the warm-up ratio is {ratio:g}; must be from 0 to 1")
        return math.ceil(total_steps * ratio)
    return steps or 0


def warnings(steps: Steps, schedule: Schedule, batch: int, accumulation: int) -> Iterator[str]:
    """What goes wrong in silence: no step at all, a warm-up that is the run, a peak that is never reached."""
    effective = batch * accumulation
    if steps.total == 0:
        yield (
            f"zero steps: {steps.rows:,} rows are fewer than one effective batch of {batch} x {accumulation} = "
            f"{effective} and the rest is dropped; nothing is trained"
        )
        return
    if steps.per_epoch_floor == 0:
        yield (
            f"{steps.rows:,} rows are fewer than one effective batch of {effective}: counted with floor this run has "
            f"0 steps, the Trainer takes {steps.ceil_total}"
        )
    warmup, total = schedule.warmup_steps, schedule.total_steps
    if warmup >= total:
        yield f"the warm-up of {warmup:,} steps is not shorter than the run of {total:,}"
    elif warmup > LONG_WARMUP * total:
        yield f"the warm-up takes {warmup / total * 100:.0f} % of the run ({warmup:,} of {total:,} steps)"
    reached = schedule.peak_reached
    if reached < schedule.peak * 0.999:
        yield (
            f"the learning rate peaks at {reached:.3g}, {reached / schedule.peak * 100:.0f} % of the "
            f"{schedule.peak:.3g} asked for; warm up for fewer than {total:,} steps"
        )
