"""Recipes that exports are tried with: by the tests, and with the frameworks' own classes by .ci/check_exports.py."""

from __future__ import annotations

from typing import Any

from planner.exporters.recipe import Recipe
from planner.facts import catalog
from planner.model import families
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

NAME = "Qwen/Qwen2.5-0.5B"
CONFIG = catalog.model_record(NAME).config  # type: ignore[union-attr]
MODEL = families.build_spec(CONFIG, model_id=NAME)

LORA = TrainingSpec(method="lora", lora=LoraSpec(r=8, target_modules=("q_proj", "v_proj")), micro_batch_size=2)
QLORA = TrainingSpec(
    method="qlora",
    lora=LoraSpec(r=16, lora_alpha=32, lora_dropout=0.05),
    quantization=QuantizationSpec(kind="nf4", double_quant=True),
    optimizer="paged-adamw-8bit",
    gradient_accumulation_steps=4,
)
FULL = TrainingSpec(method="full")
INT8 = TrainingSpec(method="qlora", lora=LoraSpec(), quantization=QuantizationSpec(kind="int8"))
TRAININGS = {"lora": LORA, "qlora": QLORA, "full": FULL, "int8": INT8}


def recipe(training: TrainingSpec = LORA, **extra: Any) -> Recipe:
    """A recipe on the small model; `extra`: its other fields."""
    return Recipe(**{"model_id": NAME, "model": MODEL, "training": training, "limit": 512, **extra})
