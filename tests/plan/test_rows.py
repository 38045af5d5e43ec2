"""One row per thing: a forgotten field or row fails by name, and an unknown name raises wherever it could be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest

from planner.base.errors import UnknownName
from planner.base.records import Rows
from planner.device import cuda_rules
from planner.exporters import recipe
from planner.model import storage
from planner.model.families import build_spec
from planner.model.spec import Linear
from planner.plan import search
from planner.step import loading, program
from planner.step.context import Step
from planner.step.habits import COMMON
from planner.step.modules import linears, losses
from planner.training import optimizers, quantizations, stacks
from planner.training.choices import CHOICES
from planner.training.losses import KERNEL_SETS, LOSSES, KernelSet, LossRow
from planner.training.optimizers import OPTIMIZERS, OptimizerRow
from planner.training.quantizations import QUANTIZATIONS, QuantizationRow
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

TABLES: dict[str, tuple[Rows[Any], type]] = {
    "optimizer": (OPTIMIZERS, OptimizerRow),
    "quantization": (QUANTIZATIONS, QuantizationRow),
    "loss": (LOSSES, LossRow),
    "kernels": (KERNEL_SETS, KernelSet),
}
NF4 = QuantizationSpec(kind="nf4")
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip


def fields_of(row: object) -> dict[str, object]:
    return {f.name: getattr(row, f.name) for f in dataclasses.fields(cast(Any, row))}


@pytest.mark.parametrize("table", TABLES)
def test_a_made_up_row_without_a_field_fails_and_names_it(table: str) -> None:
    rows, kind = TABLES[table]
    complete = fields_of(next(iter(rows.values())))
    assert kind(**complete)
    for left_out in complete:
        with pytest.raises(TypeError, match=rf"{kind.__name__} needs {left_out}$"):
            kind(**{name: value for name, value in complete.items() if name != left_out})


@pytest.mark.parametrize("table", TABLES)
def test_a_name_without_a_row_fails_at_import(table: str) -> None:
    rows, _ = TABLES[table]
    assert CHOICES[table] == tuple(rows)
    with pytest.raises(TypeError, match=f"{table}: no row for made-up"):
        Rows(table, [*rows, "made-up"], rows.items())
    with pytest.raises(TypeError, match="rows without a name: made-up"):
        Rows(table, rows, [*rows.items(), ("made-up", None)])
    with pytest.raises(TypeError, match="two rows"):
        Rows(table, rows, [*rows.items(), *rows.items()])


@pytest.mark.parametrize("table", TABLES)
def test_an_unknown_name_is_an_error_not_another_row(table: str) -> None:
    rows, _ = TABLES[table]
    with pytest.raises(UnknownName, match=f"unknown {table} 'made-up'"):
        rows["made-up"]


def altered(**changes: str) -> TrainingSpec:
    """A run whose setting no check has seen, as if a consumer had been handed a row that somebody forgot."""
    training = TrainingSpec(
        method="qlora", lora=LoraSpec(r=8), quantization=QuantizationSpec(kind="nf4"), seq_len=64, device_map=True
    )
    for name, value in changes.items():
        if name == "quantization":
            training.quantization.__dict__["kind"] = value
        else:
            training.__dict__[name] = value
    return training


SPEC = build_spec(LLAMA, model_id="toy")


def run(training: TrainingSpec) -> object:
    return program.run(SPEC, training, cuda_rules.Architecture())


@pytest.mark.parametrize(
    ("changes", "use"),
    [
        ({"optimizer": "adamw-4bit"}, run),
        ({"optimizer": "adamw-4bit"}, search._eight_bit),
        ({"optimizer": "adamw-4bit"}, search._paged),
        ({"loss": "made-up"}, run),
        ({"kernels": "made-up"}, run),
        ({"quantization": "nf3"}, run),
        ({"quantization": "nf3"}, search._double_quant),
        ({"quantization": "nf3"}, search._quantize),
    ],
)
def test_a_made_up_name_raises_wherever_it_is_used(
    changes: dict[str, str], use: Callable[[TrainingSpec], object]
) -> None:
    run(altered())
    with pytest.raises(UnknownName):
        use(altered(**changes))


def test_a_made_up_quantization_is_no_weight_of_another() -> None:
    spec = Linear(name="x", in_features=64, out_features=64)
    quant = altered(quantization="nf3").quantization
    for use in (
        lambda: storage.quantized_bytes(spec, quant),
        lambda: storage.is_quantized(dataclasses.replace(spec, cls="subclass"), altered(quantization="nf3"), True),
        lambda: loading.warmup_bytes(100, 100, "nf3", itemsize=2, transformers=(5, 0)),
    ):
        with pytest.raises(UnknownName):
            use()
    with pytest.raises(ValueError, match="none stores no weight otherwise"):
        storage.quantized_bytes(spec, QuantizationSpec())


def test_a_made_up_quantization_is_not_multiplied_as_gptq() -> None:
    """Before: every unknown kind went to GPTQ's product."""
    step = Step(SPEC, altered(), cuda_rules.Architecture(), COMMON)
    held = linears.load_base(step, SPEC.layers[0].linears[0], True)
    held.kind = "nf3"
    with pytest.raises(UnknownName):
        linears.forward(step, held, step.eng.empty(step.tokens * 128, "bf16", "x"))


def test_a_made_up_loss_does_not_make_whole_logits() -> None:
    step = Step(SPEC, altered(loss="made-up"), cuda_rules.Architecture(), COMMON)
    head = linears.load_base(step, SPEC.head, False)
    with pytest.raises(UnknownName):
        losses.head_and_loss(step, head, step.eng.empty(step.tokens * 128, "bf16", "x"))


def test_the_words_of_the_command_line_of_importers_and_exporters_come_from_the_rows() -> None:
    assert {name: row.transformers_name for name, row in OPTIMIZERS.items()} == recipe.OPTIMIZERS
    back = optimizers.by_transformers_name()
    for name, row in OPTIMIZERS.items():
        assert back[row.transformers_name] == name or not row.from_transformers
    assert set(optimizers.words().values()) <= set(OPTIMIZERS)
    assert quantizations.words() == {"no": "none", "4bit": "nf4", "int4": "nf4", "8bit": "int8", "awq": "awq4"}
    assert stacks.TORCH_ADAMW == ("adamw", "adamw-fused", "adamw-bf16-states")
    assert (stacks.BNB_4BIT, stacks.BNB, stacks.GPTQ) == (("nf4", "fp4"), ("nf4", "fp4", "int8"), ("gptq4", "gptq8"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_variants_of_an_optimizer_are_rows(name: str) -> None:
    row = OPTIMIZERS[name]
    if row.unpaged:
        assert not OPTIMIZERS[row.unpaged].paged
    if row.eight_bit:
        assert OPTIMIZERS[row.eight_bit].is_8bit
    if row.paged_eight_bit:
        assert OPTIMIZERS[row.paged_eight_bit].is_8bit and OPTIMIZERS[row.paged_eight_bit].paged


@pytest.mark.parametrize("table", TABLES)
def test_every_row_runs(table: str) -> None:
    """No name of the table is refused by the program."""
    for name in TABLES[table][0]:
        if table == "quantization" and name == "none":
            continue
        run(altered(**{table: name}))
