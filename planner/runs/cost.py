"""From seconds per optimizer step to a run: steps, hours, USD and an upper bound of its energy.

Prices are those of whole machines on demand, with the day they were read; a run on one of a machine's cards pays for
all of them. USD and hours are intervals, as the step's seconds are.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from planner.base.errors import Contradiction, InvalidInput
from planner.base.records import record
from planner.device.hardware import Gpu, Instance
from planner.timing.step_time import Seconds, StepTime

Number = Any
"""int or float, or a numpy array in a table."""

PRICE_MAX_AGE_DAYS = 120


@record
class Amount:
    """How much is trained: a token budget, or rows and epochs."""

    tokens: float = 0.0
    """Useful tokens."""
    rows: int = 0
    epochs: float = 1.0
    mean_tokens: float = 0.0
    """Useful tokens per row; 0: every position is one (packed, or not known)."""

    def __post_init__(self) -> None:
        if self.tokens and self.rows:
            raise Contradiction("a token budget and a number of rows say the same thing twice; give one of them")
        for name in ("tokens", "rows", "mean_tokens"):
            value = getattr(self, name)
            if not 0 <= value < 1e18:
                raise InvalidInput(f"{name} is {value:g}; must be between 0 and 1e18")
        if not 0 < self.epochs <= 1e6:
            raise InvalidInput(f"epochs is {self.epochs:g}; must be above 0 and at most 1e6")

    @property
    def given(self) -> bool:
        """Whether there is a run to plan."""
        return bool(self.tokens or self.rows)


@record
class Price:
    """USD per hour, and where it comes from."""

    usd_per_hour: float
    source: str
    instance_type: str = ""
    gpu_count: int = 1
    date: str = ""
    """ISO day on which it was read; empty for the user's own price."""

    def warnings(self, today: datetime.date) -> tuple[str, ...]:
        """Say that a price is old, or that it pays for more cards than the run uses."""
        notes = []
        if self.date:
            age = (today - datetime.date.fromisoformat(self.date)).days
            if age > PRICE_MAX_AGE_DAYS:
                notes.append(f"the price of {self.instance_type} was read {age} days ago ({self.date}): check it")
        if self.gpu_count > 1:
            notes.append(f"{self.instance_type} has {self.gpu_count} cards; the run uses one and pays for all")
        return tuple(notes)


@record
class RunPlan:
    """A whole run on one card."""

    optimizer_steps: int
    rows_per_step: int
    tokens: float
    """Useful tokens trained on."""
    hours: Seconds
    """In hours; the interval of the step's seconds."""
    price: Price | None
    usd: Seconds | None
    """In USD; None without a price."""
    energy_kwh: float | None
    """Upper bound: the card's power limit for all of the time; None where the limit is not known."""


def useful_tokens_per_step(time: StepTime, mean_tokens: float, seq_len: int) -> float:
    """Tokens of one optimizer step that are not padding."""
    return time.tokens * (min(mean_tokens, seq_len) / seq_len) if mean_tokens else float(time.tokens)


def optimizer_steps(amount: Amount, rows_per_step: Number, tokens_per_step: Number) -> Number:
    """Optimizer steps of a run, for numbers or arrays; rows are counted per epoch as transformers' Trainer does."""
    if amount.rows:
        return ceiling(ceiling(amount.rows / rows_per_step) * amount.epochs)
    return ceiling(amount.tokens / tokens_per_step)


def ceiling(value: Number) -> Number:
    """The smallest whole number that is not smaller, of a number or of each in an array."""
    return -(-value // 1)


def plan(
    time: StepTime, gpu: Gpu, amount: Amount, *, micro_batch_size: int, seq_len: int, price: Price | None = None
) -> RunPlan:
    """Return steps, hours, cost and energy of training on `amount`.

    See `optimizer_steps`.
    """
    rows_per_step = micro_batch_size * time.gradient_accumulation_steps
    per_step = useful_tokens_per_step(time, amount.mean_tokens, seq_len)
    steps = optimizer_steps(amount, rows_per_step, per_step)
    if amount.rows:
        per_row = amount.mean_tokens or seq_len
        tokens = amount.rows * amount.epochs * min(per_row, seq_len)
    else:
        tokens = amount.tokens
    hours = _scaled(time.step_s, steps / 3600)
    return RunPlan(
        optimizer_steps=int(steps),
        rows_per_step=rows_per_step,
        tokens=tokens,
        hours=hours,
        price=price,
        usd=_scaled(hours, price.usd_per_hour) if price else None,
        energy_kwh=gpu.tdp_w * hours.expected / 1000 if gpu.tdp_w else None,
    )


def cheapest(
    gpu: Gpu, instances: Iterable[Instance], *, dbu: Mapping[str, float] | None = None, dbu_rate: float = 0.0
) -> Price | None:
    """Return the machine with this card that costs least per hour; None when the table has none.

    Args:
        dbu: Databricks units per hour by instance type, given by the user; other machines are then left out.
        dbu_rate: USD per Databricks unit.
    """
    found: list[Price] = []
    for item in instances:
        if item.gpu_id != gpu.gpu_id or (dbu is not None and item.instance_type not in dbu):
            continue
        extra = dbu[item.instance_type] * dbu_rate if dbu is not None else 0.0
        found.append(_machine(item, extra))
    return min(found, key=lambda price: (price.usd_per_hour, price.instance_type), default=None)


def _machine(item: Instance, extra: float) -> Price:
    return Price(
        usd_per_hour=item.usd_per_hour + extra,
        source=f"{item.provider} {item.region}".strip(),
        instance_type=item.instance_type,
        gpu_count=item.gpu_count,
        date=item.price_date,
    )


def _scaled(value: Seconds, by: float) -> Seconds:
    return Seconds(low=value.low * by, expected=value.expected * by, high=value.high * by)
