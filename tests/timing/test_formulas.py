"""The fingerprint of the formulas follows what they say, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from planner.timing import coefficients, formulas, rates, step_time

NOW: Callable[[], str] = formulas.fingerprint.__wrapped__


def test_a_fingerprint_is_short_and_repeats() -> None:
    assert re.fullmatch("[0-9a-f]{8}", formulas.fingerprint())
    assert NOW() == formulas.fingerprint()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMPILED_LAUNCHES", 0.31),
        ("LOG_SOFTMAX_PASSES", 1.0),
        ("SHORTEST_KERNEL_S", 1.5e-6),
        ("TILES", ((256, 128), (128, 128), (64, 64))),
        ("SPLITS", (1, 2, 4)),
        ("FP32_LANES", {}),
        ("PORTABLE_VECTORS", ()),
        ("_INT8", {"int8_quantize": 0.48, "int8_dequantize": 0.68}),
        ("LEDGER_CLASS", {**step_time.LEDGER_CLASS, "norm": "attention"}),
        ("LEDGER_CLASS", {**step_time.LEDGER_CLASS, "a_new_kind": None}),
    ],
)
def test_another_constant_is_another_fingerprint(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates if hasattr(rates, name) else step_time, name, value)
    assert NOW() != formulas.fingerprint()


def _scaled(method: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*arguments: Any) -> Any:
        found = method(*arguments)
        return tuple(1.001 * value for value in found) if isinstance(found, tuple) else 1.001 * found

    return changed


@pytest.mark.parametrize("name", ["matmul_s", "_cpu_matmul_s", "attention_s", "product", "host_s", "launched"])
def test_another_rate_is_another_fingerprint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates.Rates, name, _scaled(getattr(rates.Rates, name)))
    assert NOW() != formulas.fingerprint()


def test_another_queue_or_transfer_is_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def longest(self: step_time.Sums) -> Any:
        """The step's host and device never wait for each other inside of it."""
        return max(sum(self.host.values()), sum(self.device.values()))

    with monkeypatch.context() as patched:
        patched.setattr(step_time.Sums, "_queued", longest)
        assert NOW() != formulas.fingerprint()
    with monkeypatch.context() as patched:
        patched.setattr(step_time.Sums, "_add_transfers", lambda self: None)
        assert NOW() != formulas.fingerprint()
    with monkeypatch.context() as patched:
        patched.setattr(rates, "old_dequantize_factor", lambda capability: 1.0)
        assert NOW() != formulas.fingerprint()


@pytest.mark.parametrize("name", ["FORMULA_ERROR", "SHARED_FORMULA", "MEASUREMENT_ERROR", "NINETY_PERCENT"])
def test_intervals_are_not_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, name, 0.123)
    assert NOW() == formulas.fingerprint()


def test_values_of_priors_are_not_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "HOPPER_INT8", 0.5)
    assert NOW() == formulas.fingerprint()
