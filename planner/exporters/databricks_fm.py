"""Target `databricks-fm`: a call of the Foundation Model Fine-tuning API, checked offline before it is written.

The API is at its end of life and has no LoRA, so its notes come first. The checks repeat those of the wheel
databricks-genai 1.1.8 (databricks/model_training/api/validation.py, foundation_model/create.py, types/train_config.py);
the wheel itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from planner.base.errors import one_line
from planner.exporters.recipe import Artifact, Export, Recipe
from planner.exporters.text import json_file, python

TASKS = ("INSTRUCTION_FINETUNE", "CHAT_COMPLETION", "CONTINUED_PRETRAIN")
DEFAULT_TASK = "CHAT_COMPLETION"
DEFAULT_LEARNING_RATE = 5e-7
ARGUMENTS = (
    "model", "train_data_path", "register_to", "experiment_path", "task_type", "eval_data_path", "eval_prompts",
    "custom_weights_path", "training_duration", "learning_rate", "context_length", "validate_inputs",
    "data_prep_cluster_id",
)  # fmt: skip
END_OF_LIFE = (
    "end of life: Foundation Model Fine-tuning is deprecated and was announced for removal on 2026-08-14; use "
    "loraplan export databricks-air"
)
IGNORES = (
    "this API tunes all parameters: rank, alpha, targets, quantization, batch size and GPU of the plan are ignored, it "
    "has no argument for them"
)


class Finding(NamedTuple):
    """One thing that is wrong with a call, or that its author should know."""

    level: Literal["error", "warning"]
    text: str


def check(call: Mapping[str, Any]) -> list[Finding]:
    """Check the arguments of foundation_model.create without asking the platform."""
    found = [Finding("warning", END_OF_LIFE), Finding("warning", IGNORES)]
    for name in ("model", "train_data_path", "register_to"):
        if not isinstance(call.get(name), str) or not call[name]:
            found.append(Finding("error", f"{name} is missing"))
    for name in call:
        if name not in ARGUMENTS:
            found.append(Finding("error", f"create() has no argument {one_line(name, 40)!r}"))
    task = call.get("task_type", DEFAULT_TASK)
    if task not in TASKS:
        found.append(Finding("error", f"task_type is {one_line(task, 40)!r}; known: {', '.join(TASKS)}"))
    for name in ("train_data_path", "eval_data_path"):
        if isinstance(call.get(name), str) and call[name]:
            found += _check_path(name, call[name], task, call.get("data_prep_cluster_id"))
    found += [*_check_register(call.get("register_to")), *_check_duration(call.get("training_duration"))]
    found += [*_check_rate(call.get("learning_rate")), *_check_length(call.get("context_length"))]
    found += [*_check_weights(call.get("custom_weights_path"))]
    return found


def _check_path(name: str, path: str, task: str, cluster: Any) -> Iterator[Finding]:
    """Volume file, Hugging Face data set or Delta table, as validation.py tells them apart."""
    shown = one_line(path, 80)
    full = f"dbfs:{path}" if path.startswith(("/Volumes", "/databricks")) else path
    if full.startswith("dbfs:"):
        if not re.match(r"dbfs:/Volumes/[^/]+/[^/]+/[^/]+", full):
            yield Finding(
                "error", f"{name} {shown!r}: a dbfs: path must begin dbfs:/Volumes/<catalog>/<schema>/<volume>"
            )
        elif task == "CONTINUED_PRETRAIN":
            if full.endswith((".jsonl", ".txt")):
                yield Finding("error", f"{name} {shown!r}: continued pre-training takes a folder with .txt files")
        elif not full.endswith(".jsonl"):
            yield Finding("error", f"{name} {shown!r}: must be a .jsonl file")
        return
    if "/" in path:
        if len(path.split("/")) != 3 or not all(path.split("/")):
            yield Finding("error", f"{name} {shown!r}: a Hugging Face data set is <entity>/<dataset>/<split>")
        return
    parts = path.split(".")
    if len(parts) != 3 or not all(parts):
        yield Finding("error", f"{name} {shown!r}: a Delta table is <catalog>.<schema>.<table>")
    elif not cluster:
        yield Finding("error", f"{name} {shown!r} is a Delta table: it needs data_prep_cluster_id")
    elif str(cluster).lower() == "serverless":
        yield Finding("error", "data_prep_cluster_id: serverless is refused; name a cluster with data governance")


def _check_register(value: Any) -> Iterator[Finding]:
    parts = value.split(".") if isinstance(value, str) and value else []
    if parts and (len(parts) not in (2, 3) or not all(parts)):
        yield Finding("error", f"register_to {one_line(value, 60)!r}: must be catalog.schema or catalog.schema.model")


def _check_duration(value: Any) -> Iterator[Finding]:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return
    if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d{0,11}(ba|ep|tok)", value):
        yield Finding(
            "error", f"training_duration {one_line(value, 40)!r}: a number with ba, ep or tok, for example 3ep"
        )


def _check_rate(value: Any) -> Iterator[Finding]:
    if value is None:
        return
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = -1.0
    if not 0 < rate < 1:
        yield Finding("error", f"learning_rate {one_line(value, 40)!r}: must be a number above 0 and below 1")
        return
    if not isinstance(value, (int, float)):
        yield Finding("warning", f"learning_rate is the text {one_line(value, 40)!r}; give a number")
    if rate > 20 * DEFAULT_LEARNING_RATE:
        yield Finding(
            "warning",
            f"learning_rate {rate:g} is {rate / DEFAULT_LEARNING_RATE:,.0f} times the API's default of "
            f"{DEFAULT_LEARNING_RATE:g} for full tuning: LoRA's rates are too high here",
        )


def _check_length(value: Any) -> Iterator[Finding]:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        yield Finding("error", f"context_length {one_line(value, 40)!r}: must be a whole number of tokens")


def _check_weights(value: Any) -> Iterator[Finding]:
    if value is None:
        return
    good = isinstance(value, str) and (
        re.match(r"dbfs:/databricks/mlflow-tracking/[^/]+/[^/]+/artifacts/", value)
        or value.endswith((".pt", ".symlink"))
    )
    if not good:
        yield Finding(
            "error",
            f"custom_weights_path {one_line(value, 80)!r}: must be "
            "dbfs:/databricks/mlflow-tracking/<experiment>/<run>/artifacts/...",
        )


def call_of(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the call for a planned run; what is given wins."""
    tasks = {"alpaca": "INSTRUCTION_FINETUNE", "prompt": "INSTRUCTION_FINETUNE", "text": "CONTINUED_PRETRAIN"}
    call: dict[str, Any] = {
        "model": recipe.model_id,
        "train_data_path": recipe.data,
        "register_to": "main.default",
        "task_type": tasks.get(recipe.data_shape, "CHAT_COMPLETION"),
        "training_duration": f"{max(1, round(recipe.epochs))}ep",
        "context_length": recipe.limit,
    }
    return {**call, **{key: value for key, value in given.items() if value is not None}}


def export(call: Mapping[str, Any], tokens: float = 0.0, data_shape: str = "") -> Export:
    """Write the call as JSON and as Python; findings of level error are what the platform would refuse."""
    found = check(call)
    notes = [item.text for item in found if item.level == "warning"]
    if data_shape in ("alpaca", "sharegpt"):
        shape = "prompt" if data_shape == "alpaca" else "messages"
        notes.append(f"{data_shape} rows are refused; write them with loraplan data FILE --write FOLDER --as {shape}")
    if tokens:
        notes.append(f"about {tokens:,.0f} tokens are trained on (epochs times tokens, cut at the context length)")
    arguments = "".join(f"    {key}={python(value)},\n" for key, value in call.items() if key in ARGUMENTS)
    source = (
        f"# {END_OF_LIFE}\n# {IGNORES}\nfrom databricks.model_training import foundation_model as fm\n\n"
        f"run = fm.create(\n{arguments})\n"
    )
    return Export(
        artifacts=(Artifact("create.json", json_file(dict(call))), Artifact("create.py", source)),
        notes=tuple(notes),
        errors=tuple(item.text for item in found if item.level == "error"),
    )
