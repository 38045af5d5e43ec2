"""Scopes of units: handlers are called in order around forward, recomputation and backward, and act there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from planner.device import cuda_rules
from planner.facts import sources
from planner.memory import walk
from planner.model.families import build_spec
from planner.step import checkpoints, program
from planner.step.classes import registry
from planner.step.context import Step
from planner.step.engine import LayerForward, Record, Storage, Tensor
from planner.step.scopes import OUTSIDE, Handler, Unit
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

LAYERS = [Unit(0), Unit(1), Unit(2), Unit(3)]


def run(handlers: Sequence[Handler], name: str = "meta-llama/Llama-3.2-1B", **settings: Any) -> Record:
    """A step with these handlers beside those of its settings."""
    model = build_spec(sources.load_config(name).config, model_id=name)
    lora: Any = {"method": "lora", "lora": LoraSpec(r=8), "quantization": QuantizationSpec()}
    training = TrainingSpec(micro_batch_size=1, seq_len=64, **{**lora, **settings})
    step = Step(model, training, cuda_rules.Architecture(), registry.habits_of(model.model_type))
    stack = program.plan_layers(model)
    step.eng.repeats = stack.repeats
    step.handle([*checkpoints.handlers(step), *handlers])
    return program._Run(step, stack).all().record


class Diary(Handler):
    """Writes down what it is told."""

    def __init__(self, name: str, pages: list[str]) -> None:
        self.name, self.pages = name, pages

    def note(self, step: Step, what: str, unit: Unit) -> None:
        again = " again" if step.eng.recomputing else ""
        self.pages.append(f"{self.name}: {what} {unit.layer}.{unit.sublayer}{again}")

    def before_forward(self, step: Step, unit: Unit, x: Tensor) -> None:
        self.note(step, "before forward", unit)

    def after_forward(self, step: Step, unit: Unit) -> None:
        self.note(step, "after forward", unit)

    def before_backward(self, step: Step, unit: Unit) -> None:
        self.note(step, "before backward", unit)

    def after_backward(self, step: Step, unit: Unit) -> None:
        self.note(step, "after backward", unit)


def expected(recomputed: list[str]) -> list[str]:
    """What a diary of a model with four units says; `recomputed` of each inside its backward."""
    forward = [f"a: {when} forward {n}.0" for n in range(4) for when in ("before", "after")]
    backward = []
    for n in (-1, 3, 2, 1, 0):
        again = [line.format(n) for line in recomputed] if n >= 0 else []
        backward += [f"a: before backward {n}.0", *again, f"a: after backward {n}.0"]
    return forward + backward


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [
        ({"gradient_checkpointing": "none"}, []),
        ({"gradient_checkpointing": "full", "use_reentrant": False}, ["a: before forward {}.0 again"]),
        (
            {"gradient_checkpointing": "full", "use_reentrant": True},
            ["a: before forward {}.0 again", "a: after forward {}.0 again"],
        ),
        ({"gradient_checkpointing": "offload", "use_reentrant": False}, ["a: before forward {}.0 again"]),
    ],
    ids=["none", "checkpoint", "reentrant", "offload"],
)
def test_a_handler_hears_of_every_unit_once_each_way(settings: dict[str, Any], recomputed: list[str]) -> None:
    """A recomputation that stops early (torch's default without reentry) never comes to its end."""
    pages: list[str] = []
    run([Diary("a", pages)], **settings)
    # embeddings that require grad are made a leaf: their node ends the backward of the first layer
    assert pages == expected(recomputed)


def test_handlers_nest() -> None:
    pages: list[str] = []
    run([Diary("a", pages), Diary("b", pages)], gradient_checkpointing="none")
    first = ["a: before forward 0.0", "b: before forward 0.0", "b: after forward 0.0", "a: after forward 0.0"]
    last = ["a: before backward 0.0", "b: before backward 0.0", "b: after backward 0.0", "a: after backward 0.0"]
    assert pages[:4] == first
    assert pages[-4:] == last


def test_layers_of_a_pattern_are_units() -> None:
    pages: list[str] = []
    run([Diary("a", pages)], "google/gemma-3-12b-it", gradient_checkpointing="none")
    told = [line for line in pages if "before backward" in line]
    assert told[1:7] == [f"a: before backward 3.{place}" for place in (5, 4, 3, 2, 1, 0)]


class Gathering(Handler):
    """A layer's frozen parameters lie here only while it runs (what sharding does, in the small)."""

    BYTES = 1 << 30

    def __init__(self) -> None:
        self.held: list[Storage] = []

    def before_forward(self, step: Step, unit: Unit, x: Tensor) -> None:
        if not self.held:  # in a recomputation the backward has gathered already
            self.held.append(step.eng.workspace(self.BYTES, "weight"))

    def after_forward(self, step: Step, unit: Unit) -> None:
        if not step.eng.in_backward:
            self.held.clear()

    def before_backward(self, step: Step, unit: Unit) -> None:
        if unit != OUTSIDE:
            self.held.append(step.eng.workspace(self.BYTES, "weight"))

    def after_backward(self, step: Step, unit: Unit) -> None:
        self.held.clear()


@pytest.mark.parametrize("reenters", [False, True])
@pytest.mark.parametrize("mode", ["none", "full", "offload"])
def test_what_is_gathered_for_a_unit_lies_there_once(mode: str, reenters: bool) -> None:
    """Short rows: the peak is in a layer's backward, which one gathered unit is added to."""
    settings: dict[str, Any] = {"gradient_checkpointing": mode, "use_reentrant": reenters}
    plain, gathered = run([], **settings), run([Gathering()], **settings)
    sizes = [(plain.events, walk.breakdown(plain)), (gathered.events, walk.breakdown(gathered))]
    assert 0 < sizes[1][1].peak_allocated_bytes - sizes[0][1].peak_allocated_bytes <= Gathering.BYTES
    made = [n for _, n in gathered.events if n == Gathering.BYTES]
    given_back = [n for _, n in gathered.events if n == -Gathering.BYTES]
    assert len(made) == len(given_back) == 2 * len(LAYERS), "once for the forward, once for the backward"


class Twice(Handler):
    """Runs every layer twice and keeps the second result."""

    def wrap(self, step: Step, forward: LayerForward) -> LayerForward:
        def both(x: Tensor) -> tuple[Tensor, Tensor | None]:
            forward(x)
            return forward(x)

        return both


def test_a_strategy_may_run_the_forward_as_it_likes() -> None:
    def products(record: Record) -> float:
        layers = {n for n, segment in enumerate(record.segments) if segment.layer >= 0 and segment.phase == "forward"}
        return sum(float(kernel.flops) for kernel in record.kernels if kernel.segment in layers)

    plain, twice = (run(h, gradient_checkpointing="none") for h in ([], [Twice()]))
    assert products(twice) == 2 * products(plain) > 0


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"gradient_checkpointing": "none"}, []),
        ({"gradient_checkpointing": "full"}, [checkpoints.Recomputing]),
        ({"gradient_checkpointing": "offload"}, [checkpoints.Recomputing, checkpoints.ToHost]),
        ({"gradient_checkpointing": "offload", "kernels": "unsloth"}, [checkpoints.Recomputing, checkpoints.ToHost]),
    ],
    ids=str,
)
def test_the_settings_choose_the_handlers(settings: dict[str, Any], kinds: list[type[Handler]]) -> None:
    name = "meta-llama/Llama-3.2-1B"
    model = build_spec(sources.load_config(name).config, model_id=name)
    training = TrainingSpec(method="lora", lora=LoraSpec(), micro_batch_size=1, seq_len=64, **settings)
    step = Step(model, training, cuda_rules.Architecture(), registry.habits_of(model.model_type))
    chosen = checkpoints.handlers(step)
    assert [type(handler) for handler in chosen] == kinds
    transfers = [handler.transfer for handler in chosen if isinstance(handler, checkpoints.ToHost)]
    wanted = "overlapped_transfer" if settings.get("kernels") == "unsloth" else "host_transfer"
    assert transfers == [wanted] * (len(kinds) // 2)
