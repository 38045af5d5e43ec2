"""Every parameter knows whose it is: unit, module, name, whether it is trained; and its shape."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from planner.device import cuda_rules
from planner.facts import sources
from planner.model import lora
from planner.model.families import build_spec
from planner.model.spec import Layer, ModelSpec
from planner.step import program
from planner.step.classes import registry
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.optimizers import OptimizerState, factors
from planner.step.scopes import OUTSIDE, Owner, Unit
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

MODELS = (
    "meta-llama/Llama-3.1-8B",
    "google/gemma-3-12b-it",
    "openai/gpt-oss-20b",
    "deepseek-ai/DeepSeek-V2-Lite",
    "tiiuae/falcon-7b",
    "openai-community/gpt2",
    "facebook/opt-350m",
    "Qwen/Qwen3-30B-A3B",
)
NOT_COMPUTED = {"openai/gpt-oss-20b": 24 * 64}
"""Sink logits, counted but not computed with."""


def loaded(name: str, **settings: Any) -> tuple[ModelSpec, program.Stack, Step, list[Tensor]]:
    """A model's units and the parameters that loading made, frozen ones too."""
    model = build_spec(sources.load_config(name).config, model_id=name)
    training = TrainingSpec(micro_batch_size=1, seq_len=32, **settings)
    step = Step(model, training, cuda_rules.Architecture.plain(), registry.habits_of(model.model_type))
    stack = program.plan_layers(model)
    step.eng.repeats = stack.repeats
    owned: list[Tensor] = []

    class Watched(Step):
        __slots__ = ()

        def owned(self, tensor: Tensor, name: str, trainable: bool = False) -> Tensor:
            owned.append(tensor)
            return super().owned(tensor, name, trainable)

        def owned_together(self, parts: list[Tensor], module: str) -> list[Tensor]:
            owned.extend(parts)
            return super().owned_together(parts, module)

    step.__class__ = Watched
    program._Run(step, stack)._load()
    return model, stack, step, owned


def owner(tensor: Tensor) -> Owner:
    assert tensor.owner is not None
    return tensor.owner


@pytest.mark.parametrize("name", MODELS)
def test_owners_of_all_parameters_count_the_model(name: str) -> None:
    model, stack, step, owned = loaded(name, method="full", lora=None, quantization=QuantizationSpec(kind="none"))
    assert step.parameters == owned
    counted = sum(t.numel * stack.repeats.get(owner(t).unit.layer, 1) for t in owned)
    assert counted == model.num_parameters - NOT_COMPUTED.get(name, 0)
    assert OptimizerState(step).parameter_count() == counted
    assert max(Counter(map(owner, owned)).values()) == 1, "no two parameters of one name in a unit"
    assert {owner(t).unit for t in owned} == {OUTSIDE, *stack.units}
    for unit, layer in zip(stack.units, stack.layers, strict=True):
        assert {owner(t).module for t in owned if owner(t).unit == unit} >= modules(layer)


def modules(layer: Layer) -> set[str]:
    return {linear.name for linear in layer.linears} | {norm.name for norm in layer.norms}


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_owners_of_adapters_are_the_targets(name: str, kind: Any) -> None:
    targets = LoraSpec(r=8, target_modules=("attention",))
    method: Any = "lora" if kind == "none" else "qlora"
    model, stack, step, owned = loaded(name, method=method, lora=targets, quantization=QuantizationSpec(kind=kind))
    wanted = {id(adapted): adapted for adapted in lora.resolve_targets(model, targets)}
    for unit, layer in zip(stack.units, stack.layers, strict=True):
        here = [t for t in owned if owner(t).unit == unit]
        names = {(owner(t).module, owner(t).role) for t in here if owner(t).trainable}
        adapted = [a.name for a in wanted.values() if a.layer is layer]
        assert adapted
        assert names == {(module, role) for module in adapted for role in ("lora_A", "lora_B")}
        frozen = {owner(t).module for t in here if not owner(t).trainable}
        assert frozen >= modules(layer), "quantized weights have owners too"
    assert [t for t in owned if owner(t).trainable] == step.parameters


def test_saved_modules_are_matrices_for_adafactor() -> None:
    """PEFT's copy of a head or an embedding has the module's shape, so its second moment is factored."""
    saved = LoraSpec(r=8, modules_to_save=("lm_head", "embed_tokens"))
    model, _, step, _ = loaded("meta-llama/Llama-3.1-8B", method="lora", lora=saved, optimizer="adafactor")
    copies = [t for t in step.parameters if owner(t).unit == OUTSIDE]
    assert {owner(t).module for t in copies} == {"lm_head", "model.embed_tokens"}
    assert [factors(t) for t in copies] == [model.vocab_size + model.hidden_size] * 2


def test_a_pattern_of_layers_has_a_unit_for_each() -> None:
    _, stack, _, _ = loaded("google/gemma-3-12b-it", method="full", lora=None, quantization=QuantizationSpec())
    assert stack.units[:6] == [Unit(0, place) for place in range(6)]
    assert stack.units[6] == Unit(1, 0)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((10,), 10), ((3, 5), 8), ((4, 3, 5), 32), ((1, 7), 8)],
    ids=str,
)
def test_a_factored_moment_keeps_rows_and_columns(shape: tuple[int, ...], kept: int) -> None:
    """transformers optimization.py Adafactor: exp_avg_sq_row shape[:-1], exp_avg_sq_col shape[:-2] + shape[-1:]."""
    _, _, step, _ = loaded("openai-community/gpt2", method="full", lora=None, quantization=QuantizationSpec())
    assert factors(step.trainable("x.weight", shape, "fp32", "weight")) == kept
