"""The largest run on a card and the machine for a run, from a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.base.errors import Contradiction, InvalidInput, unknown
from planner.base.records import NamedTuple, replace
from planner.device.hardware import Gpu
from planner.model.spec import ModelSpec
from planner.plan.cards import cards_of
from planner.plan.largest import PROBABILITY, Corner, Largest, frontier, largest
from planner.plan.pick import Candidate, Goal, HoursOf, Limits, Pick, pick
from planner.plan.request import Known, Plan, Request, counted, resolve
from planner.runs import cost

if TYPE_CHECKING:
    from planner.device.hardware import Instance
    from planner.plan.datarun import DataRun

UNITS = {"micro_batch_size": "rows per micro batch", "seq_len": "tokens per row", "r": "LoRA rank"}
STEPS = {"micro_batch_size": 1, "seq_len": 64, "r": 1}
LIMITS = {"micro_batch_size": 512, "seq_len": 131_072, "r": 1024}
FRONTIER = 24
"""Values of the first number of a frontier: powers of two and their one and a half."""
TOKENS = "10M"
"""What `picked` trains on where nothing is said."""


class Reached(NamedTuple):
    """The largest number of a run, or the largest pairs of two."""

    plan: Plan
    keys: tuple[str, ...]
    found: Largest | None
    """Of one number."""
    corners: tuple[Corner, ...]
    """Of two."""

    @property
    def card(self) -> Gpu:
        """The card that it is reached on."""
        assert self.plan.card is not None
        return self.plan.card

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes of the plan, and of the prediction at the largest number."""
        p = self.found.prediction if self.found is not None else None
        return tuple(dict.fromkeys((*self.plan.notes, *p.warnings))) if p is not None else self.plan.warnings

    @property
    def any(self) -> bool:
        """Whether anything fits."""
        return bool(self.corners) or (self.found is not None and self.found.value is not None)


def reached(
    request: Request,
    keys: Sequence[str] = ("micro_batch_size",),
    *,
    probability: float = PROBABILITY,
    up_to: int | None = None,
    shared: Known | None = None,
) -> Reached:
    """Find the largest micro batch, length or rank that fits a card, or the frontier over two of them.

    Args:
        request: the run, with its card; data decide its length.
        keys: of UNITS, one or two.
        probability: how sure it must be that live memory fits.
        up_to: the largest value to try.
        shared: what requests of one call share.

    Raises:
        PlannerError: no card, no such number, or settings that exclude each other.
    """
    names = tuple(dict.fromkeys(keys))
    for name in names:
        if name not in UNITS:
            raise unknown("number", name, UNITS)
    if request.data and "seq_len" in names:
        raise Contradiction("the length is what the data decides; look for the largest batch or rank, or drop --data")
    if request.gpu is None and request.vram is None:
        raise InvalidInput("no card; name one with --gpu or give its memory with --vram")
    plan = resolve(request, shared)
    card = plan.card
    assert card is not None
    if len(names) > 2:
        raise InvalidInput("a frontier is over two numbers; give --of at most twice")
    model = plan.spec
    if len(names) == 2:
        corners = frontier(model, plan.training, card, _axes(names, model, up_to), probability, plan.chosen)
        return Reached(plan, names, None, corners)
    values = _candidates(names[0], model, up_to)
    return Reached(plan, names, largest(model, plan.training, card, names[0], values, probability, plan.chosen), ())


def _candidates(key: str, model: ModelSpec, up_to: int | None) -> list[int]:
    """Every value of a step's multiple, and the smaller powers of two."""
    most = up_to or (model.max_position_embeddings if key == "seq_len" else 0) or LIMITS[key]
    step = STEPS[key]
    small = [2**n for n in range(20) if 2**n < step and 2**n <= most]
    return small + list(range(step, most + 1, step))


