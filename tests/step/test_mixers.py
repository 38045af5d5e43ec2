"""Mixers: a made-up kind, added by one record and one row, works everywhere; a forgotten part fails by its name.

The kind: a projection to twice the hidden size, the product of its halves, a learned factor for every channel (no
linear module), a projection back. Layers of it stand in the place of some, or all, of a model's attention.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from planner.base.errors import UnknownName
from planner.base.records import Rows, record, replace
from planner.device.cuda_rules import Architecture
from planner.facts import catalog, sources
from planner.memory import walk
from planner.model import adapter, lora
from planner.model.families import build_spec
from planner.model.spec import Linear, ModelSpec, Norm, Weight
from planner.plan import predict, sweep
from planner.step import ops, program
from planner.step.architecture import architecture
from planner.step.classes import registry
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.modules import linears
from planner.step.modules.feed_forward import Finish
from planner.step.modules.mixers import MIXERS, MixerRow
from planner.step.modules.weights import LayerWeights
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

NAME = "meta-llama/Llama-3.2-1B"
CARD = catalog.gpu("a100-sxm4-80gb")
TOKENS, HIDDEN = 2 * 64, 2048


# --- what a new kind needs: a record and a row -----------------------------------------------------------------------


@record
class Gated:
    """The made-up mixer."""

    kind: str = "gated"
    into: Linear
    back: Linear
    channels: Weight

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.into, self.back

    @property
    def norms(self) -> tuple[Norm, ...]:
        return ()

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.channels,)

    @property
    def num_parameters(self) -> int:
        return self.into.num_parameters + self.back.num_parameters + self.channels.num_parameters


def gated(step: Step, held: LayerWeights, x: Tensor, finish: Finish | None) -> Tensor:
    """into(x) in two halves, their product times the channels' factors, back."""
    mixer = held.spec.mixer
    assert isinstance(mixer, Gated)
    both = linears.forward(step, held.linears[mixer.into.name], x)
    first, second = ops.split(step.eng, both, (step.tokens * HIDDEN, step.tokens * HIDDEN))
    product = ops.mul(step.eng, first, second, "mlp")
    scaled = ops.mul(step.eng, product, held.mixing[mixer.channels.name], "mlp")
    out = linears.forward(step, held.linears[mixer.back.name], scaled)
    return finish(out) if finish is not None else out


ROW = {"forward": gated, "label": "gated product", "in_own_modules": False, "uncertainty": (("made up", 0.5),)}

# --- the models ------------------------------------------------------------------------------------------------------

MIXER = Gated(
    into=Linear(name="gated.into", in_features=HIDDEN, out_features=2 * HIDDEN),
    back=Linear(name="gated.back", in_features=HIDDEN, out_features=HIDDEN),
    channels=Weight(name="gated.mix.channels", shape=(HIDDEN,)),
)
PLACES = {"first": range(8), "every second": range(1, 16, 2), "all": range(16)}


@pytest.fixture(autouse=True)
def _the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "gated", MixerRow(**ROW))  # type: ignore[arg-type]


def model_with(places: range) -> ModelSpec:
    model = build_spec(sources.load_config(NAME).config, model_id=NAME)
    other = replace(model.layers[0], mixer=MIXER)
    return replace(model, layers=tuple(other if n in places else layer for n, layer in enumerate(model.layers)))


MODELS = {name: model_with(places) for name, places in PLACES.items()}


def training(**settings: Any) -> TrainingSpec:
    common: dict[str, Any] = {"method": "lora", "lora": LoraSpec(r=8), "quantization": QuantizationSpec()}
    return TrainingSpec(
        **{"micro_batch_size": 2, "seq_len": 64, "gradient_checkpointing": "none", **common, **settings}
    )


FULL: dict[str, Any] = {"method": "full", "lora": None}
NF4: dict[str, Any] = {"method": "qlora", "quantization": QuantizationSpec(kind="nf4")}


# --- what must hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", ROW)
def test_a_row_without_a_field_fails_and_names_it(left_out: str) -> None:
    with pytest.raises(TypeError, match=rf"MixerRow needs {left_out}$"):
        MixerRow(**{name: value for name, value in ROW.items() if name != left_out})  # type: ignore[arg-type]


def test_a_kind_without_a_row_fails_at_import_and_in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: row for name, row in MIXERS.items() if name != "gated"}
    with pytest.raises(TypeError, match="mixer: no row for gated"):
        Rows("mixer", [*known, "gated"], known.items())
    monkeypatch.delitem(MIXERS, "gated")
    with pytest.raises(UnknownName, match="unknown mixer 'gated'"):
        program.run(MODELS["all"], training(), Architecture())


