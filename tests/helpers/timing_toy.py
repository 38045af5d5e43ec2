"""A toy card with round rates, and coefficients of round values: prices can be worked by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.device.hardware import Gpu
from planner.step.engine import Record, Segment
from planner.step.kernels import Kernel
from planner.timing import rates as timing_rates
from planner.timing.coefficients import Coefficient, Coefficients
from planner.training.spec import LoraSpec, TrainingSpec

CARD = Gpu(
    gpu_id="toy", name="toy", memory_bytes=2**34, compute_capability=(8, 0), sm_count=1, bandwidth_bytes_per_s=1e9,
    fp32_flops_per_s=0.128e12, tf32_flops_per_s=0.5e12, fp16_flops_per_s=1e12, bf16_flops_per_s=1e12, bf16_native=True,
)  # fmt: skip
"""1 TFLOP/s in 16 bits, 0.128 in fp32: with 64 fp32 lanes of 2 FLOPs a cycle, a clock of 1 GHz. 1 GB/s."""

VALUES: dict[str, float] = {
    "matmul": 0.5, "matmul_fp32": 0.8, "matmul_int8": 0.25, "indexed": 2.0, "tile_reuse_half": 64.0,
    "matmul_k_half": 16.0, "bandwidth": 0.5, "dequantize": 0.5, "flash_forward": 0.5, "flash_backward": 0.25,
    "flash_hopper": 0.5, "flash_length_half": 100.0, "cudnn_forward": 0.4, "cudnn_backward": 0.2,
    "efficient_forward": 0.2, "efficient_backward": 0.1, "efficient_fp32": 0.5, "kernel_latency": 1e-6,
    "launch_forward": 1e-6, "launch_recomputation": 2e-6, "launch_backward": 3e-6, "launch_quantized": 5e-6,
    "launch_optimizer": 4e-6, "framework_step": 0.5, "portable_nn": 0.5, "portable_tn": 2.0, "compiled_traffic": 0.4,
    "host_link": 0.25e9,
}  # fmt: skip


def coefficients(
    values: Mapping[str, float] | None = None, errors: Mapping[str, float] | None = None, origin: Any = "assumed"
) -> Coefficients:
    """VALUES with some replaced; `errors`: standard errors, none where not given."""
    items = {}
    for name, value in {**VALUES, **(values or {})}.items():
        error = (errors or {}).get(name, 0.0)
        items[name] = Coefficient(
            name=name, value=value, standard_error=error, unit="", low=0.0, high=1e12, origin=origin, source=""
        )
    return Coefficients(items)


def training(**settings: Any) -> TrainingSpec:
    """Rows of 300 tokens."""
    return TrainingSpec(**{"method": "lora", "lora": LoraSpec(), "seq_len": 300, **settings})


def rates(card: Gpu = CARD, **settings: Any) -> timing_rates.Rates:
    """What the toy card reaches."""
    return timing_rates.Rates(card, coefficients(), training(**settings))


def kernel(op: str, dtype: str = "bf16", **values: Any) -> Kernel:
    """A kernel of 10^9 FLOPs (fused attention), 10^6 bytes and elements, launched once."""
    elements = values.pop("elements", 1e9 if "attention" in op else 1e6)
    given = {"flops": 1e9, "nbytes": 1e6, "count": 1, "segment": 1, "shape": None, "recomputed": False, **values}
    return Kernel(op, dtype, elements=elements, **given)


def record(*kernels: Kernel, phases: tuple[tuple[str, int, int], ...]) -> Record:
    """Kernels in segments (phase, layer, how often it stands for itself); segment 1 is the first of `phases`."""
    run = Record()
    run.segments += [Segment(phase, layer, repeat, 0) for phase, layer, repeat in phases]
    run.kernels += kernels
    return run
