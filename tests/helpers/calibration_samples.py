"""Synthetic runs: bursts whose times come from known coefficients, on a CPU's and on a card's data sheet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from calibrate.fit.measurements import Measurement, Run
from calibrate.fit.points import point
from calibrate.measure import grid
from planner.device import processor
from planner.device.hardware import Gpu
from planner.facts import catalog
from planner.timing import step_time
from planner.timing.coefficients import Coefficients, priors

CPU_FACTS: dict[str, Any] = {
    "kind": "cpu", "name": "Sample CPU @ 2.50GHz", "cores": 4, "threads": 1, "clock_hz": 2.5e9, "vector": "avx512f",
    "bf16_native": False, "memory_bytes": 16 * 2**30, "fp32_flops_per_s": 160e9, "bf16_flops_per_s": 160e9,
    "bandwidth_bytes_per_s": 80e9, "host": "aaaaaaaaaaaa",
}  # fmt: skip
CPU = processor.as_gpu(CPU_FACTS)
H100 = catalog.gpu("h100-sxm")
H100_FACTS: dict[str, Any] = {
    "kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "host": "bbbbbbbbbbbb", "compute_capability": [9, 0],
    "memory_bytes": H100.memory_bytes, "bandwidth_bytes_per_s": H100.bandwidth_bytes_per_s, "gpu_id": H100.gpu_id,
}  # fmt: skip


def changed(gpu: Gpu, values: Mapping[str, float]) -> Coefficients:
    """The card's priors with some values replaced."""
    items = dict(priors(gpu))
    for name, value in values.items():
        items[name] = replace(items[name], value=value)
    return Coefficients(items)


CPU_TRUTH = changed(
    CPU, {"matmul": 0.2, "matmul_fp32": 0.55, "bandwidth": 0.14, "dequantize": 0.6, "launch_forward": 2e-5,
          "launch_backward": 1.2e-5, "launch_optimizer": 1.5e-5, "efficient_fp32": 0.25, "flash_backward": 0.35},
)  # fmt: skip
GPU_TRUTH = changed(
    H100, {"matmul": 0.7, "bandwidth": 0.8, "dequantize": 0.6, "launch_forward": 1.6e-5, "launch_backward": 9e-6},
)  # fmt: skip


def measurement(burst: grid.Burst, device: Mapping[str, Any], result: Mapping[str, Any]) -> Measurement:
    """One burst with a result."""
    request = burst.request("cpu" if device["kind"] == "cpu" else "cuda:0", 1, 5, 2)
    return Measurement(request=request, result=result, device=device)


def synthetic(
    bursts: Iterable[grid.Burst], device: Mapping[str, Any], truth: Coefficients, noise: float = 0.03, seed: int = 7,
    steps: int = 1,
) -> Run:  # fmt: skip
    """Bursts that took what `truth` says, with relative noise on every phase (CPU) or step (GPU)."""
    rng = random.Random(seed)
    gpu = processor.as_gpu(dict(device)) if device["kind"] == "cpu" else H100
    items = []
    for burst in bursts:
        empty = measurement(burst, device, {})
        phased = measurement(burst, device, {"steps_s": [1.0], "phases_s": [[1.0, 1.0, 1.0]], "threads": 1})
        exact = point(phased if device["kind"] == "cpu" else empty, gpu).predicted(truth)
        seen = [[value * (1 + rng.gauss(0, noise)) for value in exact] for _ in range(steps)]
        totals = [sum(values) for values in seen]
        result: dict[str, Any] = {"status": "ok", "protocol": 1, "steps_s": totals, "versions": {"torch": "2.13.0"}}
        if device["kind"] == "cpu":
            result |= {"steps_ran_s": totals, "phases_s": seen, "threads": 1}
        else:
            result |= profiled(empty, gpu, truth, totals[0] / exact[0])
        items.append(measurement(burst, device, result))
    return Run(device=device, versions={"torch": "2.13.0"}, created="2026-01-01T00:00:00", measurements=tuple(items))


def profiled(burst: Measurement, gpu: Gpu, truth: Coefficients, factor: float) -> dict[str, Any]:
    """Phases and kernels' seconds of a GPU's burst under `truth`, all `factor` times as long."""
    made = point(burst, gpu)
    parts, _, classes = step_time.phase_seconds(made.kernels, made.training, gpu, truth)
    phases = [parts["forward"], parts["backward"] + parts["recomputation"], parts["optimizer"]]
    kernels = {name: float(seconds) * factor for name, seconds in classes.items() if name != "adapters"}
    kernels["matrix products"] += float(classes["adapters"]) * factor
    return {
        "phases_s": [[float(seconds) * factor for seconds in phases]],
        "profile": {"seconds_by_class": kernels},
    }  # fmt: skip


def cpu_bursts(number: int) -> list[grid.Burst]:
    """The first bursts of the CPU's grid."""
    return list(itertools.islice(grid.cpu_grid(), number))


def gpu_bursts(number: int) -> list[grid.Burst]:
    """The first bursts of the H100's grid."""
    return list(itertools.islice(grid.gpu_grid(H100), number))
