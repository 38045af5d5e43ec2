"""Target `databricks-air`: a workload of Databricks AI Runtime, as its YAML and as a job of the Jobs API.

Workload keys: docs.databricks.com, "Workload YAML reference" (ai-runtime/connecting/cli/yaml-config). Job:
databricks-sdk 0.162.0 service/jobs.py AiRuntimeTask, one deployment, accelerators in whole nodes.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput, PlannerError, one_line, unknown
from planner.device.hardware import Gpu
from planner.exporters import script
from planner.exporters.recipe import Artifact, Export, Recipe
from planner.exporters.text import comment, json_file, yaml
from planner.facts import catalog
from planner.plan.predict import Prediction, predict
from planner.plan.verdict import FITS

ENVIRONMENT_VERSION = 6
DEPENDENCIES = ("trl==1.16.0", "peft>=0.21", "bitsandbytes>=0.50")


class Accelerator(NamedTuple):
    """An accelerator type of AI Runtime."""

    name: str
    per_node: int
    gpu_id: str
    """The card of the catalogue that stands for it: the one with the least memory it may be."""


# databricks-sdk 0.162.0 service/jobs.py ComputeSpecAcceleratorType; smallest first. The A10 shape is an A10G on AWS and
# an A10 on Azure; both have 24 GB and the A10G reports the less of it.
ACCELERATORS = (
    Accelerator("GPU_1xA10", 1, "a10g"),
    Accelerator("GPU_1xH100", 1, "h100-sxm5-80gb"),
    Accelerator("GPU_8xH100", 8, "h100-sxm5-80gb"),
    Accelerator("GPU_8xB300", 8, "b300-sxm-288gb"),
)


class Choice(NamedTuple):
    """The accelerator a run is placed on, and the prediction there."""

    accelerator: Accelerator
    number: int
    prediction: Prediction


def choose(recipe: Recipe, name: str | None, count: int | None, margin: float = 0.0) -> Choice:
    """Return the accelerator that was named, or the smallest on which the run fits with `margin` percent to spare.

    Raises:
        PlannerError: an unknown type, a count that is no multiple of the node, or a run that fits none.
    """
    if name is not None:
        found = next((a for a in ACCELERATORS if a.name == name), None)
        if found is None:
            raise unknown("accelerator type", name, [a.name for a in ACCELERATORS], "(upper and lower case matter)")
        return Choice(found, check_count(found, count), _predicted(recipe, found, margin))
    tried = []
    for accelerator in ACCELERATORS:
        prediction = _predicted(recipe, accelerator, margin)
        if prediction.verdict == FITS:
            return Choice(accelerator, check_count(accelerator, count), prediction)
        tried.append(f"{accelerator.name} {prediction.verdict}")
    raise PlannerError(
        f"the run fits no accelerator of AI Runtime ({'; '.join(tried)}); loraplan fits MODEL --gpu h100 says what to "
        "change"
    )


def check_count(accelerator: Accelerator, count: int | None) -> int:
    """The number of accelerators: whole nodes.

    Raises:
        InvalidInput: any other number.
    """
    if count is None:
        return accelerator.per_node
    if count < 1 or count % accelerator.per_node:
        raise InvalidInput(
            f"num_accelerators is {count}; {accelerator.name} comes in nodes of {accelerator.per_node}: it must be a "
            f"multiple of {accelerator.per_node}"
        )
    return count


def _predicted(recipe: Recipe, accelerator: Accelerator, margin: float) -> Prediction:
    from planner.base.records import replace

    card = catalog.gpu(accelerator.gpu_id)
    kept = int(card.memory_bytes * margin / 100)
    return predict(recipe.model, recipe.training, replace(card, used_by_others_bytes=kept))


def export(
    recipe: Recipe, choice: Choice, *, experiment: str = "loraplan", folder: str = "/Workspace/Shared/loraplan"
) -> Export:
    """Write the workload, the job and the training script.

    Raises:
        InvalidInput: an experiment or folder that the platform would not take.
    """
    if not re.fullmatch(r"[^\x00-\x1f]{1,200}", experiment):
        raise InvalidInput(f"the experiment name is {one_line(experiment)!r}; must be 1 to 200 printable characters")
    if not folder.startswith("/"):
        raise InvalidInput(f"the folder is {one_line(folder)!r}; must be a workspace path such as /Workspace/Shared/x")
    accelerator, count, prediction = choice
    workload = {
        "experiment_name": experiment,
        "compute": {"accelerator_type": accelerator.name, "num_accelerators": count},
        "environment": {"version": ENVIRONMENT_VERSION, "dependencies": list(DEPENDENCIES)},
        "code_source": {"root_path": "."},
        "command": f"python $CODE_SOURCE_PATH/{script.NAME}",
    }
    head = (
        comment(f"{recipe.model_id}: {recipe.plan_words}") + "\n" + comment("Run: databricks air run -f workload.yaml")
    )
    job = job_of(experiment, f"{folder.rstrip('/')}/run.sh", accelerator, count)
    notes = [*script.notes(recipe), _fit_words(accelerator, prediction)]
    if count > 1:
        notes.append(
            f"the plan is for one GPU; {count} are reserved (whole nodes). Several GPUs are not planned: run.sh starts "
            "one process"
        )
    errors = [] if prediction.verdict == FITS else [_fit_words(accelerator, prediction)]
    return Export(
        artifacts=(
            Artifact("workload.yaml", head + "\n" + yaml(workload)),
            Artifact("job.json", json_file(job)),
            Artifact("run.sh", _run_script()),
            Artifact(script.NAME, script.script(recipe)),
        ),
        notes=tuple(notes),
        errors=tuple(errors),
    )


def job_of(experiment: str, command_path: str, accelerator: Accelerator, count: int) -> dict[str, Any]:
    """The body of a jobs/create request with one AI Runtime task."""
    compute = {"accelerator_type": accelerator.name, "accelerator_count": check_count(accelerator, count)}
    task = {"experiment": experiment, "deployments": [{"command_path": command_path, "compute": compute}]}
    return {"name": experiment, "tasks": [{"task_key": "train", "ai_runtime_task": task}]}


def _run_script() -> str:
    packages = " ".join(f"'{name}'" for name in DEPENDENCIES)
    return f'#!/bin/sh\nset -e\ncd "$(dirname "$0")"\npip install -q {packages}\nexec python {script.NAME}\n'


def _fit_words(accelerator: Accelerator, prediction: Prediction) -> str:
    gpu: Gpu | None = prediction.gpu
    assert gpu is not None
    return (
        f"{accelerator.name} (as {gpu.name}, {gpu.memory_bytes / 2**30:.2f} GiB): {prediction.verdict}, device memory "
        f"{prediction.device.expected / 2**30:.2f} GiB ({prediction.device.low / 2**30:.2f} to "
        f"{prediction.device.high / 2**30:.2f})"
    )
