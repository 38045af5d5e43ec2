"""A training run from a request to a timeline: its lengths, how it is organised, what a step takes."""

from __future__ import annotations

from itertools import repeat
from typing import NamedTuple

from planner.base.errors import Contradiction, InvalidInput
from planner.base.records import replace
from planner.model import adapter
from planner.model.spec import ModelSpec
from planner.plan import money, simulate
from planner.plan.answer import Answer
from planner.plan.answering import ask
from planner.plan.curves import StepCost
from planner.plan.request import Cost, Known, Request
from planner.plan.simulate import Timeline, Totals, closed_form
from planner.plan.verdict import CLOSE, FITS
from planner.runs.cost import Price
from planner.runs.dataset.batches import Batching
from planner.runs.dataset.lengths import Lengths
from planner.runs.schedule import Shape
from planner.training.spec import TrainingSpec

MOST_ROWS = 50_000_000
EPOCHS = 3.0
"""Passes over the rows where nothing is said."""


class Organised(NamedTuple):
    """How a run is organised, beside its settings; steps are optimizer steps."""

    learning_rate: float = 2e-4
    shape: Shape = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    save_steps: int = 500
    eval_steps: int = 0
    eval_rows: int = 0
    drop_last: bool = False
    seed: int = 42


class Simulated(NamedTuple):
    """A run that was played through."""

    answer: Answer
    timeline: Timeline
    closed: Totals
    """The same run without drawing batches."""
    rows: int
    """Rows that were asked for, where there is no data."""
    price: Price | None
    notes: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether it trains something and fits."""
        runs = len(self.timeline) and not self.timeline.out_of_memory_step()
        return bool(runs) and self.answer.prediction.verdict == FITS


def simulated(request: Request, how: Organised, shared: Known | None = None) -> Simulated:
    """Play a run through.

    Raises:
        PlannerError: no card, neither data nor rows, or a run that cannot be planned.
    """
    if request.gpu is None and request.vram is None:
        raise InvalidInput("no card; name one with --gpu")
    wanted = request.cost
    answer = ask(replace(request, cost=Cost()), shared)  # hours and price are the timeline's
    card, found, training = answer.prediction.gpu, answer.data, answer.prediction.training
    assert card is not None
    if found is not None:
        lengths, batching = found.found.lengths, found.batching
    else:
        lengths, batching = _constant(training, wanted)
    step = StepCost(answer.prediction, found.seen.shortest if found else training.seq_len)
    price = money.price_of(card, wanted)
    plan = simulate.Plan(
        lengths=lengths, batching=batching, accumulation=training.gradient_accumulation_steps,
        epochs=EPOCHS if wanted.epochs is None else wanted.epochs,
        usd_per_hour=price.usd_per_hour if price else 0.0, **how._asdict(),
    )  # fmt: skip
    notes = tuple(dict.fromkeys(_notes(answer, price)))
    return Simulated(answer, Timeline(plan, step), closed_form(plan, step), wanted.rows or 0, price, notes)


def _notes(answer: Answer, price: Price | None) -> list[str]:
    p, found = answer.prediction, answer.data
    notes = [*p.warnings]
    if p.training.lora is not None and isinstance(p.model, ModelSpec):
        notes += adapter.facts(p.model, p.training).warnings
    if p.verdict == CLOSE:
        notes.append(f"whether it fits is {CLOSE}: loraplan fits says by how much")
    if found and found.found.token_error:
        notes.append(money.ESTIMATED)
    if price is not None:
        import datetime

        notes += price.warnings(datetime.date.today())
    return notes


def row_tokens(training: TrainingSpec, wanted: Cost) -> int:
    """Useful tokens of a row where there is no data: the mean that was said, else a full row."""
    return max(min(round(wanted.mean_tokens or training.seq_len), training.seq_len), 1)


def _constant(training: TrainingSpec, wanted: Cost) -> tuple[Lengths, Batching]:
    """Rows of one length, when there is no data: all padded to the length.

    Raises:
        PlannerError: neither data nor a number of rows.
    """
    if wanted.rows is None or wanted.tokens is not None:
        raise Contradiction("what is trained? give --data FILE, or --rows N")
    money.amount_of(wanted)  # checks the ranges
    if wanted.rows > MOST_ROWS:
        raise InvalidInput(f"--rows is {wanted.rows:,}; a timeline takes at most {MOST_ROWS:,}")
    lengths = Lengths(repeat(row_tokens(training, wanted), wanted.rows))
    return lengths, Batching(batch=training.micro_batch_size, limit=training.seq_len, padding="max")
