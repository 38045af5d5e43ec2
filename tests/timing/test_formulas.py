"""The fingerprint of the formulas follows what they say, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from planner.base.records import replace
from planner.step.kernels import COMPILED, KERNELS
from planner.timing import coefficients, formulas, prices, rates, step_time

NOW: Callable[[], str] = formulas.fingerprint.__wrapped__


def test_a_fingerprint_is_short_and_repeats() -> None:
    assert re.fullmatch("[0-9a-f]{8}", formulas.fingerprint())
    assert NOW() == formulas.fingerprint()


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (step_time, "SHORTEST_KERNEL_S", 1.5e-6),
        (rates, "TILES", ((256, 128), (128, 128), (128, 64))),
        (rates, "SPLITS", (1, 2, 4)),
        (rates, "FP32_LANES", {}),
        (rates, "PORTABLE_VECTORS", ()),
    ],
)
def test_another_constant_is_another_fingerprint(
    module: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    assert NOW() != formulas.fingerprint()


@pytest.mark.parametrize(
    ("table", "name", "changes"),
    [
        (COMPILED, "merged", {"latency_share": 0.31}),
        (COMPILED, "merged", {"traffic": None}),
        (COMPILED, "kept", {"launched_share": 0.31}),
        (KERNELS, "log_softmax", {"gpu_passes": 1.0}),
        (KERNELS, "int8_dequantize", {"bandwidth_share": 0.68}),
        (KERNELS, "norm", {"ledger": "attention"}),
        (KERNELS, "norm", {"coefficient": "dequantize"}),
        (KERNELS, "norm", {"compiled": "kept"}),
        (KERNELS, "int8_quantize", {"call_cost": None}),
        (KERNELS, "flash_attention", {"attention": KERNELS["efficient_attention"].attention}),
        (KERNELS, "overlapped_transfer", {"lane": "compute"}),
        (KERNELS, "paged_transfer", {"only_without_room": False}),
    ],
)
def test_another_row_is_another_fingerprint(
    table: dict[str, Any], name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table, name, replace(table[name], **changes))
    assert NOW() != formulas.fingerprint()


def test_a_new_kind_is_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "a_new_kind", replace(KERNELS["norm"], name="a_new_kind"))
    assert NOW() != formulas.fingerprint()


@pytest.mark.parametrize("way", ["product", "attention", "traffic", "index", "link"])
def test_another_price_is_another_fingerprint(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = prices.PRICES[way]
    monkeypatch.setitem(prices.PRICES, way, replace(row, seconds=_scaled(row.seconds)))
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
