"""Which calibration serves a card, and what a card takes from another's: worked by hand on toy cards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from planner.device.hardware import Gpu
from planner.timing import coefficients
from planner.timing.coefficients import Calibration, Coefficient, Coefficients
from tests.helpers.timing_toy import CARD

OTHER = replace(CARD, gpu_id="other", name="Other")


def fitted(name: str, value: float, error: float = 0.0, unit: str = "share", origin: str = "fitted") -> Coefficient:
    return Coefficient(
        name=name, value=value, standard_error=error, unit=unit, low=0.0, high=1e12, origin=origin, source="a fit",
    )  # type: ignore[arg-type]  # fmt: skip


def calibration(
    gpu_id: str, *items: Coefficient, created: str = "2026-01-01", capability: tuple[int, int] = (8, 0),
    bandwidth: float = 1e9, formula_error: float | None = 0.04,
) -> Calibration:  # fmt: skip
    device = {"name": gpu_id, "compute_capability": list(capability), "bandwidth_bytes_per_s": bandwidth}
    return Calibration(
        gpu_id=gpu_id, device=device, formula_version="x", created=created, versions={}, repeatability=0.0,
        coefficients=Coefficients({item.name: item for item in items}, formula_error), context_bytes=None, bursts=3,
        report={},
    )  # fmt: skip


def test_the_newest_of_ones_own_serves() -> None:
    old, new = (calibration("toy", fitted("matmul", v), created=day) for v, day in ((0.4, "2026-01"), (0.6, "2026-02")))
    for order in ((old, new), (new, old)):
        chosen = coefficients.select(CARD, order)
        assert chosen.calibration is new
        assert chosen.coefficients.value("matmul") == 0.6
        assert chosen.coefficients.formula_error == 0.04
        assert not chosen.borrowed


def test_what_is_borrowed_is_less_sure() -> None:
    """0.6 with an error of 0.03: hypot(0.03, 0.1 * 0.6) = 0.0670820; held-out errors of 4 % count as 6 %."""
    chosen = coefficients.select(CARD, [calibration("other", fitted("matmul", 0.6, 0.03))])
    assert chosen.borrowed
    found = chosen.coefficients["matmul"]
    assert (found.value, found.origin) == (0.6, "borrowed")
    assert found.standard_error == pytest.approx(0.0670820393)
    assert chosen.coefficients.formula_error == pytest.approx(0.06)


def test_the_hosts_seconds_and_what_is_published_are_not_borrowed() -> None:
    theirs = [
        fitted("launch_forward", 5e-5, unit="s"), fitted("host_link", 9e9, unit="bytes/s"), fitted("matmul", 0.6),
        fitted("bandwidth", 0.5), fitted("dequantize", 0.9, origin="assumed"),
    ]  # fmt: skip
    published = replace(CARD, measured_matmul_flops_per_s=0.7e12)
    chosen = coefficients.select(published, [calibration("other", *theirs)]).coefficients
    assert {name for name, item in chosen.items() if item.origin == "borrowed"} == {"bandwidth"}
    assert chosen.value("matmul") == pytest.approx(0.7)
    assert chosen["matmul"].standard_error == pytest.approx(0.035)  # a twentieth


@pytest.mark.parametrize(
    ("capability", "akin"), [((8, 0), True), ((8, 9), True), ((9, 0), False), ((7, 5), False), ((10, 0), False)]
)
def test_only_the_same_generation_lends(capability: tuple[int, int], akin: bool) -> None:
    chosen = coefficients.select(CARD, [calibration("other", fitted("matmul", 0.6), capability=capability)])
    assert chosen.borrowed == akin
    assert (chosen.calibration is not None) == akin


def test_the_nearest_card_lends() -> None:
    """|8.0 - 8.6| + |ln 1| = 0.6 is nearer than |8.0 - 8.0| + ln 2 = 0.693, and farther than ln 1.5 = 0.405."""
    assert math.log(2) > 0.6 > math.log(1.5)
    newer = calibration("newer", fitted("matmul", 0.6), capability=(8, 6))
    for bandwidth, nearest in ((2e9, "newer"), (0.5e9, "newer"), (1.5e9, "wide")):
        wide = calibration("wide", fitted("matmul", 0.5), bandwidth=bandwidth)
        chosen = coefficients.select(CARD, [wide, newer])
        assert chosen.calibration is not None
        assert chosen.calibration.gpu_id == nearest


def test_a_published_rate_is_a_share_of_the_16_bit_rate() -> None:
    """The larger of bf16 and fp16, never fp32's or tf32's."""
    card: Gpu = replace(CARD, measured_matmul_flops_per_s=0.5e12, fp16_flops_per_s=0.8e12, tf32_flops_per_s=2e12)
    assert coefficients.priors(card).value("matmul") == pytest.approx(0.5)
