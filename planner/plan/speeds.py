"""Throughput over the micro batch: how fast a configuration is, and up to where it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.base.records import NamedTuple

if TYPE_CHECKING:
    from planner.plan.compared import Compared

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Speed(NamedTuple):
    """Tokens per second over the micro batch, and up to where it fits."""

    label: str
    batches: Sequence[int]
    tokens_per_s: Sequence[float]
    fits: Sequence[bool]


def speeds_of(items: Sequence[tuple[str, Compared]]) -> list[Speed]:
    """Of every configuration (with the name it is drawn under) whose card's rates are known."""
    from planner.model.spec import ModelSpec
    from planner.plan import sweep

    found = []
    for label, item in items:
        p = item.prediction
        if p.gpu is None or p.time is None or not isinstance(p.model, ModelSpec):
            continue
        axes = sweep.Axes(
            **{key: (sweep.number_of(p.training, key),) for key in sweep.NUMBERS} | {"micro_batch_size": BATCHES}
        )
        cells = sweep.Sweeper(p.model, axes, {p.gpu.gpu_id: p.time.coefficients}).cells(p.training, [p.gpu])
        judged = sweep.judge(p.model, cells, sweep.replayed_surplus(p.model, cells))
        tokens = [b * p.training.seq_len * p.training.gradient_accumulation_steps for b in BATCHES]
        seconds = cells.step_s.ravel().tolist()
        verdicts = judged.verdict.ravel().tolist()
        rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
        found.append(Speed(label, BATCHES, rates, [v == 0 for v in verdicts]))
    return found
