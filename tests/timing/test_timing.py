"""Time: the shape of the answer, its sums and bounds, and FLOPs against hand-written formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.base.errors import InvalidInput
from planner.device.hardware import Gpu
from planner.facts import catalog, sources
from planner.model import families
from planner.plan.predict import Prediction, predict
from planner.timing import rates as timing_rates
from planner.timing import step_time
from planner.timing.coefficients import Coefficient, Coefficients, priors
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec, Versions

A100 = catalog.gpu("a100-sxm4-80gb")
NF4 = QuantizationSpec(kind="nf4", double_quant=True)


def model(name: str = "meta-llama/Llama-2-7b-hf") -> Any:
    return families.build_spec(sources.load_config(name).config, model_id=name)


LLAMA = model()


def run(gpu: Gpu = A100, spec: Any = LLAMA, **settings: Any) -> Prediction:
    lora = settings.pop("lora", LoraSpec(r=16))
    method = settings.get("method", "lora")
    given = {"method": method, "lora": None if method == "full" else lora, "micro_batch_size": 1, "seq_len": 2048}
    return predict(spec, TrainingSpec(**{**given, **settings}), gpu)


def seconds(**settings: Any) -> float:
    time = run(**settings).time
    assert time is not None
    return float(time.step_s.expected)


# --- shape of the answer -------------------------------------------------------------------------------------------


def qlora_over_lora(batch: int, length: int, versions: Versions) -> float:
    """Time ratio with 16-bit adapters, as TRL makes them: what is left is the cost of the quantized base."""
    shape: dict[str, Any] = {"micro_batch_size": batch, "seq_len": length, "lora": LoraSpec(r=16, dtype="bf16")}
    quantized = seconds(method="qlora", quantization=NF4, versions=versions, **shape)
    return quantized / seconds(method="lora", versions=versions, **shape)


SHAPES = ((1, 256), (1, 512), (1, 1024), (2, 2048), (4, 4096))


def test_dequantization_costs_qlora_less_the_more_tokens_share_it() -> None:
    """Before 0.50 every forward dequantizes; since then a fused product spares it for few rows."""
    old = [qlora_over_lora(*shape, Versions(bitsandbytes=(0, 47))) for shape in SHAPES]
    assert old == sorted(old, reverse=True)
    assert old[0] > 1.3
    new = [qlora_over_lora(*shape, Versions()) for shape in SHAPES]
    assert all(0.95 <= after <= before for after, before in zip(new, old, strict=True))
    assert min(new) == new[-1]


def test_more_targets_take_longer() -> None:
    shape: dict[str, Any] = {"micro_batch_size": 8, "seq_len": 2048}
    everything = seconds(lora=LoraSpec(r=16, lora_dropout=0.05), **shape)
    two = seconds(lora=LoraSpec(r=16, lora_dropout=0.05, target_modules=("q_proj", "v_proj")), **shape)
    assert 1.3 <= everything / two <= 2.0


def test_checkpointing_costs_a_forward() -> None:
    for batch in (1, 8):
        with_it = seconds(micro_batch_size=batch, gradient_checkpointing="full")
        without = seconds(micro_batch_size=batch, gradient_checkpointing="none")
        assert 1.2 <= with_it / without <= 1.45


def test_throughput_saturates_with_the_batch() -> None:
    rates = [batch * 512 / seconds(micro_batch_size=batch, seq_len=512) for batch in (1, 2, 4, 8, 16, 32)]
    assert rates == sorted(rates)
    assert rates[1] / rates[0] > rates[-1] / rates[-2]
    assert rates[-1] / rates[-2] < 1.05


def test_time_grows_faster_than_the_length() -> None:
    for length in (4096, 8192, 16384):
        assert seconds(seq_len=2 * length) > 2 * seconds(seq_len=length)


def test_bandwidth_changes_only_what_waits_for_memory() -> None:
    slow = replace(A100, fp32_flops_per_s=100 * A100.fp32_flops_per_s)  # no kernel waits for its index arithmetic
    fast = replace(slow, bandwidth_bytes_per_s=2 * A100.bandwidth_bytes_per_s)
    slow_time, fast_time = run(micro_batch_size=4, gpu=slow).time, run(micro_batch_size=4, gpu=fast).time
    assert slow_time is not None
    assert fast_time is not None
    after = {line.name: line for line in fast_time.ledger}
    for line in slow_time.ledger:
        if line.name in ("matrix products", "attention"):
            assert after[line.name].seconds == pytest.approx(line.seconds, rel=0.01), line.name
        if line.name == "element-wise":
            assert 1.8 < line.seconds / after[line.name].seconds <= 2.0
        assert after[line.name].flops == line.flops


def test_passes_that_compute_an_index_follow_the_clock_where_memory_is_fast() -> None:
    fast = replace(A100, bandwidth_bytes_per_s=10 * A100.bandwidth_bytes_per_s)
    faster = replace(fast, bandwidth_bytes_per_s=2 * fast.bandwidth_bytes_per_s)
    seconds_of = [_element_wise_s(gpu) for gpu in (A100, fast, faster)]
    assert seconds_of[0] < 10 * seconds_of[1] / 2
    assert seconds_of[1] < 1.3 * seconds_of[2]


def _element_wise_s(gpu: Gpu) -> float:
    time = run(micro_batch_size=4, gpu=gpu).time
    assert time is not None
    return float(next(line.seconds for line in time.ledger if line.name == "element-wise"))


def test_small_work_waits_for_the_host() -> None:
    small = model("HuggingFaceTB/SmolLM2-135M")
    time = run(spec=small, seq_len=128).time
    assert time is not None
    assert time.bound == "kernel launch"
    assert time.launch_wait_s > 0
    assert seconds(spec=small, seq_len=256) < 1.1 * seconds(spec=small, seq_len=128)


def test_cards_without_bf16_units_run_bf16_at_the_fp32_rate() -> None:
    t4 = catalog.gpu("t4")
    half = seconds(gpu=t4, base_dtype="fp16", autocast="fp16", seq_len=512)
    assert seconds(gpu=t4, base_dtype="bf16", autocast="bf16", seq_len=512) > 2 * half


def test_tf32_speeds_up_fp32_products_where_the_card_has_it() -> None:
    fp32: dict[str, Any] = {"base_dtype": "fp32", "autocast": "none", "micro_batch_size": 4}
    assert seconds(tf32=True, **fp32) < 0.5 * seconds(**fp32)
    t4 = catalog.gpu("t4")
    assert seconds(gpu=t4, tf32=True, **fp32) == seconds(gpu=t4, **fp32)


def test_accumulation_repeats_all_but_the_optimizer() -> None:
    one, four = run().time, run(gradient_accumulation_steps=4).time
    assert one is not None
    assert four is not None
    assert four.forward_s == pytest.approx(one.forward_s)
    micro = one.forward_s + one.recomputation_s + one.backward_s
    assert four.step_s.expected == pytest.approx(
        4 * micro + one.optimizer_s + one.overhead_s, rel=5e-3
    )  # later micro batches add to gradients
    assert four.tokens == 4 * one.tokens


# --- sums, bounds, intervals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "gptq4"])
@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-30B-A3B", "openai-community/gpt2"])
def test_the_ledger_sums_to_the_step(name: str, kind: Any) -> None:
    quantization = QuantizationSpec(kind=kind)
    lora = LoraSpec(target_modules=("attention",))
    time = run(
        spec=model(name), method="lora" if kind == "none" else "qlora", quantization=quantization, lora=lora
    ).time
    assert time is not None
    total = sum(line.seconds for line in time.ledger) + time.launch_wait_s + time.overhead_s
    assert total == pytest.approx(time.step_s.expected)
    parts = time.forward_s + time.recomputation_s + time.backward_s + time.optimizer_s + time.overhead_s
    assert parts == pytest.approx(time.step_s.expected)
    assert time.perfect_overlap_s <= time.step_s.expected <= time.no_overlap_s
    assert time.step_s.low < time.step_s.expected < time.step_s.high
    assert 0 < time.model_flops_utilization <= time.hardware_flops_utilization < 1


def test_no_rates_no_time() -> None:
    card = Gpu(gpu_id="custom", name="a card", memory_bytes=24 * 2**30, memory_basis="user")
    assert run(gpu=card).time is None
    assert run(gpu=card).step_s is None


def test_an_anchor_says_most_about_runs_like_itself() -> None:
    like = (("formulas", 0.1), ("matmul", 0.06))
    unlike = (("formulas", 0.1), ("bandwidth", 0.06))
    same, other = step_time.anchor_factor(like, like, 1.3), step_time.anchor_factor(like, unlike, 1.3)
    assert 1 < other < same < 1.3
    assert step_time.anchor_factor(like, like, 1.0) == 1.0


# --- coefficients --------------------------------------------------------------------------------------------------


def test_priors_name_their_source_and_stay_in_bounds() -> None:
    for gpu in catalog.gpus():
        for coefficient in priors(gpu).values():
            assert coefficient.low <= coefficient.value <= coefficient.high
            assert coefficient.standard_error > 0
            assert coefficient.source
            assert coefficient.unit


def test_published_microbenchmarks_replace_the_class_value() -> None:
    assert priors(A100).value("matmul") == pytest.approx(271.2 / 312)
    assert priors(catalog.gpu("rtx-4090"))["matmul"].source != priors(A100)["matmul"].source


def test_a_coefficient_out_of_bounds_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"matmul is 1\.5"):
        replace(priors(A100)["matmul"], value=1.5)


def test_given_coefficients_are_used() -> None:
    base = priors(A100)
    slower: dict[str, Coefficient] = {**base, "matmul": replace(base["matmul"], value=base.value("matmul") / 2)}
    time = predict(
        LLAMA, TrainingSpec(method="lora", lora=LoraSpec(), micro_batch_size=4), A100, coefficients=Coefficients(slower)
    ).time
    assert time is not None
    assert time.step_s.expected > 1.4 * seconds(micro_batch_size=4, lora=LoraSpec())


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def linear_weights(spec: Any) -> int:
    """Elements of all linear weights of the blocks."""
    return sum(p.weight_elements for layer in spec.layers for p in layer.linears)


def test_flops_of_full_training_are_three_forwards() -> None:
    """Full fine-tuning: 2 FLOPs per weight and token forward, twice that backward (the textbook 6 N per token)."""
    time = run(method="full", gradient_checkpointing="none").time
    assert time is not None
    head = LLAMA.vocab_size * LLAMA.hidden_size
    products = 6 * (linear_weights(LLAMA) + head) * 2048
    layers, hidden = LLAMA.num_layers, LLAMA.hidden_size
    attention = 3.5 * 2 * 2048 * 2048 * hidden * layers  # causal half of 4 b s^2 h, backward 2.5 times
    assert time.model_flops == pytest.approx(products + attention, rel=1e-6)
    assert time.hardware_flops == time.model_flops


def test_frozen_weights_cost_no_weight_gradient() -> None:
    """LoRA: 4 FLOPs per frozen weight and token, 6 per adapter weight; the first layer's inputs need no gradient."""
    spec, rank, tokens = LLAMA, 16, 2048
    time = run(gradient_checkpointing="none", autocast="none", lora=LoraSpec(r=rank, dtype="bf16")).time
    assert time is not None
    frozen = linear_weights(spec) + spec.vocab_size * spec.hidden_size
    adapters = sum(rank * (p.in_features + p.out_features) for layer in spec.layers for p in layer.linears)
    attention = 3.5 * 2 * tokens * tokens * spec.hidden_size * spec.num_layers
    whole = 4 * frozen * tokens + 6 * adapters * tokens + attention
    assert time.model_flops < whole
    assert time.model_flops == pytest.approx(whole, rel=0.01)


def test_layouts_of_products_matter_on_a_cpu_without_avx512_only() -> None:
    from planner.device import processor
    from tests.helpers.calibration_samples import CPU_FACTS

    shape = (1, 256, 512, 384)
    half = TrainingSpec(method="lora", lora=LoraSpec(r=8), autocast="bf16", base_dtype="bf16")
    for vector, differ in (("avx2", True), ("avx512f", False)):
        gpu = processor.as_gpu({**CPU_FACTS, "vector": vector})
        rates = timing_rates.Rates(gpu, priors(gpu), half)
        forward, backward = (rates.matmul_s(shape, "bf16", layout)[0] for layout in ("nt", "nn"))
        assert (backward > 2 * forward) is differ
        assert rates.matmul_s(shape, "fp32", "nt") == rates.matmul_s(shape, "fp32", "nn")
    assert not any(name.startswith("portable") for name in priors(A100))
