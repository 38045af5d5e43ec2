"""From a request to the files of an export: the planned run as a recipe, written for its target."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from planner.base.errors import InvalidInput
from planner.base.records import replace
from planner.exporters.recipe import Export, Recipe
from planner.model.spec import ModelSpec
from planner.plan.answer import Answer
from planner.plan.answering import ask
from planner.plan.request import Known, Request
from planner.plan.verdict import NO
from planner.runs.schedule import Shape


class Organised(NamedTuple):
    """How the exported run is organised, beside its settings."""

    output_dir: str
    learning_rate: float
    schedule: Shape
    warmup_steps: int
    weight_decay: float
    epochs: float
    max_steps: int
    save_steps: int
    seed: int


class Place(NamedTuple):
    """Where a Databricks export runs, and what its call says."""

    accelerator: str | None = None
    num_accelerators: int | None = None
    cloud: str = "aws"
    node_type: str | None = None
    name: str = "loraplan"
    margin: float = 5.0
    """Percent of an accelerator to keep free."""
    register_to: str | None = None
    data_prep_cluster_id: str | None = None
    duration: str | None = None


def exported(
    target: str,
    request: Request,
    how: Organised,
    place: Place,
    words: Callable[[Answer], str],
    shared: Known | None = None,
) -> Export:
    """Plan a run and write it for a target.

    Args:
        target: peft, trl, axolotl, llama-factory, entrenar, databricks-air, databricks-cluster or databricks-fm.
        request: the run; a card is looked at, but not needed.
        how: what a plan does not say.
        place: for Databricks.
        words: describes a run in a line, for a comment.
        shared: what requests of one call share.

    Raises:
        PlannerError: the run cannot be planned or written.
    """
    answer = ask(request, shared)
    recipe, tokens = _recipe(answer, request, how, words)
    made = _made(target, recipe, place, tokens)
    plan = answer.prediction
    made = replace(made, notes=tuple(dict.fromkeys((*plan.warnings, *made.notes))))
    if plan.verdict == NO and not target.startswith("databricks"):
        made = replace(made, errors=(*made.errors, "the run does not fit the card: loraplan fits says what to change"))
    return made


def _recipe(answer: Answer, request: Request, how: Organised, words: Callable[[Answer], str]) -> tuple[Recipe, float]:
    """The planned run with the names that no setting holds, and the tokens it trains on."""
    plan, found = answer.prediction, answer.data
    if not isinstance(plan.model, ModelSpec):
        raise InvalidInput("exports are planned by loraplan's own program")
    card = plan.gpu
    text = words(answer)
    text += f"; device memory {plan.device.expected / 2**30:.2f} GiB ({plan.device.low / 2**30:.2f} to "
    text += f"{plan.device.high / 2**30:.2f})" + (f" on {card.name}: {plan.verdict}" if card else "")
    recipe = Recipe(
        model_id=request.model if isinstance(request.model, str) else answer.loaded.model_id,
        model=plan.model,
        training=plan.training,
        limit=found.batching.limit if found else plan.training.seq_len,
        plan_words=text,
        **how._asdict(),
    )
    if found is None:
        return recipe, 0.0
    recipe = replace(
        recipe,
        data=found.found.source.paths[0],
        data_shape=found.found.shapes[0][0],
        template=found.found.template.name,
        padding=found.batching.padding,
    )
    return recipe, found.seen.total * how.epochs


def _made(target: str, recipe: Recipe, place: Place, tokens: float) -> Export:
    if target == "databricks-air":
        from planner.exporters import databricks_air as air

        choice = air.choose(recipe, place.accelerator, place.num_accelerators, place.margin)
        return air.export(recipe, choice, experiment=place.name)
    if target == "databricks-cluster":
        from planner.exporters import databricks_cluster as cluster

        return cluster.export(recipe, cluster.choose(recipe, place.cloud, place.node_type), name=place.name)
    if target == "databricks-fm":
        from planner.exporters import databricks_fm as fm

        given = {
            "register_to": place.register_to, "data_prep_cluster_id": place.data_prep_cluster_id,
            "training_duration": place.duration,
        }  # fmt: skip
        return fm.export(fm.call_of(recipe, given), tokens, recipe.data_shape)
    from planner.exporters import frameworks, script

    exporters = {
        "peft": script.export, "trl": frameworks.trl, "axolotl": frameworks.axolotl,
        "llama-factory": frameworks.llama_factory, "entrenar": frameworks.entrenar,
    }  # fmt: skip
    return exporters[target](recipe)
