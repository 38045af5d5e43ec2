"""The step program: depth compression is exact, answers are deterministic, and memory moves the way it must."""

from __future__ import annotations

import dataclasses
import random

import pytest

from planner.device import cuda_rules
from planner.memory import sequence, walk
from planner.model.families import build_spec
from planner.model.spec import ModelSpec
from planner.step import ops, program
from planner.step.engine import BF16, Engine, Tensor
from planner.step.habits import COMMON
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

ARCH = cuda_rules.Architecture()
NF4 = QuantizationSpec(kind="nf4", double_quant=True)


def config(**changes: object) -> dict[str, object]:
    """A Llama-shaped config, small but with every dimension distinct."""
    base: dict[str, object] = {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    return {**base, **changes}


def model(**changes: object) -> ModelSpec:
    return build_spec(config(**changes), model_id="test")


def qlora(**changes: object) -> TrainingSpec:
    values: dict[str, object] = {
        "lora": LoraSpec(r=16), "quantization": NF4, "micro_batch_size": 1, "seq_len": 512, **changes,
    }  # fmt: skip
    return TrainingSpec(**values)  # type: ignore[arg-type]


def peak(spec: ModelSpec, training: TrainingSpec, full_depth: bool = False) -> int:
    return int(walk.peak_bytes(program.run(spec, training, ARCH, full_depth=full_depth).record))


VARIANTS = [
    qlora(),
    qlora(kbit_preparation=True),
    qlora(gradient_checkpointing="none"),
    qlora(use_reentrant=True, keeps_outputs=True),
    qlora(gradient_checkpointing="offload"),
    qlora(attention="eager"),
    qlora(padded=True, micro_batch_size=2),
    qlora(optimizer="adamw", lora=LoraSpec(r=64, lora_dropout=0.1)),
    qlora(gradient_accumulation_steps=4),
    qlora(loss="fused"),
    qlora(loss="chunked"),
    qlora(quantization=QuantizationSpec(kind="int8")),
    qlora(method="lora", quantization=QuantizationSpec()),
    qlora(method="dora", quantization=QuantizationSpec(), lora=LoraSpec(r=8, use_dora=True)),
    TrainingSpec(method="full", optimizer="adamw-bf16-states", autocast="none", seq_len=512),
]


@pytest.mark.parametrize("training", VARIANTS, ids=range(len(VARIANTS)))
def test_four_layers_stand_for_a_run_exactly(training: TrainingSpec) -> None:
    """Emulating four layers of a run gives the peak of emulating all of them, to the byte."""
    spec = model()
    assert peak(spec, training) == peak(spec, training, full_depth=True)


@pytest.mark.parametrize("training", VARIANTS, ids=range(len(VARIANTS)))
def test_expanded_events_are_those_of_full_depth(training: TrainingSpec) -> None:
    """Writing the record out for the allocator gives the multiset of requests that emulating every layer gives."""
    spec = model(num_hidden_layers=9)
    short = sequence.expand(program.run(spec, training, ARCH).record)
    full = sequence.expand(program.run(spec, training, ARCH, full_depth=True).record)
    assert sorted(n for _, n in short) == sorted(n for _, n in full)
    assert highest(short) == highest(full)


def highest(events: list[tuple[int, int]]) -> int:
    level = top = 0
    for _, size in events:
        level += size
        top = max(top, level)
    return top


def test_expanded_run_ends_with_the_static_memory() -> None:
    """After a step nothing is left but weights, adapters, optimizer state and workspaces."""
    record = program.run(model(), qlora(optimizer="adamw"), ARCH).record
    events = sequence.expand(record)
    static = sum(
        size * segment.repeat
        for segment in record.segments
        if segment.phase in ("load", "state")
        for _, size in record.events[segment.start : segment.end]
    )
    assert sum(size for _, size in events) == static


def test_heterogeneous_stack_is_compressed_exactly() -> None:
    spec = build_spec(
        config(model_type="qwen2", use_sliding_window=True, sliding_window=256, max_window_layers=6),
        model_id="test",
    )
    assert len({id(layer) for layer in spec.layers}) == 2
    training = qlora(gradient_checkpointing="none")
    assert peak(spec, training) == peak(spec, training, full_depth=True)


def test_ledger_sums_to_the_peak_and_names_its_moment() -> None:
    for training in VARIANTS:
        found = walk.breakdown(program.run(model(), training, ARCH).record)
        assert sum(n for _, n in found.ledger) == found.peak_allocated_bytes
        assert found.moment.phase in ("forward", "loss", "backward", "optimizer")
        assert max(s.bytes for s in found.segments) == found.peak_allocated_bytes


def test_same_question_same_answer_in_any_order() -> None:
    order = list(range(len(VARIANTS)))
    spec = model()
    first = {i: peak(spec, VARIANTS[i]) for i in order}
    random.Random(1).shuffle(order)
    assert {i: peak(spec, VARIANTS[i]) for i in order} == first


def random_training(rng: random.Random) -> TrainingSpec:
    """Any setting whose memory must not fall when something grows.

    Left out are the libraries' own exceptions: 8-bit and paged optimizers (small tensors keep wide states, large ones
    move to the host) and the fused loss (its chunk count grows with the vocabulary).
    """
    quantized = rng.random() < 0.6
    return TrainingSpec(
        method="qlora" if quantized else "lora",
        lora=LoraSpec(
            r=rng.choice([4, 16, 64]),
            lora_dropout=rng.choice([0.0, 0.1]),
            target_modules=rng.choice([("all-linear",), ("q_proj", "v_proj"), ("attention",), ("mlp",)]),
            dtype=rng.choice(["fp32", "bf16"]),  # type: ignore[arg-type]
        ),
        quantization=QuantizationSpec(kind="nf4", double_quant=rng.random() < 0.5) if quantized else QuantizationSpec(),
        kbit_preparation=quantized and rng.random() < 0.5,
        micro_batch_size=rng.choice([1, 2, 4]),
        seq_len=rng.choice([64, 512, 1536]),
        gradient_checkpointing=rng.choice(["none", "full", "offload"]),  # type: ignore[arg-type]
        use_reentrant=rng.random() < 0.5,
        attention=rng.choice(["eager", "sdpa", "flash2"]),  # type: ignore[arg-type]
        autocast=rng.choice(["none", "bf16"]),  # type: ignore[arg-type]
        optimizer=rng.choice(["adamw", "adamw-fused", "sgd", "lion"]),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", range(60))
def test_memory_never_decreases(seed: int) -> None:
    """Batch, length, rank, vocabulary and depth only ever add memory."""
    rng = random.Random(seed)
    training = random_training(rng)
    assert training.lora is not None
    base = peak(model(), training)
    grown = [
        (model(), dataclasses.replace(training, micro_batch_size=training.micro_batch_size + 1)),
        (model(), dataclasses.replace(training, seq_len=training.seq_len * 2)),
        (model(), dataclasses.replace(training, lora=dataclasses.replace(training.lora, r=training.lora.r * 2))),
        (model(vocab_size=40960), training),
        (model(num_hidden_layers=13), training),
    ]
    for spec, larger in grown:
        assert peak(spec, larger) >= base, larger


@pytest.mark.parametrize("seed", range(60))
def test_checkpointing_does_not_increase_the_peak(seed: int) -> None:
    training = random_training(random.Random(1000 + seed))
    without = peak(model(), dataclasses.replace(training, gradient_checkpointing="none"))
    for mode in ("full", "offload"):
        assert peak(model(), dataclasses.replace(training, gradient_checkpointing=mode)) <= without, training


def test_eight_bit_states_are_the_known_exception_to_growth() -> None:
    """bitsandbytes keeps tensors below 4096 elements in 32 bit: one more rank can shrink a state tensor."""
    from planner.step.optimizers import OptimizerState

    step = program.Step(model(), qlora(optimizer="adamw-8bit"), ARCH, COMMON)
    state = OptimizerState(step)
    below, above = (step.trainable("lora_A", (1, n), "fp32", "adapter") for n in (4095, 4096))
    assert sum(state.state_bytes(above)) < sum(state.state_bytes(below))


# --- the engine ----------------------------------------------------------------------------------------------------


def test_a_tensor_dies_with_its_last_reference() -> None:
    eng = Engine()
    tensor = eng.empty(10, BF16, "x")
    view = tensor.view(5)
    del tensor
    assert eng.record.events == [(0, 20)]
    del view
    assert eng.record.events == [(0, 20), (0, -20)]


def test_gradients_of_products_come_in_the_order_of_their_names() -> None:
    """mm and bmm: mat2 before self; addmm: mat1, mat2, self (tools/autograd, derivatives sorted by name)."""

    def made(biased: bool) -> list[str]:
        eng = Engine()
        x, w = (eng.leaf(eng.empty(n, BF16, "leaf"), is_parameter=True) for n in (6, 8))
        bias = eng.leaf(eng.empty(4, BF16, "leaf"), is_parameter=True) if biased else None
        out = ops.linear(eng, x, w, 3, 4, 2, bias)
        before = len(eng.record.ops)
        eng.backward(out, eng.empty(out.numel, BF16, "grad"))
        sizes = {12: "input", 16: "weight", 8: "bias"}
        return [sizes[n] for i, n in eng.record.events if i > before and n > 0]

    assert made(False) == ["weight", "input"]
    assert made(True) == ["input", "weight", "bias"]
    eng = Engine()
    a, b = (eng.leaf(eng.empty(n, BF16, "leaf"), is_parameter=True) for n in (6, 8))
    out = ops.bmm(eng, a, b, (1, 3, 4, 2))
    eng.backward(out, eng.empty(out.numel, BF16, "grad"))
    assert [n for _, n in eng.record.events if n > 0][-2:] == [16, 12]


def test_kbit_preparation_casts_what_was_loaded_in_16_bit() -> None:
    """Every unquantized parameter is there twice for a moment, and its 16-bit block stays in the cache."""
    record = program.run(model(), qlora(kbit_preparation=True), ARCH).record
    load = [n for s in record.segments if s.phase == "load" for _, n in record.events[s.start : s.end]]
    freed = sorted(-n for n in load if n < 0)
    table = 2 * 32000 * 1024
    assert freed[-2:] == [table, table]  # embeddings and head
    assert load.index(2 * table) < load.index(-table)


def test_backward_runs_later_nodes_first_and_frees_what_they_saved() -> None:
    eng = Engine()
    leaf = eng.leaf(eng.empty(8, "fp32", "w"), is_parameter=True)
    hidden = ops.pointwise(eng, leaf, "first")
    out = ops.pointwise(eng, hidden, "second")
    del hidden
    loss = ops.add(eng, out, out, "sum")
    del out
    eng.backward(loss, eng.empty(8, "fp32", "seed"))
    made = [eng.record.ops[i] for i, n in eng.record.events if n > 0]
    assert made.index("second_grad") < made.index("first_grad" if "first_grad" in made else "gradient")
    assert leaf.grad is not None and leaf.grad.numel == 8


def test_gradients_of_a_shared_input_are_added() -> None:
    eng = Engine(accumulates_in_place=False)
    leaf = eng.leaf(eng.empty(4, "fp32", "w"), is_parameter=True)
    left, right = ops.scale(eng, leaf), ops.scale(eng, leaf)
    total: Tensor = ops.add(eng, left, right)
    eng.backward(total, eng.empty(4, "fp32", "seed"))
    assert leaf.grad is not None
    assert any(op == "gradient" for op in eng.record.ops)
