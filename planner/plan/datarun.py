"""A run on given data: the longest batch decides its memory, the distribution of lengths its time."""

from __future__ import annotations

from planner.base.errors import InvalidInput
from planner.base.records import record, replace
from planner.plan.curves import StepCost
from planner.plan.predict import Prediction
from planner.plan.simulate import Plan, Totals, closed_form
from planner.runs import cost
from planner.runs.dataset.batches import Batching, Padding, longest_batch, seen_lengths
from planner.runs.dataset.lengths import Lengths
from planner.runs.dataset.orders import Orders, orders
from planner.runs.dataset.scan import Scan
from planner.timing.step_time import Seconds


@record
class DataRun:
    """What a scan of training data makes of a run."""

    found: Scan
    batching: Batching
    seen: Lengths
    """Useful tokens of the rows that the model sees."""
    longest: int
    """Padded tokens of the longest batch."""
    totals: Totals | None = None
    """One whole run, where the card's rates are known."""
    epochs: float = 1.0

    def orders(self) -> Orders | None:
        """Orders in which micro batches of unequal length arrive; None where none outgrows the first."""
        return orders(self.seen, self.batching)

    @property
    def waste(self) -> float:
        """Share of computed positions that are padding."""
        return 1 - self.totals.useful_tokens / self.totals.tokens if self.totals and self.totals.tokens else 0.0


def on_data(found: Scan, batch: int, limit: int, padding: Padding) -> DataRun:
    """Batch the rows of a scan, cut to `limit` tokens.

    Raises:
        InvalidInput: rows without a single token.
    """
    how = Batching(batch=batch, limit=limit, padding=padding)
    seen = seen_lengths(found.lengths, how)
    longest = longest_batch(seen, how)
    if not longest:
        raise InvalidInput("no row has a single token; check the template")
    return DataRun(found=found, batching=how, seen=seen, longest=longest)


def needs_mask(run: DataRun) -> bool:
    """Whether rows of different lengths meet in a batch, so that attention needs a padding mask."""
    if run.batching.padding == "packed":
        return False
    shortest = run.seen.shortest
    return shortest < run.longest and (run.batching.batch > 1 or run.batching.padding == "max")


def planned(
    run: DataRun, prediction: Prediction, *, epochs: float, price: cost.Price | None
) -> tuple[DataRun, cost.RunPlan]:
    """Return the run with its totals, and its plan in hours and USD.

    `prediction` is of the longest batch. Pauses for checkpoints and evaluations are not counted here.

    Raises:
        InvalidInput: the card's rates are not known.
    """
    step, training = StepCost(prediction, run.seen.shortest), prediction.training
    plan = Plan(
        lengths=run.found.lengths, batching=run.batching, accumulation=training.gradient_accumulation_steps,
        epochs=epochs, save_steps=0, usd_per_hour=price.usd_per_hour if price else 0.0,
    )  # fmt: skip
    totals = closed_form(plan, step)
    low, high = step.spread()
    hours = totals.train_s / 3600
    span = Seconds(low=hours * low, expected=hours, high=hours * high)
    made = cost.RunPlan(
        optimizer_steps=totals.steps,
        rows_per_step=training.micro_batch_size * training.gradient_accumulation_steps,
        tokens=totals.useful_tokens,
        hours=span,
        price=price,
        usd=_times(span, price.usd_per_hour) if price else None,
        energy_kwh=step.gpu.tdp_w * hours / 1000 if step.gpu.tdp_w else None,
    )
    return replace(run, totals=totals, epochs=epochs), made


def hours_on(run: DataRun, prediction: Prediction, epochs: float) -> float:
    """Hours of the whole run where `prediction` (of its longest batch) says how fast the card is."""
    done, _ = planned(run, prediction, epochs=epochs, price=None)
    assert done.totals is not None
    return done.totals.train_s / 3600


def _times(value: Seconds, by: float) -> Seconds:
    return Seconds(low=value.low * by, expected=value.expected * by, high=value.high * by)
