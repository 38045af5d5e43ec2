"""An answer to "does it fit": the prediction with where its inputs came from, and the words that describe it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.base.errors import one_line
from planner.base.units import gib
from planner.memory.walk import Moment
from planner.plan.answer import Answer
from planner.training.quantizations import USUAL
from planner.training.spec import TrainingSpec


def model_name(answer: Answer) -> str:
    """Return the model's name without its organisation, fit for a terminal."""
    return one_line(answer.prediction.model.model_id.rpartition("/")[2], 50)


def run_words(answer: Answer) -> str:
    """Describe the run in a line: model, method, adapter, length, batch."""
    return training_words(model_name(answer), answer.prediction.training)


def training_words(name: str, t: TrainingSpec) -> str:
    """Describe the training of the model called `name` in a line."""
    words = [name, t.method]
    if t.quantization.kind not in ("none", USUAL):
        words.append(t.quantization.kind)
    if t.lora is not None:
        words += [f"r={t.lora.r}", target_words(t.lora.target_modules)]
    batch = f"batch {t.micro_batch_size}"
    if t.gradient_accumulation_steps != 1:
        batch += f" x {t.gradient_accumulation_steps}"
    return f"{' '.join(words)}, length {t.seq_len}, {batch}"


def target_words(targets: tuple[str, ...]) -> str:
    """Name the adapted modules, shortened when there are many."""
    if len(targets) > 4:
        return f"{len(targets)} target modules"
    return one_line("+".join(targets), 50)


def card_words(answer: Answer) -> str:
    """Name the card and its memory; empty without one."""
    gpu = answer.prediction.gpu
    if gpu is None:
        return ""
    if gpu.memory_basis == "user":
        return one_line(gpu.name, 40)
    return f"{one_line(gpu.name, 40)} ({gib(gpu.memory_bytes)} GiB)"


_OUTSIDE = {
    "load": "while the model is loaded",
    "state": "in the first optimizer step, when its state is made",
    "inputs": "when the batch arrives",
    "embedding": "in the embeddings",
    "forward": "in the forward, outside the layers",
    "loss": "in the forward, at the head and loss",
    "head backward": "at the start of the backward, in the loss and head",
    "backward": "in the backward, outside the layers",
    "optimizer": "in the optimizer step",
}


def moment_words(moment: Moment, layers: int, recomputed: bool) -> str:
    """Say in words where in the step the peak is."""
    if moment.in_head and moment.layer < 0:
        return _OUTSIDE["head backward"]
    if moment.layer < 0:
        return _OUTSIDE.get(moment.phase, moment.phase)
    where = f"layer {moment.layer + 1} of {layers}"
    if moment.phase == "optimizer":
        return f"in the optimizer step, at the weights of {where}"
    if moment.phase == "backward" and recomputed:
        return f"in the backward of {where}, recomputed from its checkpoint"
    if moment.phase in ("forward", "backward"):
        return f"in the {moment.phase} of {where}"
    return f"{_OUTSIDE.get(moment.phase, moment.phase)}, {where}"


def via_words(answer: Answer) -> str:
    """Say what answered: empty for loraplan's own program, else the libraries that were traced."""
    p = answer.prediction
    if p.via == "program":
        return ""
    releases = ", ".join(f"{name} {one_line(release.split('+')[0], 30)}" for name, release in p.libraries)
    return f"via trace: the libraries themselves, all {p.model.num_layers} layers ({releases})"


def peak_words(answer: Answer) -> str:
    """Say in words where in the step this answer's peak is."""
    p = answer.prediction
    recomputed = p.training.gradient_checkpointing != "none"
    return moment_words(p.breakdown.moment, p.model.num_layers, recomputed)


def value_words(value: Any) -> str:
    """Print a setting's value on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value) or "none"
    return one_line(str(value), 200)
