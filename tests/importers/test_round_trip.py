"""A planned run written as a framework's config and read back is the same run, wherever the framework can say it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.exporters import frameworks, script
from planner.exporters.recipe import Export, Recipe
from planner.model import lora
from planner.model.spec import ModelSpec
from planner.plan.configure import configure
from planner.plan.given import Settings
from planner.plan.jobs import Files, job_of
from planner.plan.models import load_model
from planner.training.spec import TrainingSpec

MODEL = "meta-llama/Llama-3.1-8B"
TARGETS: dict[str, tuple[Callable[[Recipe], Export], str]] = {
    "axolotl": (frameworks.axolotl, "axolotl"),
    "trl": (frameworks.trl, "trl"),
    "llama-factory": (frameworks.llama_factory, "llama-factory"),
    "peft": (script.export, "trl"),  # the script trains with TRL's SFTTrainer
}
"""Export target -> its writer and the stack whose habits the written file runs under."""


def drawn(random_: random.Random) -> dict[str, Any]:
    """Draw options that every target can write."""
    pick = random_.choice
    given = {
        "method": pick(("full", "lora", "qlora")),
        "seq_len": pick((512, 1000, 2048)),
        "micro_batch_size": pick((1, 3)),
        "gradient_accumulation_steps": pick((1, 5)),
        "optimizer": pick((None, "adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit", "adafactor", "sgd", "lion")),
        "gradient_checkpointing": pick((None, "none", "full")),
        "attention": pick((None, "sdpa", "flash2", "eager")),
        "max_grad_norm": pick((None, 0.5)),
    }
    if given["method"] != "full":
        given |= {"r": pick((None, 4, 64)), "target_modules": pick((None, "all-linear", "q_proj,k_proj"))}
        given |= {"lora_dropout": pick((None, 0.1)), "use_rslora": pick((None, True)), "use_dora": pick((None, True))}
    if given["method"] == "qlora":
        given["quantization"] = pick((None, "nf4", "int8"))
        given["double_quant"] = pick((None, True, False)) if given["quantization"] != "int8" else None
    return given


def planned(spec: ModelSpec, stack: str, given: dict[str, Any]) -> TrainingSpec:
    """Return the run of drawn options, as the command line would plan it."""
    said = Settings(given)
    return configure(spec, said.stack or stack, said.options())[1]


def spelled_out(spec: ModelSpec, training: TrainingSpec) -> TrainingSpec:
    """Return the run with its targets as the modules they are: all-linear may be written as their names."""
    if training.lora is None:
        return training
    names = tuple(sorted({adapted.name for adapted in lora.resolve_targets(spec, training.lora)}))
    return replace(training, lora=replace(training.lora, target_modules=names))


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_is_read_back(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write, stack = TARGETS[target]
    spec = load_model(MODEL).spec
    random_ = random.Random(target)
    for number in range(60):
        training = planned(spec, stack, drawn(random_))
        recipe = Recipe(
            model_id=MODEL, model=spec, training=training, limit=training.seq_len, plan_words="", output_dir="out",
            learning_rate=1e-4, schedule="cosine", warmup_steps=0, weight_decay=0.0, epochs=1.0, max_steps=0,
            save_steps=10, seed=1,
        )  # fmt: skip
        made = write(recipe)
        path = tmp_path / str(number) / made.artifacts[0].name
        path.parent.mkdir()
        path.write_text(made.artifacts[0].text, encoding="utf-8")
        job = job_of(Files((str(path),)), Settings())
        assert job.model == MODEL
        again = configure(spec, job.stack, {}, job)[1]
        assert spelled_out(spec, again).describe() == spelled_out(spec, training).describe(), made.artifacts[0].text
