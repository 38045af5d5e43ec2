"""The fit: known coefficients come back, degenerate grids are refused, disturbed bursts do not decide."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("scipy")

from calibrate.fit import fit, residuals
from calibrate.fit import points as fit_points
from calibrate.fit.measurements import merge
from calibrate.measure import grid
from planner.base.errors import InvalidInput
from planner.device import processor
from planner.model import families
from planner.step import program
from planner.step.architecture import architecture
from planner.timing import step_time
from planner.timing.coefficients import Calibration, priors
from tests.helpers.calibration_samples import (
    CPU,
    CPU_FACTS,
    CPU_TRUTH,
    GPU_TRUTH,
    H100,
    H100_FACTS,
    changed,
    cpu_bursts,
    gpu_bursts,
    measurement,
    synthetic,
)

pytestmark = pytest.mark.extra


@pytest.fixture(scope="module")
def cpu_fit() -> Calibration:
    return fit.fit([synthetic(cpu_bursts(44), CPU_FACTS, CPU_TRUTH)])


def off_by(found: Calibration, truth: Any) -> dict[str, float]:
    """How many standard errors each fitted coefficient is from the truth."""
    return {
        name: abs(c.value - truth.value(name)) / c.standard_error
        for name, c in found.coefficients.items()
        if c.origin == "fitted"
    }


def test_a_cpu_gives_its_coefficients_back(cpu_fit: Calibration) -> None:
    apart = off_by(cpu_fit, CPU_TRUTH)
    assert {"matmul", "matmul_fp32", "bandwidth", "dequantize", "launch_forward", "launch_backward"} <= apart.keys()
    assert max(apart.values()) <= 3, apart
    for name in ("matmul", "matmul_fp32", "bandwidth", "launch_forward"):
        assert cpu_fit.coefficients[name].relative_error < 0.1, name
        assert cpu_fit.coefficients.value(name) == pytest.approx(CPU_TRUTH.value(name), rel=0.15), name


@pytest.mark.slow
def test_a_gpu_gives_its_coefficients_back() -> None:
    found = fit.fit([synthetic(gpu_bursts(40), H100_FACTS, GPU_TRUTH)])
    apart = off_by(found, GPU_TRUTH)
    assert {"matmul", "bandwidth", "dequantize", "launch_forward", "launch_backward"} <= apart.keys()
    assert max(apart.values()) <= 3, apart
    assert found.coefficients.value("matmul") == pytest.approx(0.7, rel=0.1)


def test_the_report_is_whole(cpu_fit: Calibration) -> None:
    report = cpu_fit.report
    assert report["fitted"]["bursts"] == cpu_fit.bursts == 44
    assert report["fitted"]["mean_error_pct"] < 5
    assert report["held_out"]["model"]["bursts"] == 44
    assert report["held_out"]["length"]["mean_error_pct"] >= report["fitted"]["mean_error_pct"]
    assert 0.7 <= report["coverage"] <= 1
    assert {"cudnn_forward", "efficient_backward"} <= set(report["not_reached"])
    assert cpu_fit.coefficients.formula_error is not None
    assert cpu_fit.coefficients["cudnn_forward"].origin != "fitted"
    assert cpu_fit.coefficients["kernel_latency"].value == 0


def test_one_configuration_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"one configuration.*cannot be told apart"):
        fit.fit([synthetic(cpu_bursts(1) * 6, CPU_FACTS, CPU_TRUTH)])


def test_a_degenerate_grid_is_refused_by_name() -> None:
    base = cpu_bursts(1)[0]
    ranks = [
        replace(base.training, lora=replace(base.training.lora, r=r)) for r in (8, 16, 32, 64) if base.training.lora
    ]
    bursts = [replace(base, training=training) for training in ranks]
    with pytest.raises(InvalidInput, match=r"does not determine .*efficient_fp32.*it needs .*long sequences"):
        fit.fit([synthetic(bursts, CPU_FACTS, CPU_TRUTH)])


def test_a_disturbed_burst_does_not_decide(cpu_fit: Calibration) -> None:
    run = synthetic(cpu_bursts(44), CPU_FACTS, CPU_TRUTH)
    first = run.measurements[0]
    slow = {**first.result, "phases_s": [[3 * s for s in first.result["phases_s"][0]]]}
    spoiled = replace(run, measurements=(replace(first, result=slow), *run.measurements[1:]))
    honest, found = cpu_fit.coefficients, fit.fit([spoiled]).coefficients
    for name in ("matmul_fp32", "bandwidth"):
        assert found.value(name) == pytest.approx(honest.value(name), rel=0.12), name


def test_failed_bursts_are_told_and_left_out() -> None:
    run = synthetic(cpu_bursts(44), CPU_FACTS, CPU_TRUTH)
    burst = cpu_bursts(1)[0]
    failed = [measurement(burst, CPU_FACTS, {"status": s, "message": "why"}) for s in ("oom", "timeout", "garbage")]
    found = fit.fit([replace(run, measurements=(*run.measurements, *failed))])
    assert found.bursts == 44
    assert found.report["skipped"] == ["garbage: why", "oom: why", "timeout: why"]
    with pytest.raises(InvalidInput, match="no burst can be used"):
        fit.fit([replace(run, measurements=tuple(failed))])


def test_a_shared_gpu_is_not_fitted() -> None:
    item = measurement(gpu_bursts(1)[0], H100_FACTS, {"status": "ok", "steps_s": [1.0], "others": [{"pid": 7}]})
    assert item.disturbed
    points, skipped = fit_points.usable([replace(synthetic([], H100_FACTS, GPU_TRUTH), measurements=(item,))], H100)
    assert points == []
    assert skipped == ["another process was on the GPU"]


def test_compressing_kernels_keeps_the_price() -> None:
    for burst in (*cpu_bursts(3), *cpu_bursts(9)[8:]):
        item = fit_points.point(measurement(burst, CPU_FACTS, {}), CPU)
        spec = families.build_spec(item.measurement.config, model_id=burst.model)
        whole = program.run(spec, burst.training, architecture(CPU, burst.training)).record
        full = step_time.step_time(whole, burst.training, CPU, priors(CPU))
        parts, step_s = item.price(priors(CPU))
        assert step_s == pytest.approx(full.step_s.expected - full.overhead_s, rel=1e-9)
        for part in step_time.PARTS:
            assert parts[part] == pytest.approx(getattr(full, f"{part}_s"), rel=1e-9)
        assert len(item.kernels.kernels) < len(whole.kernels)


def test_repeats_and_their_interval() -> None:
    twice = [*cpu_bursts(6), *cpu_bursts(6)]
    run = synthetic(twice, CPU_FACTS, CPU_TRUTH)
    differences = fit.repeats(run.measurements)
    assert len(differences) == 6
    interval = fit.repeat_interval(differences)
    assert 0 < interval < 0.15
    assert interval == pytest.approx(math.expm1(1.943 * math.sqrt(sum(d * d for d in differences) / 6)), rel=1e-3)
    assert fit.repeat_interval([]) == 0
    assert fit.repeat_interval([0.01] * 17 + [0.3]) == pytest.approx(math.expm1(0.3))  # 18 of 18: the 18th of 19


def test_a_check_uses_bursts_of_other_shapes(cpu_fit: Calibration) -> None:
    bursts = [b for b, _ in zip(grid.cpu_check(), range(12), strict=False)]
    assert not {b.model for b in bursts} & set(grid.CPU_MODELS)
    found = fit.check([synthetic(bursts, CPU_FACTS, CPU_TRUTH, noise=0.01)], cpu_fit)
    assert found["summary"]["bursts"] == 12
    assert found["summary"]["mean_error_pct"] < 6
    assert found["inside"] >= 9


def test_hosts_that_differ_are_flagged() -> None:
    run = synthetic(cpu_bursts(6), CPU_FACTS, CPU_TRUTH, noise=0.0)
    other = {**CPU_FACTS, "host": "cccccccccccc"}
    slower = changed(CPU, {"matmul_fp32": 0.4, "bandwidth": 0.1})
    assert merge([run, synthetic(cpu_bursts(6), other, CPU_TRUTH, noise=0.0)]) == []
    (note,) = merge([run, synthetic(cpu_bursts(6), other, slower, noise=0.0)])
    assert "cccccccccccc" in note
    with pytest.raises(InvalidInput, match="different devices"):
        merge([run, synthetic(gpu_bursts(1), H100_FACTS, GPU_TRUTH)])


def test_memory_is_compared_and_the_context_measured() -> None:
    burst = gpu_bursts(1)[0]
    gib = 2**30
    marks = {"load and adapters": {"reserved": 3 * gib, "allocated": 2 * gib},
             "steady step": {"reserved": 5 * gib, "allocated": 4 * gib}}  # fmt: skip
    result = {
        "status": "ok", "steps_s": [0.1, 0.2, 0.11], "memory": marks,
        "device_memory": {"baseline_bytes": gib, "peak_bytes": 6 * gib + 400 * 2**20, "samples": 9},
    }  # fmt: skip
    item = measurement(burst, H100_FACTS, result)
    assert item.step_s == 0.11
    assert item.memory_bytes == {"allocated": 4 * gib, "reserved": 5 * gib, "device": 5 * gib + 400 * 2**20}
    rows = residuals.memory_rows([fit_points.point(item, H100)])
    assert rows[0]["predicted_bytes"]["allocated"] > gib
    assert residuals.memory_summary(rows)["reserved"]["bursts"] == 1
    assert residuals.context([item]) == (400 * 2**20,) * 3


def test_a_cpu_without_avx512_has_a_rate_for_each_layout_of_16_bit_products(cpu_fit: Calibration) -> None:
    facts = {**CPU_FACTS, "vector": "avx2", "name": "Old CPU @ 2.50GHz"}
    gpu = processor.as_gpu(facts)
    truth = changed(
        gpu, {"matmul": 0.12, "matmul_fp32": 0.7, "portable_nn": 0.2, "bandwidth": 0.15, "launch_forward": 2e-5}
    )  # fmt: skip
    found = fit.fit([synthetic(cpu_bursts(44), facts, truth)])
    apart = off_by(found, truth)
    assert {"matmul", "matmul_fp32", "portable_nn"} <= apart.keys()
    assert max(apart.values()) <= 3, apart
    assert found.coefficients.value("portable_nn") == pytest.approx(0.2, rel=0.2)
    assert "portable_nn" not in off_by(cpu_fit, CPU_TRUTH)