@pytest.mark.parametrize("name", MODELS)
def test_it_is_counted_and_loaded(name: str) -> None:
    """3 h^2 weights and h factors a layer in the place of attention's 2.5 h^2 (8 key/value heads of 32)."""
    attention, mixed = build_spec(sources.load_config(NAME).config, model_id=NAME), MODELS[name]
    number = len(PLACES[name])
    assert mixed.num_parameters - attention.num_parameters == number * (HIDDEN * HIDDEN // 2 + HIDDEN)
    run = program.run(mixed, training(**FULL), Architecture())
    assert run.trainable_parameters == mixed.num_parameters


@pytest.mark.parametrize("name", MODELS)
def test_its_products_are_computed(name: str) -> None:
    """Forward: 2 t h (2h + h) FLOPs in a layer's mixer; in nothing but attention layers a fused attention runs."""
    run = program.run(MODELS[name], training(**NF4), Architecture(), full_depth=True).record
    forward = {n: s.layer for n, s in enumerate(run.segments) if s.phase == "forward" and s.layer >= 0}
    for place in range(16):
        inside = [kernel for kernel in run.kernels if forward.get(kernel.segment) == place]
        attends = [kernel for kernel in inside if kernel.op.startswith("flash_attention")]
        products = [kernel.shape for kernel in inside if kernel.op == "matmul"]
        assert len(attends) == (place not in PLACES[name])
        assert ((1, TOKENS, 2 * HIDDEN, HIDDEN) in products) == (place in PLACES[name])
        flops = sum(2 * math.prod(shape) for shape in products if shape is not None)
        mixing = 3 if place in PLACES[name] else 2.5
        assert flops == 2 * TOKENS * (mixing * HIDDEN**2 + 3 * HIDDEN * 8192)


def test_what_it_keeps_for_the_backward() -> None:
    """Frozen factors: the two halves for their product alone, [t, 2h] in bf16; with trained ones the product too.

    Of a chain without adapters nothing else: linear modules whose weights are frozen keep no input.
    """
    kept = {}
    for trained in (False, True):
        step = Step(MODELS["all"], training(), Architecture(), registry.habits_of("llama"))
        held = LayerWeights(MODELS["all"].layers[0])
        held.linears = {spec.name: linears.load_base(step, spec, False) for spec in MIXER.linears}
        factors = step.eng.empty((HIDDEN,), "bf16", "weight")
        held.mixing["gated.mix.channels"] = step.eng.leaf(factors, is_parameter=True) if trained else factors
        x = step.eng.leaf(step.eng.empty((TOKENS, HIDDEN), "bf16", "x"))
        before = sum(n for _, n in step.eng.record.events)
        out = gated(step, held, x, None)
        kept[trained] = sum(n for _, n in step.eng.record.events) - before - out.nbytes
        assert out.numel == TOKENS * HIDDEN
    assert kept == {False: TOKENS * 2 * HIDDEN * 2, True: TOKENS * 3 * HIDDEN * 2}


def test_rotary_tables_and_masks_are_made_for_attention_only() -> None:
    made = {}
    for name, model in MODELS.items():
        run = program.run(model, training(attention="eager"), Architecture()).record
        made[name] = {op for op in run.ops if op in ("rotary_tables", "positions", "attention_mask", "probabilities")}
    both = {"rotary_tables", "positions", "attention_mask", "probabilities"}
    assert made == {"first": both, "every second": both, "all": set()}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("attention",), {"into", "back"}),
        (("all-linear",), {"into", "back", "gate_proj", "up_proj", "down_proj"}),
        (("into",), {"into"}),
    ],
)
def test_its_linears_are_adapted(targets: tuple[str, ...], names: set[str]) -> None:
    """PEFT: r (in + out) parameters for each module."""
    model, spec = MODELS["all"], LoraSpec(r=8, target_modules=targets)
    adapted = lora.resolve_targets(model, spec)
    assert {a.name.rpartition(".")[2] for a in adapted} == names
    run = program.run(model, training(lora=spec), Architecture())
    assert run.trainable_parameters == lora.trainable_lora_parameters(model, spec)
    if targets == ("into",):
        assert run.trainable_parameters == 16 * 8 * 3 * HIDDEN
    assert adapter.facts(model, training(lora=spec)).trainable_parameters == run.trainable_parameters


@pytest.mark.extra
@pytest.mark.parametrize(
    "settings", [{}, FULL, NF4, {"gradient_checkpointing": "full"}, {"own_modules": "litgpt"}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_it_is_planned_and_swept(name: str, settings: dict[str, Any]) -> None:
    given = training(**settings)
    planned = predict.predict(MODELS[name], given, CARD)
    assert planned.verdict is not None and planned.time is not None
    assert dict(planned.uncertainty)["made up"] == 0.5
    axes = sweep.Axes(micro_batch_size=(1, 2), seq_len=(64, 500), r=(8,), gradient_accumulation_steps=(1,))
    cells = sweep.Sweeper(MODELS[name], axes).cells(given, (CARD,))
    for place in ((0, 1, 0, 0, 0), (0, 0, 1, 0, 0)):
        at = sweep.at(cells, place[1:])
        run = program.run(MODELS[name], at, architecture(CARD, at)).record
        assert cells.allocated_bytes[place] == walk.breakdown(run).peak_allocated_bytes
        time = predict._time(run, at, CARD, None)
        assert time is not None
        assert cells.step_s[place] == pytest.approx(time.step_s.expected, rel=1e-9)


def test_it_is_listed_and_explained() -> None:
    from planner.plan import models

    found = models.load_model(NAME)
    facts = models.model_facts(found._replace(spec=MODELS["first"]))
    assert facts["layer_kinds"] == ["8 x gated product", "8 x standard attention"]
    assert facts["attention_heads"] == 32
    assert "attention_heads" not in models.model_facts(found._replace(spec=MODELS["all"]))
    short = program.run(MODELS["every second"], training(), Architecture())
    whole = program.run(MODELS["every second"], training(), Architecture(), full_depth=True)
    ours, theirs = (walk.breakdown(one.record, one.layer_names) for one in (short, whole))
    assert (ours.peak_allocated_bytes, ours.ledger, ours.moment) == (
        theirs.peak_allocated_bytes,
        theirs.ledger,
        theirs.moment,
    )
    assert sum(nbytes for _, nbytes in ours.ledger) == ours.peak_allocated_bytes
