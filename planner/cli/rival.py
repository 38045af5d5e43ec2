"""What another planner says for a run, beside our own figures for the same request and for the run itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from planner.device.hardware import Gpu
    from planner.model.spec import ModelSpec
    from planner.report.lora_report import Rival
    from planner.training.spec import TrainingSpec


def entrenar(spec: ModelSpec, training: TrainingSpec, card: Gpu) -> Rival:
    """Its plan for the model's size and the card, beside our prediction of this run."""
    from planner.base.records import replace
    from planner.course import rivals
    from planner.model.lora import trainable_lora_parameters
    from planner.plan.predict import predict
    from planner.report.lora_report import Rival

    assert training.lora is not None
    method: Literal["lora", "qlora"] = "qlora" if training.method == "qlora" else "lora"
    plan = rivals.entrenar_plan(spec.num_parameters, card.memory_bytes, method)
    adapter = replace(training.lora, r=plan.rank, lora_alpha=plan.alpha, target_modules=("attention",))
    request = replace(training, lora=adapter, micro_batch_size=rivals.ENTRENAR_BATCH, seq_len=rivals.ENTRENAR_LENGTH)
    exact = trainable_lora_parameters(spec, adapter)
    same, own = predict(spec, request, card), predict(spec, training, card)
    notes = rivals.entrenar_differences(plan, exact, same.device.expected)
    return Rival(plan, exact, same.device.expected, same.verdict, own.device.expected, own.verdict, tuple(notes))
