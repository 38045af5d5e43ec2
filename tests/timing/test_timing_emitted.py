"""What the program of a step gives to the time model, counted by hand: passes, launches, copies, FLOPs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from planner.device.hardware import Gpu
from planner.facts import catalog, sources
from planner.memory import walk
from planner.model import families
from planner.plan import predict, sweep
from planner.step import architecture, program
from planner.timing import step_time
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

A100 = catalog.gpu("a100-sxm4-80gb")
LAYERS, HIDDEN, TOKENS = 16, 2048, 1024


def model(name: str = "meta-llama/Llama-3.2-1B") -> Any:
    return families.build_spec(sources.load_config(name).config, model_id=name)


LLAMA = model()


def training(**settings: Any) -> TrainingSpec:
    method = settings.get("method", "lora")
    given = {"method": method, "lora": None if method == "full" else LoraSpec(r=8), "seq_len": TOKENS}
    return TrainingSpec(**{**given, **settings})


def emitted(settings: TrainingSpec, spec: Any = LLAMA, gpu: Gpu = A100) -> dict[tuple[str, str], dict[str, float]]:
    """(part, kind) -> bytes, FLOPs, launches and calls over one micro batch and the optimizer."""
    run = program.run(spec, settings, architecture.architecture(gpu, settings)).record
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for kernel in run.kernels:
        segment = run.segments[kernel.segment]
        part = step_time.part_of(segment.phase, kernel.recomputed)
        if part is not None:
            amounts = {"bytes": kernel.bytes, "flops": kernel.flops, "launches": kernel.count, "calls": 1}
            for name, amount in amounts.items():
                found[part, kernel.op][name] += amount * segment.repeat
    return found


# --- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernels", "op"), [("none", "host_transfer"), ("unsloth", "overlapped_transfer")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_offloaded_checkpoints_go_to_the_host_and_back(kernels: Any, op: str, reentrant: bool) -> None:
    """The hidden states of 3 x 1024 tokens in bf16 before each layer: 12.6 MB each way."""
    settings = training(
        kernels=kernels, gradient_checkpointing="offload", use_reentrant=reentrant, micro_batch_size=3, autocast="none",
        base_dtype="bf16", lora=LoraSpec(r=8, dtype="bf16"),
    )  # fmt: skip
    found = emitted(settings)
    for part in ("forward", "recomputation"):
        assert found[part, op]["bytes"] == LAYERS * 3 * TOKENS * HIDDEN * 2
        assert found[part, op]["launches"] == LAYERS
    assert {name for _, name in found if "transfer" in name} == {op}
    kept = emitted(replace(settings, gradient_checkpointing="full"))
    assert not any("transfer" in name for _, name in kept)


def test_offloading_takes_time_where_copies_do_not_overlap() -> None:
    """4.29 GB at 22 GB/s are 0.195 s; unsloth's hide behind the layers."""
    spec = model("meta-llama/Llama-2-7b-hf")

    def step_s(**settings: Any) -> float:
        found = predict.predict(spec, training(micro_batch_size=4, seq_len=2048, **settings), A100).time
        assert found is not None
        return float(found.step_s.expected)

    plain = step_s(gradient_checkpointing="offload") - step_s(gradient_checkpointing="full")
    assert plain == pytest.approx(2 * 32 * 4 * 2048 * 4096 * 2 / 22e9, rel=0.01)
    unsloth = step_s(gradient_checkpointing="offload", kernels="unsloth")
    assert unsloth == pytest.approx(step_s(gradient_checkpointing="full", kernels="unsloth"), rel=1e-9)


@pytest.mark.parametrize(("optimizer", "state"), [("paged-adamw-8bit", 2), ("paged-adamw", 8)])
def test_paged_states_move_in_and_out(optimizer: Any, state: int) -> None:
    """Tensors of 100,000 elements and more: one or four bytes an element and moment; norms stay in torch's memory."""
    paged = LLAMA.num_parameters - (2 * LAYERS + 1) * HIDDEN
    found = emitted(training(method="full", optimizer=optimizer))
    assert found["optimizer", "paged_transfer"]["bytes"] == 2 * state * paged


def test_a_paged_update_reads_and_writes_its_state() -> None:
    """As the optimizer that is not paged; and the parameter and its gradient three times."""
    for paged, plain in (("paged-adamw-8bit", "adamw-8bit"), ("paged-adamw", "adamw-8bit")):
        found = emitted(training(method="full", optimizer=paged, max_grad_norm=0))["optimizer", "optimizer"]
        other = emitted(training(method="full", optimizer=plain, max_grad_norm=0))["optimizer", "optimizer"]
        if paged == "paged-adamw-8bit":
            assert found["bytes"] == other["bytes"]
        else:
            assert found["bytes"] == LLAMA.num_parameters * (3 * 2 + 2 * 8)
        assert found["launches"] == other["launches"]


def test_paged_states_take_time_only_where_the_card_is_full() -> None:
    settings = training(method="full", optimizer="paged-adamw", seq_len=256)
    peak = walk.peak_bytes(program.run(LLAMA, settings, architecture.architecture(A100, settings)).record)
    state = 8 * (LLAMA.num_parameters - (2 * LAYERS + 1) * HIDDEN)
    seconds = []
    for beyond in (0, -(2**20)):
        size = peak + state + A100.context_bytes[1] + beyond
        found = predict.predict(LLAMA, settings, replace(A100, memory_bytes=size)).time
        assert found is not None
        seconds.append(float(found.step_s.expected))
    assert seconds[1] - seconds[0] == pytest.approx(2 * state / 22e9, rel=0.01)


