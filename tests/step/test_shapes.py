"""Tensors know their shape: elements are its product, and rows come from it, not from what the step runs on."""

from __future__ import annotations

from typing import Any

import pytest

from planner.device import cuda_rules
from planner.facts import sources
from planner.model.families import build_spec
from planner.model.spec import Linear, Norm
from planner.step.classes import registry
from planner.step.context import Step
from planner.step.engine import Dimensions, Engine, Tensor, elements_of
from planner.step.modules import linears
from planner.step.modules.norms import norm
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

NAME = "meta-llama/Llama-3.2-1B"
MODEL = build_spec(sources.load_config(NAME).config, model_id=NAME)


def step_of(kind: Any = "none", tokens: int = 64, **lora: Any) -> Step:
    training = TrainingSpec(
        method="lora" if kind == "none" else "qlora",
        lora=LoraSpec(r=4, **lora),
        quantization=QuantizationSpec(kind=kind),
        micro_batch_size=1,
        seq_len=tokens,
    )
    return Step(MODEL, training, cuda_rules.Architecture(), registry.habits_of("llama"))


@pytest.mark.parametrize(
    ("shape", "width", "rows"),
    [((6, 4), 4, 6), ((6, 4), 2, 12), ((2, 3, 4), 4, 6), ((24,), 4, 6), (24, 8, 3)],
    ids=["rows", "heads in rows", "batches", "elements", "a number"],
)
def test_rows_of_a_width(shape: int | Dimensions, width: int, rows: int) -> None:
    tensor = Engine().empty(shape, "bf16", "x")
    assert tensor.numel == 24 and tensor.nbytes == 48
    assert tensor.rows(width) == rows
    assert elements_of(tensor.shape) == 24
    assert tensor.view().shape == tensor.shape
    assert tensor.view((3, 8)).shape == (3, 8)


@pytest.mark.parametrize(("adapted", "dora"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "gptq4"])
def test_a_linear_runs_over_the_rows_it_gets(kind: str, adapted: bool, dora: bool) -> None:
    """A step of 64 tokens, an input of 10 rows: every product of input and weight is over 10 rows, back and forth."""
    step = step_of(kind, use_dora=dora)
    lora = step.train.lora
    assert lora is not None
    held = linears.load_base(step, Linear(name="x", in_features=96, out_features=160), adapted)
    if adapted:
        linears.load_adapter(step, held, lora)
    x = step.eng.leaf(step.eng.empty((10, 96), "bf16", "x"))
    out = linears.forward(step, held, x)
    assert out.shape == (10, 160)
    step.eng.backward(out, step.eng.empty((10, 160), out.dtype, "grad"))
    shapes = [kernel.shape for kernel in step.eng.record.kernels if kernel.shape is not None]
    assert {(1, 10, 160, 96), (1, 10, 96, 160)} <= set(shapes)
    assert all(64 not in shape for shape in shapes)


@pytest.mark.parametrize(
    "spec", [Norm(name="n", size=96), Norm(name="n", size=48), Norm(name="n", size=96, kind="layernorm")]
)
def test_a_norm_runs_over_the_vectors_it_gets(spec: Norm) -> None:
    """fp32 means and reciprocal roots: one for each vector of the norm's size."""
    step = step_of()
    x = step.eng.leaf(step.eng.empty((10, 96), "bf16", "x"))
    made = len(step.eng.record.events)
    out = norm(step, spec, (None, None), x)
    assert out.shape == (10, 96)
    vectors = 960 // spec.size
    sizes = {nbytes for _, nbytes in step.eng.record.events[made:] if nbytes > 0}
    assert 4 * vectors in sizes
    assert sizes <= {4 * vectors, 2 * 960, 4 * 960}


def test_no_module_changes_the_tokens_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the head run over their own rows; before, they overwrote step.tokens meanwhile."""
    from planner.step import program

    class Fixed(Step):
        __slots__ = ()

        def __setattr__(self, name: str, value: object) -> None:
            assert name not in ("tokens", "batch", "seq") or not hasattr(self, name), f"{name} is set again"
            super().__setattr__(name, value)

    monkeypatch.setattr(program, "Step", Fixed)
    for settings in ({"loss": "chunked"}, {"loss": "chunked", "own_modules": "litgpt"}, {"loss": "fused"}):
        given: dict[str, Any] = {
            "method": "lora",
            "lora": LoraSpec(r=4),
            "micro_batch_size": 1,
            "seq_len": 300,
            **settings,
        }
        assert program.run(MODEL, TrainingSpec(**given), cuda_rules.Architecture()).trainable_parameters


def test_hidden_states_are_rows_of_the_hidden_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.step import layers, program

    seen: list[Dimensions] = []
    run = layers.decoder_layer

    def watched(step: Step, held: Any, x: Tensor) -> Tensor:
        out = run(step, held, x)
        seen.extend((x.shape, out.shape))
        return out

    monkeypatch.setattr(layers, "decoder_layer", watched)
    for settings in ({}, {"own_modules": "litgpt"}, {"attention": "eager"}, {"gradient_checkpointing": "none"}):
        given: dict[str, Any] = {
            "method": "lora",
            "lora": LoraSpec(r=4),
            "micro_batch_size": 2,
            "seq_len": 50,
            **settings,
        }
        program.run(MODEL, TrainingSpec(**given), cuda_rules.Architecture())
    assert seen and set(seen) == {(100, 2048)}