def _axes(keys: tuple[str, ...], model: ModelSpec, up_to: int | None) -> dict[str, list[int]]:
    """The values of both numbers of a frontier."""
    first = sorted({value for n in range(FRONTIER // 2) for value in (2**n, 3 * 2**n)})
    most = up_to or LIMITS[keys[0]]
    axes = {keys[0]: [v for v in first if v <= most], keys[1]: _candidates(keys[1], model, None)}
    if keys[0] == "seq_len":
        axes[keys[0]] = [v for v in (n * 64 for n in first) if v <= (model.max_position_embeddings or most)]
    return axes


class Choice(NamedTuple):
    """Which machines come into question, for how much training."""

    gpus: tuple[str, ...] = ()
    """Candidates by name, lists with commas too; none: every card with a price."""
    providers: tuple[str, ...] = ()
    """Only machines of these."""
    single: bool = False
    """Only machines with one card."""
    goal: Goal = "usd"
    limits: Limits = Limits()
    tokens: str | None = None
    epochs: float | None = None
    """Passes over the data."""


class Picked(NamedTuple):
    """The machine for a run, with what it was picked for."""

    found: Pick
    choice: Choice
    data: DataRun | None
    warnings: tuple[str, ...]

    @property
    def much(self) -> str:
        """How much is trained, in words."""
        if self.data is not None:
            return f"{self.choice.epochs or 1:g} epochs of {len(self.data.found.lengths):,} rows"
        return f"{self.choice.tokens or TOKENS} tokens"


def picked(request: Request, choice: Choice, shared: Known | None = None) -> Picked:
    """Pick the cheapest or fastest machine that runs the job.

    Args:
        request: the run, without a card.
        choice: candidates, goal, limits and how much is trained.
        shared: what requests of one call share.

    Raises:
        PlannerError: unknown names, no candidate at all, or a run that cannot be planned.
    """
    from planner.base.units import parse_count
    from planner.facts import calibration_files
    from planner.timing.coefficients import time_words

    if request.data and choice.tokens is not None:
        raise Contradiction("--tokens and --data say the same thing twice; give one of them")
    if choice.epochs is not None and not request.data:
        raise Contradiction("--epochs counts passes over --data; give both")
    if request.calibration is not None and not isinstance(request.calibration, str):
        raise InvalidInput("every candidate has a calibration of its own: name it")
    machines, cards = _offered(choice)
    chosen, shared = calibration_files.select_each(cards, request.calibration), shared or Known()
    plans = [resolve(replace(request, gpu=c, calibration=chosen[c.gpu_id]), shared) for c in cards]
    found = [
        Candidate(card, cost.cheapest(card, machines), plan.training, chosen[card.gpu_id])
        for card, plan in zip(cards, plans, strict=True)
    ]
    if not found:
        raise InvalidInput("no candidate: no machine of these providers has a card of the catalogue")
    model, run = plans[0].spec, plans[0].data
    amount = cost.Amount(tokens=parse_count(TOKENS if choice.tokens is None else choice.tokens))
    hours_of = _hours_on_data(model, run, choice.epochs) if run else None
    answer = pick(model, found, amount, choice.goal, choice.limits, hours_of)
    warnings = _notes(plans)
    if any(item.borrowed for item in chosen.values()):
        warnings.append(time_words(chosen))
    return Picked(answer, choice, run, tuple(warnings))


def _offered(choice: Choice) -> tuple[list[Instance], tuple[Gpu, ...]]:
    """The machines that are allowed, and the cards that come into question."""
    from planner.facts import catalog

    machines = catalog.instances()
    offered = {item.provider for item in machines}
    for name in choice.providers:
        if name not in offered:
            raise unknown("provider", name, sorted(offered))
    allowed = [
        m
        for m in machines
        if (not choice.providers or m.provider in choice.providers) and (not choice.single or m.gpu_count == 1)
    ]
    names = [name for text in choice.gpus for name in text.split(",")]
    return allowed, cards_of(names) if names else cards_of(list(dict.fromkeys(m.gpu_id for m in allowed)))


def _notes(plans: Sequence[Plan]) -> list[str]:
    notes = counted((plan.common_warnings, 1) for plan in plans)
    return [f"{note}{f' ({n} of {len(plans)} cards)' if n < len(plans) else ''}" for note, n in notes]


def _hours_on_data(model: ModelSpec, run: DataRun, epochs: float | None) -> HoursOf:
    """Hours on a candidate, from the distribution of lengths."""
    from planner.plan.datarun import hours_on
    from planner.plan.predict import predict_on

    def hours(candidate: Candidate) -> float:
        return hours_on(run, predict_on(model, candidate.training, candidate.gpu, candidate.chosen), epochs or 1.0)

    return hours