@pytest.mark.extra
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": "offload"},
        {"gradient_checkpointing": "offload", "kernels": "unsloth"},
        {"method": "full", "optimizer": "paged-adamw", "gradient_checkpointing": "none"},
        {"optimizer": "paged-adamw-8bit", "gradient_checkpointing": "offload", "kernels": "unsloth"},
    ],
)
def test_swept_seconds_are_those_of_a_prediction(settings: dict[str, Any]) -> None:
    """On a card with room and on one without, for copies that hide and (few tokens, slow link) that do not."""
    base = training(**settings)
    cards = (A100, catalog.gpu("rtx-3060-12gb"), catalog.gpu("h100-sxm5-80gb"))
    axes = sweep.Axes(micro_batch_size=(1, 6), seq_len=(64, 1000), r=(8, 64), gradient_accumulation_steps=(1, 3))
    cells = sweep.Sweeper(LLAMA, axes).cells(base, cards)
    for place in ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (1, 0, 1, 0, 1), (2, 1, 0, 1, 0), (1, 1, 0, 0, 0), (0, 1, 1, 1, 1)):
        found = predict.predict(LLAMA, sweep.at(cells, place[1:]), cards[place[0]]).time
        assert found is not None
        assert cells.step_s[place] == pytest.approx(found.step_s.expected, rel=1e-9)
        assert cells.step_s[place] * (1 + cells.step_spread[place]) == pytest.approx(found.step_s.high, rel=1e-9)


# --- passes, launches, FLOPs ---------------------------------------------------------------------------------------


def test_foreach_adamw_goes_over_the_parameters_twenty_times() -> None:
    """20 passes in 9 kernels of 30 tensors, and 3 in 2 for clipping (torch/optim/adam.py, clip_grad_norm_)."""
    found = emitted(training(method="full", optimizer="adamw"))["optimizer", "optimizer"]
    tensors = LAYERS * 9 + 2
    assert found["bytes"] == (20 + 3) * 2 * LLAMA.num_parameters
    assert found["launches"] == pytest.approx((9 + 2) * tensors / 30)
    assert found["calls"] == 2 * tensors
    unclipped = emitted(training(method="full", optimizer="adamw", max_grad_norm=0))["optimizer", "optimizer"]
    assert unclipped["bytes"] == 20 * 2 * LLAMA.num_parameters


def test_fused_adamw_reads_and_writes_once() -> None:
    """Gradient read, parameter and two moments read and written: 7 passes, one kernel of 30 tensors."""
    found = emitted(training(method="full", optimizer="adamw-fused", max_grad_norm=0))["optimizer", "optimizer"]
    counters = 2 * 4 * (LAYERS * 9 + 2)  # each tensor's own step count, read and written
    assert found["bytes"] == 7 * 2 * LLAMA.num_parameters + counters
    assert found["launches"] == pytest.approx((LAYERS * 9 + 2) / 30)


@pytest.mark.parametrize("kind", ["gptq4", "awq4"])
def test_a_quantized_weight_is_dequantized_forward_and_backward(kind: Any) -> None:
    """Half a byte read and two written for each weight, in every pass that multiplies by it."""
    weights = sum(p.weight_elements for layer in LLAMA.layers for p in layer.linears)
    settings = training(
        method="qlora", quantization=QuantizationSpec(kind=kind), autocast="none", gradient_checkpointing="none"
    )
    found = emitted(settings)
    first = HIDDEN * (2048 + 512 + 512)  # the first layer's q, k, v: nobody needs their input's gradient
    assert found["forward", "dequantize"]["bytes"] == 2.5 * weights
    assert found["forward", "dequantize"]["launches"] == 2 * 7 * LAYERS
    assert found["backward", "dequantize"]["bytes"] == 2.5 * (weights - first)
    assert found["backward", "dequantize"]["launches"] == 2 * (7 * LAYERS - 3)


def attention_flops(spec: Any, length: int, gpu: Gpu = A100) -> float:
    settings = training(seq_len=length, attention="flash2", gradient_checkpointing="none")
    return emitted(settings, spec, gpu)["forward", "flash_attention"]["flops"]


def test_a_window_is_computed_whole_where_a_causal_triangle_is_half() -> None:
    """Mistral-7B: 32 layers, 32 heads of 128, a window of 4096 of 8192 keys."""
    spec = model("mistralai/Mistral-7B-v0.1")
    whole = 32 * 4.0 * 32 * 128  # two products of 2 FLOPs for each query and key
    assert attention_flops(spec, 2048) == whole * 2048 * 2048 / 2
    assert attention_flops(spec, 4096) == whole * 4096 * 4096 / 2
    assert attention_flops(spec, 8192) == whole * 8192 * 4096


def test_tokens_go_through_the_experts_they_chose() -> None:
    """Mixtral: of 8 experts 2 for each token, three products of 4096 x 14336 each; 6 FLOPs a weight and token, full."""
    spec = model("mistralai/Mixtral-8x7B-v0.1")
    settings = training(method="full", gradient_checkpointing="none", base_dtype="bf16", autocast="none")
    found = emitted(settings, spec)
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    experts = 32 * 2 * 3 * 4096 * 14336
    others = 32000 * 4096 + 32 * 8 * 4096  # head and routers
    assert found["forward", "matmul"]["flops"] == pytest.approx(2 * TOKENS * (attention + experts + others), rel=1e-3)


def test_an_int8_base_quantizes_its_inputs_and_dequantizes_its_results() -> None:
    """LLM.int8(): one product in int8 for each linear of the base, its rows quantized before and scaled after."""
    settings = training(
        method="qlora", quantization=QuantizationSpec(kind="int8"), gradient_checkpointing="none", micro_batch_size=2
    )
    found = emitted(settings)["forward", "int8_quantize"], emitted(settings)["forward", "int8_dequantize"]
    assert [item["calls"] for item in found] == [7 * LAYERS, 7 * LAYERS]
