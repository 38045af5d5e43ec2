"""The algebra of kernels: the price of every kind on a toy card, worked by hand. The numbers below are the test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.base.errors import UnknownName
from planner.device.hardware import CPU
from planner.step.engine import Engine
from planner.step.kernels import KERNELS
from planner.timing import step_time
from planner.training.spec import Versions
from tests.helpers.timing_toy import CARD, kernel, rates

# m, n, k = 256, 128, 1008 fills the largest tile: 2 * 256 * 128 * (1008 + 16) = 67,108,864 FLOPs with the prologue.
# Of 0.5e12 FLOP/s: 134.2 us. Operands and result: 419,840 elements, of 2 bytes at 0.5 GB/s 1.679 ms.
ONE_TILE = (1, 256, 128, 1008)

Row = tuple[str, str, dict[str, Any], float, float]
ROWS: tuple[Row, ...] = (
    # kind, dtype, what else is said of it, seconds of arithmetic, seconds of memory traffic
    ("matmul", "bf16", {"shape": ONE_TILE}, 1.34217728e-4, 1.67936e-3),
    ("matmul", "fp16", {"shape": ONE_TILE}, 1.34217728e-4, 1.67936e-3),
    ("matmul", "fp32", {"shape": ONE_TILE}, 6.5536e-4, 3.35872e-3),  # 0.128e12 * 0.8
    ("matmul", "int8", {"shape": ONE_TILE}, 1.34217728e-4, 8.3968e-4),  # 2 * 1e12 * 0.25
    ("lora", "bf16", {"shape": ONE_TILE}, 1.34217728e-4, 1.67936e-3),
    ("bmm", "bf16", {"shape": (3, 256, 128, 1008)}, 4.02653184e-4, 5.03808e-3),
    # three products of 40 rows are three tiles of 64 x 64, not two
    ("bmm", "bf16", {"shape": (3, 40, 64, 1008)}, 8.62828251e-5, 1.288704e-3),
    # 64 x 64 tiles reuse 32 elements, 256 x 128 ones 85.3: 32/96 over 85.3/149.3 = 7/12 of the rate
    ("matmul", "bf16", {"shape": (1, 64, 64, 1008)}, 2.87609417e-5, 5.32480e-4),
    # one row more: 3 tiles of 128 x 128 at 0.875 (76.7 us each) beat 2 of 256 x 128 (134.2 us each)
    ("matmul", "bf16", {"shape": (1, 257, 128, 1008)}, 2.30087534e-4, 1.683904e-3),
    ("flash_attention", "bf16", {}, 1e9 / (0.5e12 * 0.5 * 0.75), 2e-3),  # rows of 300 tokens: 300 / 400
    ("flash_attention_backward", "bf16", {}, 1e9 / (0.5e12 * 0.25 * 0.75), 2e-3),
    ("cudnn_attention", "bf16", {}, 1e9 / (0.5e12 * 0.4 * 0.75), 2e-3),
    ("cudnn_attention_backward", "bf16", {}, 1e9 / (0.5e12 * 0.2 * 0.75), 2e-3),
    ("efficient_attention", "bf16", {}, 1e9 / (0.5e12 * 0.2), 2e-3),
    ("efficient_attention_backward", "bf16", {}, 1e9 / (0.5e12 * 0.1), 2e-3),
    ("efficient_attention", "fp32", {}, 1.953125e-2, 2e-3),  # 0.1024e12 * 0.5
    ("efficient_attention_backward", "fp32", {}, 1.953125e-2, 2e-3),
    ("dequantize", "bf16", {}, 0.0, 4e-3),
    ("int8_quantize", "int8", {}, 0.0, 4.16666667e-3),  # 0.48 of the reached bandwidth
    ("int8_dequantize", "fp16", {}, 0.0, 2.98507463e-3),  # 0.67
    ("optimizer", "fp32", {}, 0.0, 2e-3),
    ("host_transfer", "bf16", {}, 0.0, 4e-3),  # 1 MB at 0.25 GB/s
    ("overlapped_transfer", "bf16", {}, 0.0, 4e-3),
    ("paged_transfer", "bf16", {}, 0.0, 4e-3),
    ("log_softmax", "fp32", {}, 0.0, 4e-3),  # twice what the program counts
    ("indexed", "bf16", {}, 5e-4, 2e-3),  # 2 elements a clock
    ("indexed", "bf16", {"elements": 1e7}, 5e-3, 2e-3),
    ("softmax", "fp32", {}, 0.0, 2e-3),
    ("elementwise", "bf16", {}, 0.0, 2e-3),
    ("norm", "bf16", {}, 0.0, 2e-3),
    ("reduce", "bf16", {}, 0.0, 2e-3),
    ("cast", "bf16", {}, 0.0, 2e-3),
    ("copy", "bf16", {}, 0.0, 2e-3),
    ("dropout", "bf16", {}, 0.0, 2e-3),
)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}-{row[1]}-{number}" for number, row in enumerate(ROWS)])
def test_a_kernel_costs_what_is_worked_by_hand(row: Row) -> None:
    op, dtype, values, compute, memory = row
    price = rates().price(kernel(op, dtype, **values), 300)
    assert price.compute == pytest.approx(compute, rel=1e-5)
    assert price.memory == pytest.approx(memory, rel=1e-5)
    assert price.latency == pytest.approx(1e-6)


def test_every_kind_of_kernel_has_a_row() -> None:
    assert {row[0] for row in ROWS} == set(KERNELS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnknownName, match="unknown kind of kernel 'fused_everything'"):
        kernel("fused_everything")
    with pytest.raises(UnknownName, match="unknown kind of kernel 'fused_everything'"):
        Engine().kernel("fused_everything", "bf16", 2)


def test_latency_counts_every_launch() -> None:
    assert rates().price(kernel("norm", count=7), 300).latency == pytest.approx(7e-6)
    assert rates().price(kernel("matmul", shape=ONE_TILE, count=2), 300).latency == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("op", "dtype", "compute", "memory", "latency", "launched"),
    [
        ("elementwise", "bf16", 0.0, 8e-4, 3e-7, 0.3),  # 0.4 of the traffic, 0.3 of the launches
        ("indexed", "bf16", 0.0, 8e-4, 3e-7, 0.3),  # fused: no index of its own
        ("norm", "bf16", 0.0, 8e-4, 3e-7, 0.3),
        ("log_softmax", "fp32", 0.0, 1.6e-3, 3e-7, 0.3),
        ("optimizer", "fp32", 0.0, 2e-3, 1e-6, 1.0),
        ("dequantize", "bf16", 0.0, 4e-3, 1e-6, 0.3),
        ("int8_quantize", "int8", 0.0, 4.16666667e-3, 1e-6, 0.3),
        ("host_transfer", "bf16", 0.0, 4e-3, 1e-6, 1.0),
        ("overlapped_transfer", "bf16", 0.0, 4e-3, 1e-6, 1.0),
        ("flash_attention", "bf16", 5.33333333e-3, 2e-3, 1e-6, 0.3),
    ],
)
def test_what_torch_compile_changes(
    op: str, dtype: str, compute: float, memory: float, latency: float, launched: float
) -> None:
    compiled = rates(compile=True)
    price = compiled.price(kernel(op, dtype), 300)
    assert (price.compute, price.memory, price.latency) == pytest.approx((compute, memory, latency))
    assert compiled.launched(kernel(op, dtype)) == pytest.approx(launched)
    assert rates().launched(kernel(op, dtype)) == 1.0


def test_compiled_products_are_launched_one_by_one() -> None:
    product = kernel("matmul", shape=ONE_TILE)
    assert rates(compile=True).launched(product) == 1.0
    assert rates(compile=True).price(product, 300).latency == pytest.approx(1e-6)


def test_few_tiles_are_cut_along_the_inner_dimension() -> None:
    """4 multiprocessors of 0.125e12, 1 TB/s: 4 parts of 252 + 16, and 4 fp32 results written and read: 142.6 us."""
    wide = replace(CARD, sm_count=4, bandwidth_bytes_per_s=1e12)
    compute, memory = rates(wide).matmul_s(ONE_TILE, "bf16")
    assert compute == pytest.approx(1.40509184e-4 + 2.097152e-6, rel=1e-6)
    assert memory == pytest.approx(1.67936e-6, rel=1e-6)


def test_whole_waves_of_tiles() -> None:
    """On 2 multiprocessors of 0.25e12, 10 tiles of 128 x 128 in 5 waves of 153.4 us beat 5 of 256 x 128 in 3."""
    two = replace(CARD, sm_count=2, bandwidth_bytes_per_s=1e3)  # nothing is cut: writing parts would take too long
    assert rates(two).matmul_s((5, 256, 128, 1008), "bf16")[0] == pytest.approx(5 * 1.53391689e-4, rel=1e-6)


def test_tf32_and_missing_bf16_units() -> None:
    assert rates(tf32=True).matmul_s(ONE_TILE, "fp32")[0] == pytest.approx(2.68435456e-4)  # 0.5e12 * 0.5
    old = replace(CARD, bf16_native=False)
    assert rates(old).matmul_s(ONE_TILE, "bf16")[0] == pytest.approx(6.5536e-4)
    assert rates(old).matmul_s(ONE_TILE, "fp16")[0] == pytest.approx(1.34217728e-4)
    no_half = replace(CARD, bf16_flops_per_s=0.0)
    assert rates(no_half).peak("bf16") == 0.128e12
    assert rates(replace(CARD, fp16_flops_per_s=0.0)).peak("int8") == 0.256e12
    assert rates().peak("int8") == 2e12


def test_hopper_slows_flash_attention_only() -> None:
    hopper = rates(replace(CARD, compute_capability=(9, 0), fp32_flops_per_s=0.256e12))  # 128 lanes
    assert hopper.price(kernel("flash_attention"), 300).compute == pytest.approx(2 * 5.33333333e-3)
    assert hopper.price(kernel("flash_attention_backward"), 300).compute == pytest.approx(2 * 1.06666667e-2)
    assert hopper.price(kernel("cudnn_attention"), 300).compute == pytest.approx(6.66666667e-3)
    assert hopper.price(kernel("efficient_attention"), 300).compute == pytest.approx(1e-2)


def test_short_rows_slow_flash_and_cudnn_only() -> None:
    for op, seconds in (("flash_attention", 8e-3), ("cudnn_attention", 1e-2), ("efficient_attention", 1e-2)):
        assert rates().price(kernel(op), 100).compute == pytest.approx(seconds), op


def test_dequantization_before_bitsandbytes_0_48() -> None:
    for version, seconds in (((0, 47), 6.8e-3), ((0, 48), 4e-3), ((0, 50), 4e-3)):
        found = rates(versions=Versions(bitsandbytes=version)).price(kernel("dequantize"), 300)
        assert found.memory == pytest.approx(seconds), version


def test_lanes_of_a_multiprocessor_give_the_clock() -> None:
    for capability, elements in (((8, 0), 2e9), ((7, 5), 2e9), ((8, 6), 1e9), ((9, 0), 1e9)):
        found = rates(replace(CARD, compute_capability=capability)).indexed_per_s
        assert found == pytest.approx(elements), capability
    two = rates(replace(CARD, sm_count=2)).indexed_per_s  # the data sheet's rate is of all of them
    assert two == pytest.approx(2e9)


ON_A_CPU = replace(CARD, vendor=CPU, architecture="avx2", compute_capability=None, bf16_flops_per_s=0.128e12)


@pytest.mark.parametrize(
    ("op", "dtype", "values", "compute", "memory"),
    [
        # 2 * (256 + 64) * (128 + 64) * (1008 + 16) = 125,829,120 FLOPs of 0.064e12 a second
        ("matmul", "bf16", {"shape": ONE_TILE}, 1.96608e-3, 1.67936e-3),
        ("matmul", "bf16", {"shape": ONE_TILE, "layout": "nn"}, 3.93216e-3, 1.67936e-3),
        ("matmul", "bf16", {"shape": ONE_TILE, "layout": "tn"}, 9.8304e-4, 1.67936e-3),
        ("matmul", "fp32", {"shape": ONE_TILE, "layout": "nn"}, 1.2288e-3, 3.35872e-3),
        ("matmul", "bf16", {"shape": (2, 256, 128, 1008)}, 3.93216e-3, 3.35872e-3),
        ("flash_attention", "fp32", {}, 1.953125e-2, 2e-3),
        ("flash_attention", "bf16", {}, 4.16666667e-2, 2e-3),
        ("log_softmax", "fp32", {}, 0.0, 2e-3),
        ("indexed", "bf16", {}, 0.0, 2e-3),
        ("host_transfer", "bf16", {}, 0.0, 4e-3),  # read and written in one memory
    ],
)
def test_a_kernel_on_a_cpu(op: str, dtype: str, values: dict[str, Any], compute: float, memory: float) -> None:
    price = rates(ON_A_CPU).price(kernel(op, dtype, **values), 300)
    assert (price.compute, price.memory) == pytest.approx((compute, memory))


def test_layouts_cost_alike_with_avx512() -> None:
    new = rates(replace(ON_A_CPU, architecture="avx512f"))
    for layout in ("nt", "nn", "tn"):
        found = new.price(kernel("matmul", shape=ONE_TILE, layout=layout), 300)
        assert found.compute == pytest.approx(1.96608e-3)


@pytest.mark.parametrize(
    ("op", "part", "on_gpu", "on_cpu"),
    [  # 10 launches in 3 calls
        ("elementwise", "forward", 10e-6, 10e-6),
        ("elementwise", "recomputation", 20e-6, 10e-6),
        ("elementwise", "backward", 30e-6, 30e-6),
        ("optimizer", "optimizer", 52e-6, 40e-6),  # a GPU's touches every tensor once more
        ("dequantize", "forward", 25e-6, 25e-6),
        ("dequantize", "recomputation", 35e-6, 25e-6),
        ("int8_quantize", "backward", 45e-6, 45e-6),
        ("int8_dequantize", "forward", 10e-6, 10e-6),
        ("host_transfer", "forward", 10e-6, 10e-6),
    ],
)
def test_the_hosts_seconds(op: str, part: str, on_gpu: float, on_cpu: float) -> None:
    assert rates().host_s(KERNELS[op], part, 10, 3) == pytest.approx(on_gpu)
    assert rates(ON_A_CPU).host_s(KERNELS[op], part, 10, 3) == pytest.approx(on_cpu)


@pytest.mark.parametrize(
    ("op", "dtype", "bound", "shares"),
    [
        ("flash_attention", "bf16", 0.0, {"flash_forward": 1.0}),
        ("flash_attention_backward", "bf16", 0.0, {"flash_backward": 1.0}),
        ("cudnn_attention", "bf16", 0.0, {"cudnn_forward": 1.0}),
        ("efficient_attention_backward", "fp32", 0.0, {"efficient_fp32": 1.0}),
        ("indexed", "bf16", 1.0, {"indexed": 1.0, "bandwidth": 0.0}),
        ("indexed", "bf16", 0.0, {"indexed": 0.0, "bandwidth": 1.0}),
        ("dequantize", "bf16", 0.0, {"dequantize": 1.0}),
        ("host_transfer", "bf16", 0.0, {"host_link": 1.0}),
        ("overlapped_transfer", "bf16", 0.0, {"host_link": 1.0}),
        ("elementwise", "bf16", 0.0, {"bandwidth": 1.0}),
        ("int8_quantize", "int8", 0.0, {"bandwidth": 1.0}),
        ("optimizer", "fp32", 0.0, {"bandwidth": 1.0}),
    ],
)
def test_which_coefficients_a_kernel_follows(op: str, dtype: str, bound: float, shares: dict[str, float]) -> None:
    assert dict(step_time.shares_of(rates(), kernel(op, dtype), bound)) == shares


def test_which_coefficients_a_product_follows() -> None:
    def follows(card: Any, dtype: str, **values: Any) -> dict[str, float]:
        return dict(step_time.shares_of(rates(card), kernel("matmul", dtype, shape=ONE_TILE, **values), 0.75))

    assert follows(CARD, "bf16") == {"matmul": 0.75, "bandwidth": 0.25}
    assert follows(CARD, "int8") == {"matmul_int8": 0.75, "bandwidth": 0.25}
    assert follows(CARD, "fp32") == {"matmul_fp32": 0.75, "bandwidth": 0.25}
    assert follows(ON_A_CPU, "bf16", layout="nn") == {"matmul": 0.75, "bandwidth": 0.25, "portable_nn": 0.75}
    assert follows(ON_A_CPU, "int8") == {"matmul": 0.75, "bandwidth": 0.25}
    on_cpu = step_time.shares_of(rates(ON_A_CPU), kernel("host_transfer"), 0.0)
    assert dict(on_cpu) == {"bandwidth": 1.0}


@pytest.mark.parametrize(
    ("op", "in_a_layer", "outside"),
    [
        ("matmul", "matrix products", "matrix products"),
        ("lora", "adapters", "adapters"),
        ("bmm", "attention", "attention"),
        ("flash_attention_backward", "attention", "attention"),
        ("cudnn_attention", "attention", "attention"),
        ("efficient_attention", "attention", "attention"),
        ("softmax", "attention", "loss"),
        ("log_softmax", "element-wise", "loss"),
        ("norm", "element-wise", "loss"),
        ("indexed", "element-wise", "loss"),
        ("int8_dequantize", "dequantization", "dequantization"),
        ("int8_quantize", "dequantization", "dequantization"),
        ("dequantize", "dequantization", "dequantization"),
        ("optimizer", "optimizer", "optimizer"),
        ("paged_transfer", "host transfer", "host transfer"),
    ],
)
def test_classes_of_the_ledger(op: str, in_a_layer: str, outside: str) -> None:
    assert KERNELS[op].ledger_class(3) == in_a_layer
    assert KERNELS[op].ledger_class(-1) == outside


def test_parts_of_the_step() -> None:
    for phase in ("load", "state"):
        assert step_time.part_of(phase, recomputed=False) is None
    for phase, part in (("forward", "forward"), ("loss", "forward"), ("backward", "backward")):
        assert step_time.part_of(phase, recomputed=False) == part
    assert step_time.part_of("optimizer", recomputed=False) == "optimizer"
    assert step_time.part_of("backward", recomputed=True) == "recomputation"
