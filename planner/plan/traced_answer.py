"""The answer of a trace: the real libraries run under fake tensors, in the place of the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.device.hardware import Gpu
from planner.facts.sources import LoadedConfig
from planner.model.spec import ModelSpec
from planner.training import stacks
from planner.training.settings import Resolved
from planner.training.spec import TrainingSpec

if TYPE_CHECKING:
    from planner.device.cuda_rules import Architecture
    from planner.plan.answer import Answer
    from planner.plan.traced import Traced


def traced_answer(
    model: str, card: Gpu | None, stack: str | None, given: dict[str, Any], limit_s: float, cached: bool, kept: int
) -> Answer:
    """Answer `loraplan fits --via trace`: every layer is traced, because the allocator is replayed.

    Raises:
        PlannerError: no answer.
    """
    from planner.plan.answer import Answer
    from planner.plan.request import stack_origin
    from planner.plan.traced import predict_traced
    from planner.step.architecture import architecture

    loaded, spec, notes, resolved, training = _prepare(model, stack, given, card)
    arch = architecture(card, training)
    traced = _run(loaded.config, loaded.model_id, training, arch, "full", limit_s, cached, events=True)
    notes += _other_releases(given, traced)
    prediction = predict_traced(traced, training, card, model=spec, warnings=notes)
    return Answer(prediction, loaded, resolved, (), kept, stack_origin=stack_origin(given, stack))


def _prepare(
    model: str, stack: str | None, given: dict[str, Any], card: Gpu | None
) -> tuple[LoadedConfig, ModelSpec | None, tuple[str, ...], Resolved, TrainingSpec]:
    """Read the model's config, the family's structure if one is registered, and the settings."""
    from planner.base.errors import UnknownName
    from planner.facts import sources
    from planner.plan.request import configure, notes_of, read_model

    loaded = sources.load_config(model)
    spec, notes = None, loaded.warnings
    try:
        known = read_model(loaded, derive=False)
    except UnknownName:  # not a family of the registry: transformers may know it
        pass
    else:
        spec, notes = known.spec, known.warnings
    resolved, training = configure(spec, stack or stacks.CUSTOM, given, card=card)
    return loaded, spec, notes_of(given, notes, card), resolved, training


def _layers(text: str) -> str | int:
    from planner.base.errors import InvalidInput, one_line

    word = text.strip().lower()
    if word in ("auto", "full"):
        return word
    if word.isascii() and word.isdigit() and 0 < int(word) < 10_000:
        return int(word)
    raise InvalidInput(f"--layers is {one_line(text)!r}; write auto, full or a number of layers from 1")


def _cut(config: Any, spec: ModelSpec | None, layers: str | int) -> tuple[Any, ModelSpec | None]:
    """Cut the program's model to as many layers as the trace runs."""
    from planner.base.errors import InvalidInput

    if not isinstance(layers, int) or spec is None:
        return config, spec
    if layers > spec.num_layers:
        raise InvalidInput(f"--layers is {layers}; the model has {spec.num_layers}")
    return config, spec.first_layers(layers)


def _run(
    config: Any, model_id: str, training: TrainingSpec, arch: Architecture, layers: str | int, limit_s: float,
    cached: bool, events: bool = False,
) -> Traced:  # fmt: skip
    from planner.plan import traced, tracing

    asked = traced.request(config, training, arch, layers, events=events)
    return traced.read(tracing.ask(asked, limit_s=limit_s, cached=cached), model_id)


def _other_releases(given: dict[str, Any], traced: Traced) -> tuple[str, ...]:
    """Say so where the releases asked for are not the installed ones, which are what is traced."""
    from planner.training.spec import Versions

    asked, usual = given.get("versions") or Versions(), Versions()
    installed = {name: release.split("+")[0] for name, release in traced.versions}
    notes = []
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        release = ".".join(map(str, getattr(asked, name)))
        if getattr(asked, name) != getattr(usual, name) and not f"{installed.get(name)}.".startswith(f"{release}."):
            notes.append(f"the trace ran {name} {installed.get(name)}, which is installed, not {release}")
    return tuple(notes)
