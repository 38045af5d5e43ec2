"""What a configuration trains and stores, and what other planners say for a run beside our own figures for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from planner.base.errors import Contradiction, InvalidInput
from planner.base.records import replace
from planner.course import labs, rivals
from planner.course.labs import Comparison
from planner.course.rivals import EntrenarPlan
from planner.device.hardware import Gpu
from planner.model import adapter
from planner.model.adapter import AdapterFacts
from planner.model.lora import trainable_lora_parameters
from planner.model.spec import ModelSpec
from planner.plan.compared import Compared
from planner.plan.predict import predict
from planner.plan.request import Plan
from planner.training.spec import TrainingSpec


class Rival(NamedTuple):
    """What entrenar answers for the same card, beside our own figures for it."""

    plan: EntrenarPlan
    exact_trainable: int
    """Of its configuration: its rank, attention modules."""
    memory_bytes: int
    """Predicted here for its configuration and its built-in batch and length."""
    verdict: str | None
    """Of the same."""
    own_memory_bytes: int
    """Predicted for the configuration that was asked for."""
    own_verdict: str | None
    notes: tuple[str, ...]


class LoraAnswer(NamedTuple):
    """Everything a report about a configuration may print."""

    model_id: str
    training: TrainingSpec
    facts: AdapterFacts
    comparisons: tuple[Comparison, ...]
    rival: Rival | None = None
    notes: tuple[str, ...] = ()
    """Of the plan: what was read of the model and the config."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """The plan's notes, then the adapter's."""
        return tuple(dict.fromkeys((*self.notes, *self.facts.warnings)))


def lora_answer(plan: Plan) -> LoraAnswer:
    """What a configuration is; beside entrenar's answer where the plan has a card.

    Raises:
        Contradiction: there is no adapter.
    """
    facts = adapter_facts(plan)
    spec, training = plan.spec, plan.training
    beside = entrenar(spec, training, plan.card) if plan.card else None
    compared = labs.compare(spec, training, facts)
    return LoraAnswer(spec.model_id, training, facts, compared, beside, plan.warnings)


def adapter_facts(plan: Plan) -> AdapterFacts:
    """The facts of the plan's adapter.

    Raises:
        Contradiction: there is none.
    """
    if plan.training.lora is None:
        raise Contradiction("method full has no adapter; choose --method lora or qlora")
    return adapter.facts(plan.spec, plan.training)


def lab_5_2(plan: Plan) -> dict[str, object]:
    """The course's lab 5.2 for the plan's model, as plain values.

    Raises:
        Contradiction: there is no adapter.
    """
    return {**labs.lab_5_2(plan.spec, plan.training, adapter_facts(plan)), "warnings": list(plan.warnings)}


def lab_5_3(plan: Plan, data_file: str | None) -> dict[str, object]:
    """The course's lab 5.3: a config file of the course, with the keys that it has.

    Raises:
        Contradiction: there is no adapter.
    """
    adapter_facts(plan)
    job = labs.Job(model_name=str(plan.request.model), dataset_path=data_file or "train.jsonl")
    return {**labs.lab_5_3(plan.spec, plan.training, job)}


def entrenar_beside(items: Sequence[Compared]) -> list[tuple[str, Rival]]:
    """What entrenar-lora plans for each configuration's model and card, by the configuration's letter.

    Raises:
        InvalidInput: a configuration without a card or an adapter.
    """
    found = []
    for item in items:
        p = item.prediction
        if p.gpu is None or p.training.lora is None or not isinstance(p.model, ModelSpec):
            raise InvalidInput(f"configuration {item.label}: --with needs a card and an adapter (lora or qlora)")
        found.append((item.label, entrenar(p.model, p.training, p.gpu)))
    return found


def entrenar(spec: ModelSpec, training: TrainingSpec, card: Gpu) -> Rival:
    """Its plan for the model's size and the card, beside our prediction of this run."""
    assert training.lora is not None
    method: Literal["lora", "qlora"] = "qlora" if training.method == "qlora" else "lora"
    plan = rivals.entrenar_plan(spec.num_parameters, card.memory_bytes, method)
    own_adapter = replace(training.lora, r=plan.rank, lora_alpha=plan.alpha, target_modules=("attention",))
    batch, length = rivals.ENTRENAR_BATCH, rivals.ENTRENAR_LENGTH
    request = replace(training, lora=own_adapter, micro_batch_size=batch, seq_len=length)
    exact = trainable_lora_parameters(spec, own_adapter)
    same, own = predict(spec, request, card), predict(spec, training, card)
    notes = rivals.entrenar_differences(plan, exact, same.device.expected)
    return Rival(plan, exact, same.device.expected, same.verdict, own.device.expected, own.verdict, tuple(notes))
