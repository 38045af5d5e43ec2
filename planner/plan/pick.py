"""Which card or machine to take: the cheapest or fastest that runs the job within limits, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from planner.base.units import gib
from planner.device.hardware import Gpu
from planner.model.spec import ModelSpec
from planner.plan import sweep
from planner.plan.predict import Prediction, predict_on
from planner.plan.verdict import FITS, NO, VERDICTS, Verdict
from planner.runs import cost
from planner.timing.coefficients import Selection
from planner.training.spec import TrainingSpec

Goal = Literal["usd", "time"]
MOST_PREDICTIONS = 50


class Candidate(NamedTuple):
    """A card with the price of an hour on it (None: not known) and the settings the run has there."""

    gpu: Gpu
    price: cost.Price | None
    training: TrainingSpec
    chosen: Selection | None = None
    """The card's calibration; None: its priors."""


HoursOf = Callable[[Candidate], float]
"""Hours of the whole run on a candidate."""


class Limits(NamedTuple):
    """What the answer must keep to."""

    hours: float | None = None
    usd: float | None = None


class Judgement(NamedTuple):
    """What a candidate would take, and why it was not taken ("" for the answer)."""

    candidate: Candidate
    hours: float | None
    usd: float | None
    device_bytes: int
    reason: str


class Pick(NamedTuple):
    """The answer and everything that was rejected, best first."""

    answer: Judgement | None
    prediction: Prediction | None
    rejected: tuple[Judgement, ...]
    evaluations: int
    """How often the model was asked, for however many cards at once."""


def pick(
    model: ModelSpec,
    candidates: Sequence[Candidate],
    amount: cost.Amount,
    goal: Goal = "usd",
    limits: Limits | None = None,
    hours_of: HoursOf | None = None,
) -> Pick:
    """Return the candidate that fits and costs least (or ends first) within the limits.

    Cards are compared by one sweep; only where that cannot tell, and for the answer, is a card predicted by itself.
    `hours_of` gives a candidate's hours where batches are not all of one length; `amount` is then not looked at.
    """
    limits = limits or Limits()
    rows, evaluations = _swept(model, candidates, amount, hours_of)
    usable: list[Judgement] = []
    rejected: list[Judgement] = []
    for row, verdict in rows:
        reason = _reason(row, verdict, limits, goal)
        (rejected if reason else usable).append(row._replace(reason=reason))
    usable.sort(key=lambda row: _order(row, goal))
    for number, row in enumerate(usable):
        card = row.candidate
        evaluations += 1
        found = predict_on(model, card.training, card.gpu, card.chosen)
        if found.verdict != FITS:
            text = f"{found.verdict}: {gib(found.device.low)} to {gib(found.device.high)} GiB"
            rejected.append(
                row._replace(reason=f"{text} of {gib(card.gpu.free_bytes)}", device_bytes=found.device.expected)
            )
            continue
        answer = row._replace(device_bytes=found.device.expected)
        others = [other._replace(reason=_worse(other, answer, goal)) for other in usable[number + 1 :]]
        ordered = [*others, *sorted(rejected, key=lambda other: _order(other, goal))]
        return Pick(answer, found, tuple(ordered), evaluations)
    return Pick(None, None, tuple(sorted(rejected, key=lambda other: _order(other, goal))), evaluations)


def _order(row: Judgement, goal: Goal) -> tuple[float, float, str]:
    far = float("inf")
    usd, hours = (far if value is None else value for value in (row.usd, row.hours))
    return (usd, hours, row.candidate.gpu.gpu_id) if goal == "usd" else (hours, usd, row.candidate.gpu.gpu_id)


def _swept(
    model: ModelSpec, candidates: Sequence[Candidate], amount: cost.Amount, hours_of: HoursOf | None
) -> tuple[list[tuple[Judgement, Verdict]], int]:
    """Hours, USD, memory and verdict of every candidate; cards with equal settings together."""
    groups: dict[TrainingSpec, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.training, []).append(candidate)
    rows: list[tuple[Judgement, Verdict]] = []
    runs = 0
    for training, members in groups.items():
        numbers = {key: (sweep.number_of(training, key),) for key in sweep.NUMBERS}
        chosen = {member.gpu.gpu_id: member.chosen for member in members if member.chosen is not None}
        coefficients = {name: item.coefficients for name, item in chosen.items()}
        sweeper = sweep.Sweeper(model, sweep.Axes(**numbers), coefficients)
        cells = sweeper.cells(training, [m.chosen.card(m.gpu) if m.chosen is not None else m.gpu for m in members])
        judged = sweep.judge(model, cells, sweep.assumed_surplus(training))
        runs += cells.runs
        per_step = training.micro_batch_size * training.gradient_accumulation_steps
        steps = cost.optimizer_steps(amount, per_step, per_step * training.seq_len)
        for number, member in enumerate(members):
            place = (number, 0, 0, 0, 0)
            seconds = float(cells.step_s[place])
            hours = steps * seconds / 3600 if seconds == seconds else None
            verdict = VERDICTS[judged.verdict[place]]
            if hours is not None and hours_of is not None and verdict != NO:
                hours = hours_of(member)
            usd = hours * member.price.usd_per_hour if hours is not None and member.price is not None else None
            row = Judgement(member, hours, usd, int(judged.device_bytes[place]), "")
            rows.append((row, verdict))
    return rows, runs


def _reason(row: Judgement, verdict: Verdict, limits: Limits, goal: Goal) -> str:
    """Why a candidate is out of the question; "" where it may be the answer."""
    free = row.candidate.gpu.free_bytes
    if verdict == NO:
        return f"{NO}: {gib(row.device_bytes)} of {gib(free)} GiB"
    if row.hours is None:
        return "its rates are not known"
    if limits.hours is not None and row.hours > limits.hours:
        return f"too slow: {row.hours:,.1f} h, limit {limits.hours:,.1f}"
    if row.usd is None and (goal == "usd" or limits.usd is not None):
        return "no price is known"
    if limits.usd is not None and row.usd is not None and row.usd > limits.usd:
        return f"too dear: {row.usd:,.2f} USD, budget {limits.usd:,.2f}"
    return ""


def _worse(row: Judgement, answer: Judgement, goal: Goal) -> str:
    """Why a candidate that would do is not the answer."""
    if goal == "usd" and row.usd is not None and answer.usd:
        return f"dearer: {row.usd:,.2f} USD, {row.usd / answer.usd:.1f} times"
    if row.hours is not None and answer.hours:
        return f"slower: {row.hours:,.1f} h, {row.hours / answer.hours:.1f} times"
    return "not better"


def machines(prices: Mapping[str, Sequence[cost.Price]], cards: Sequence[Gpu]) -> list[tuple[Gpu, cost.Price | None]]:
    """Every card with each of its prices."""
    return [(card, price) for card in cards for price in (prices.get(card.gpu_id) or (None,))]
