"""Request to Answer for one run: the card, its margin, the prediction, what would fit, hours and price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.base.records import NamedTuple
from planner.device.hardware import Gpu
from planner.plan.request import Data
from planner.plan.traced_answer import traced_answer

if TYPE_CHECKING:
    from planner.plan.answer import Answer
    from planner.plan.search import Change


class Tracing(NamedTuple):
    """How long a trace may run, and whether an answer of an earlier one will do."""

    time_limit_s: float
    use_cache: bool


def answer_of(
    model: str,
    card: Gpu | None,
    margin: float,
    given: dict[str, Any],
    search: bool,
    tracing: Tracing | None = None,
    calibration: str | None = None,
    data: Data | None = None,
) -> Answer:
    """Answer for one run; `given` holds what the training options gave.

    Raises:
        PlannerError: the run cannot be planned.
    """
    from planner.cli.data_options import known
    from planner.plan.answer import Answer
    from planner.plan.request import Request, resolve, training_settings
    from planner.plan.verdict import FITS

    card, kept = with_margin(card, margin)
    if tracing is not None:
        if data:
            from planner.base.errors import Contradiction

            raise Contradiction("--data is planned by loraplan's own program; drop --via trace")
        stack = training_settings(given)
        return traced_answer(model, card, stack, given, tracing.time_limit_s, tracing.use_cache, kept)
    plan = resolve(Request(model, given, card=card, calibration=calibration, data=data), known() if data else None)
    prediction = plan.predict()
    found: tuple[Change, ...] = ()
    if search and prediction.verdict not in (FITS, None):
        from planner.facts import catalog
        from planner.plan.search import nearest_changes

        found = nearest_changes(prediction, catalog.gpus())
    return Answer(
        prediction, plan.loaded.loaded, plan.resolved, found, kept, stack_origin=plan.stack_origin, data=plan.data
    )


def _with_cost(answer: Answer, wanted: dict[str, Any]) -> Answer:
    """Add the whole run's hours and price, if a run was given."""
    if answer.data is not None:
        from planner.plan.money import data_plan

        data, made, remarks = data_plan(answer.prediction, answer.data, wanted)
        return answer._replace(data=data, run=made, notes=remarks)
    if all(value is None for value in wanted.values()):
        return answer
    from planner.plan.money import amount_of, run_plan

    amount = amount_of(wanted)
    plan, notes = run_plan(answer.prediction, amount, wanted)
    return answer._replace(run=plan, mean_tokens=amount.mean_tokens, notes=notes)


def with_margin(card: Gpu | None, percent: float) -> tuple[Gpu | None, int]:
    """The card with a share of its memory taken, and that share in bytes."""
    if card is None or not percent:
        return card, 0
    from planner.base.records import replace

    kept = int(card.memory_bytes * percent / 100)
    return replace(card, used_by_others_bytes=card.used_by_others_bytes + kept), kept


def card_of(gpu: str | None, vram: str | None) -> Gpu | None:
    """Return the card that was named, if one was.

    Raises:
        PlannerError: unknown names, sizes that are none, or both at once.
    """
    if gpu is not None and vram is not None:
        from planner.base.errors import Contradiction

        raise Contradiction("--gpu and --vram name two cards at once; give one of them")
    if vram is not None:
        from planner.base.units import gib, parse_bytes
        from planner.device.hardware import Gpu

        size = parse_bytes(vram)
        return Gpu(gpu_id="custom", name=f"a card with {gib(size)} GiB", memory_bytes=size, memory_basis="user")
    if gpu is None:
        return None
    if gpu.partition(":")[0].lower() == "local":
        from planner.facts.local_gpu import local_gpu

        return local_gpu(gpu.partition(":")[2])
    if gpu.lower() == "cpu":
        from planner.device import processor

        return processor.as_gpu(processor.facts())
    from planner.facts import catalog

    return catalog.gpu(gpu)


def percent_of(text: str) -> float:
    """Return a share given in percent.

    Raises:
        InvalidInput: not a number from 0 to below 100.
    """
    from planner.base.errors import InvalidInput, one_line

    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise InvalidInput(f"--margin is {one_line(text)!r}; write a percentage from 0 to below 100, for example 10")
    return value
