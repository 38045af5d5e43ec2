"""What a trace says of a plan: the real libraries run under fake tensors, in the place of the program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.base.records import NamedTuple
from planner.plan.predict import Prediction
from planner.plan.request import Plan, Tracing
from planner.training.spec import Versions

if TYPE_CHECKING:
    from planner.device.cuda_rules import Architecture
    from planner.memory.walk import MemoryBreakdown
    from planner.model.spec import ModelSpec
    from planner.plan.traced import Traced
    from planner.training.spec import TrainingSpec


class TracedStep(NamedTuple):
    """A step that was traced, for a look at its memory."""

    traced: Traced
    arch: Architecture
    program: MemoryBreakdown | None
    """What loraplan's own program says of the same step, where that was asked for."""
    notes: tuple[str, ...]


def traced_prediction(plan: Plan) -> Prediction:
    """Predict by a trace of every layer, because the allocator is replayed.

    Raises:
        PlannerError: no answer.
    """
    from planner.plan.traced import predict_traced
    from planner.step.architecture import architecture

    traced = _run(plan, architecture(plan.card, plan.training), "full", events=True)
    notes = (*plan.notes, *_other_releases(plan.training.versions, traced))
    return predict_traced(traced, plan.training, plan.card, model=plan.model, warnings=notes)


def traced_step(plan: Plan, layers: str, *, compare: bool = False) -> TracedStep:
    """Trace one step.

    Args:
        plan: resolved for a trace.
        layers: "auto" (some layers, the rest extrapolated), "full", or the number of layers to cut the model to.
        compare: ask loraplan's own program too.

    Raises:
        PlannerError: no answer, or no such layers.
    """
    from planner.step.architecture import architecture

    arch = architecture(plan.card, plan.training)
    wanted = _layers(layers)
    spec = _cut(plan.model, wanted)
    program = _program(spec, plan.training, arch) if compare else None
    traced = _run(plan, arch, wanted)
    notes = (*plan.notes, *traced.notes, *_other_releases(plan.training.versions, traced))
    return TracedStep(traced, arch, program, notes)


def _layers(text: str) -> str | int:
    from planner.base.errors import InvalidInput, one_line

    word = text.strip().lower()
    if word in ("auto", "full"):
        return word
    if word.isascii() and word.isdigit() and 0 < int(word) < 10_000:
        return int(word)
    raise InvalidInput(f"--layers is {one_line(text)!r}; write auto, full or a number of layers from 1")


def _cut(spec: ModelSpec | None, layers: str | int) -> ModelSpec | None:
    """Cut the program's model to as many layers as the trace runs."""
    from planner.base.errors import InvalidInput

    if not isinstance(layers, int) or spec is None:
        return spec
    if layers > spec.num_layers:
        raise InvalidInput(f"--layers is {layers}; the model has {spec.num_layers}")
    return spec.first_layers(layers)


def _program(spec: ModelSpec | None, training: TrainingSpec, arch: Architecture) -> MemoryBreakdown:
    """What loraplan's own program says, with the rule of a dispatch mode: gradients are added out of place."""
    from planner.base.errors import UnknownName
    from planner.memory import walk
    from planner.step import program

    if spec is None:
        raise UnknownName("--compare: loraplan's program does not know this family; drop --compare")
    return walk.breakdown(program.run(spec, training, arch, full_depth=True, accumulates_in_place=False).record)


def _run(plan: Plan, arch: Architecture, layers: str | int, events: bool = False) -> Traced:
    from planner.plan import traced, tracing

    how = plan.request.tracing or Tracing()
    asked = traced.request(plan.config.config, plan.training, arch, layers, events=events)
    return traced.read(tracing.ask(asked, limit_s=how.time_limit_s, cached=how.use_cache), plan.config.model_id)


def _other_releases(asked: Versions, traced: Traced) -> tuple[str, ...]:
    """Say so where the releases asked for are not the installed ones, which are what is traced."""
    usual = Versions()
    installed = {name: release.split("+")[0] for name, release in traced.versions}
    notes = []
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        release = ".".join(map(str, getattr(asked, name)))
        if getattr(asked, name) != getattr(usual, name) and not f"{installed.get(name)}.".startswith(f"{release}."):
            notes.append(f"the trace ran {name} {installed.get(name)}, which is installed, not {release}")
    return tuple(notes)
