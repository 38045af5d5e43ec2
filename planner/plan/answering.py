"""Plan to Answer for one run: the prediction, what would fit, hours and price."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.plan.answer import Answer
from planner.plan.request import Known, Plan, Request, resolve
from planner.plan.verdict import FITS

if TYPE_CHECKING:
    from planner.plan.predict import Prediction
    from planner.plan.search import Change


def ask(request: Request, shared: Known | None = None) -> Answer:
    """Resolve a request and answer it.

    Raises:
        PlannerError: the run cannot be planned.
    """
    if request.tracing is not None and request.data is not None:
        from planner.base.errors import Contradiction

        raise Contradiction("--data is planned by loraplan's own program; drop --via trace")
    return answer(resolve(request, shared))


def answer(plan: Plan) -> Answer:
    """Answer for one run, by loraplan's own program or by a trace, as its request says.

    Raises:
        PlannerError: the run cannot be planned, or an amount of training or a price that is none.
    """
    if plan.request.tracing is not None:
        from planner.plan.traced_answer import traced_prediction

        prediction = traced_prediction(plan)
    else:
        prediction = plan.predict()
    found = Answer(
        prediction, plan.config, plan.resolved, _changes(plan, prediction), plan.margin_bytes,
        stack_origin=plan.stack_origin, data=plan.data,
    )  # fmt: skip
    return _with_cost(found, plan)


def _changes(plan: Plan, prediction: Prediction) -> tuple[Change, ...]:
    """What would fit, where that is asked for and the run does not; a trace has no search."""
    if not plan.request.changes or plan.request.tracing is not None or prediction.verdict in (FITS, None):
        return ()
    from planner.facts import catalog
    from planner.plan.search import nearest_changes

    return nearest_changes(prediction, catalog.gpus())


def _with_cost(found: Answer, plan: Plan) -> Answer:
    """Add the whole run's hours and price, if a run was given."""
    wanted = plan.request.cost
    if found.data is not None:
        from planner.plan.money import data_plan

        data, made, remarks = data_plan(found.prediction, found.data, wanted)
        return found._replace(data=data, run=made, notes=remarks)
    if all(value is None for value in wanted):
        return found
    from planner.plan.money import amount_of, run_plan

    amount = amount_of(wanted)
    run, notes = run_plan(found.prediction, amount, wanted)
    return found._replace(run=run, mean_tokens=amount.mean_tokens, notes=notes)
