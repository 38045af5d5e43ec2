"""Predictions against real training steps on an H200 (data/measurements/h200*.json); memory has nothing fitted."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from calibrate.fit.measurements import Measurement, read_runs
from calibrate.fit.points import point, pooled, usable
from planner.facts import calibration_files, catalog
from planner.model import families
from planner.plan.predict import predict
from planner.timing import step_time
from planner.timing.coefficients import priors

DATA = Path(__file__).parent.parent.parent / "data"
H200 = catalog.gpu("h200-sxm-141gb")


@cache
def measured() -> tuple[Measurement, ...]:
    """Every burst and trainer run whose steps were timed."""
    files = [DATA / "measurements" / name for name in ("h200.json", "h200-check.json")]
    return tuple(m for run in read_runs(files) for m in run.measurements if m.ok)


@cache
def memory_errors() -> dict[str, list[float]]:
    """Relative errors of predicted memory, by counter, one per configuration."""
    found: dict[str, list[float]] = {"allocated": [], "reserved": []}
    for item in {m.key: m for m in measured()}.values():
        spec = families.build_spec(item.config, model_id=item.model)
        predicted = predict(spec, item.training, H200)
        for name, errors in found.items():
            if name in item.memory_bytes:
                errors.append(getattr(predicted, name).expected / item.memory_bytes[name] - 1)
    return found


def test_allocated_memory() -> None:
    errors = memory_errors()["allocated"]
    assert len(errors) >= 55
    assert mean(map(abs, errors)) < 0.0003
    assert max(errors) < 0.0015
    assert min(errors) > -0.0015


def test_reserved_memory() -> None:
    errors = memory_errors()["reserved"]
    assert mean(map(abs, errors)) < 0.008
    assert max(errors) < 0.13
    assert min(errors) > -0.02


def test_a_trainer_run_is_predicted_before_any_calibration() -> None:
    runs = [m for m in measured() if m.request.get("source") == "trainer"]
    assert len(runs) == 2
    for item in runs:
        spec = families.build_spec(item.config, model_id=item.model)
        found = predict(spec, item.training, H200, coefficients=priors(H200))
        assert found.time is not None
        assert found.time.step_s.expected == pytest.approx(item.step_s, rel=0.08)
        assert found.allocated.expected == pytest.approx(item.memory_bytes["allocated"], rel=0.001)
        assert found.reserved.expected == pytest.approx(item.memory_bytes["reserved"], rel=0.005)


def test_seconds_of_kernels_before_any_calibration() -> None:
    """What the GPU itself takes, from the profiled step, of bursts of 30 ms and more."""
    errors = []
    for item in {m.key: m for m in measured() if sum(m.kernels_s.values()) > 0.03}.values():
        made = point(item, H200)
        classes = step_time.phase_seconds(made.kernels, made.training, made.gpu, priors(H200))[2]
        errors.append(sum(classes.values()) / sum(item.kernels_s.values()) - 1)
    assert len(errors) >= 35
    assert mean(map(abs, errors)) < 0.06
    assert max(map(abs, errors)) < 0.25


def test_the_shipped_calibration_says_what_its_bursts_took() -> None:
    calibration = calibration_files.read(DATA / "calibrations" / "h200.json")
    assert calibration.gpu_id == H200.gpu_id
    taken, _ = usable(read_runs([DATA / "measurements" / "h200.json"]), H200)
    errors = [p.step_s(calibration.coefficients) / p.measurement.step_s - 1 for p in pooled(taken)]
    assert len(errors) >= 20
    assert mean(map(abs, errors)) < 0.04


def test_bursts_of_a_slowed_host_are_not_fitted() -> None:
    runs = read_runs([DATA / "measurements" / "h200.json"])
    taken, reasons = usable(runs, H200)
    assert "fork" in reasons[0]
    for item in taken:
        assert not item.measurement.forked or item.measurement.busy_share >= 0.9
        assert not item.measurement.forked or item.measurement.phases_s is None
