"""Steps, hours, USD and energy of a run, worked by hand."""

from __future__ import annotations

import datetime
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from planner.base.errors import Contradiction, InvalidInput
from planner.device.hardware import Instance
from planner.runs import cost
from planner.timing.step_time import Seconds
from tests.helpers.timing_toy import CARD


def time(seconds: float = 7.2, tokens: int = 8192, accumulation: int = 4) -> Any:
    step = Seconds(low=seconds / 2, expected=seconds, high=2 * seconds)
    return SimpleNamespace(step_s=step, tokens=tokens, gradient_accumulation_steps=accumulation)


def test_rows_are_counted_as_the_trainer_does() -> None:
    """1001 rows of 8 a step: 126 steps an epoch (transformers trainer.py rounds up), 2.5 epochs: 315."""
    found = cost.plan(time(), CARD, cost.Amount(rows=1001, epochs=2.5), micro_batch_size=2, seq_len=1024)
    assert (found.optimizer_steps, found.rows_per_step) == (315, 8)
    assert found.tokens == 1001 * 2.5 * 1024
    assert found.hours.expected == pytest.approx(315 * 7.2 / 3600)
    assert (found.hours.low, found.hours.high) == (pytest.approx(0.315), pytest.approx(1.26))
    assert (found.price, found.usd, found.energy_kwh) == (None, None, None)


def test_a_budget_of_useful_tokens() -> None:
    """8192 positions a step, of which 256 of 1024 are no padding: 2048 useful; a million take 489 steps."""
    amount = cost.Amount(tokens=1e6, mean_tokens=256)
    found = cost.plan(time(), CARD, amount, micro_batch_size=2, seq_len=1024)
    assert found.optimizer_steps == 489
    assert found.tokens == 1e6
    longer = cost.plan(time(), CARD, replace(amount, mean_tokens=4096), micro_batch_size=2, seq_len=1024)
    assert longer.optimizer_steps == 123  # rows are cut at seq_len: all 8192 are useful


def test_usd_and_energy_follow_the_hours() -> None:
    """1000 steps of 7.2 s are 2 h; at 1.5 USD an hour and 700 W: 3 USD, 1.4 kWh."""
    price = cost.Price(usd_per_hour=1.5, source="own")
    card = replace(CARD, tdp_w=700.0)
    found = cost.plan(time(), card, cost.Amount(rows=8000), micro_batch_size=2, seq_len=1024, price=price)
    assert found.usd is not None
    assert (found.usd.low, found.usd.expected, found.usd.high) == pytest.approx((1.5, 3.0, 6.0))
    assert found.energy_kwh == pytest.approx(1.4)


def machine(name: str, usd: float, gpu_id: str = "toy", cards: int = 1) -> Instance:
    return Instance(
        provider="cloud", instance_type=name, region="r", gpu_id=gpu_id, gpu_count=cards, usd_per_hour=usd,
        price_date="2026-01-01", source="s",
    )  # fmt: skip


def test_the_cheapest_machine_pays_for_all_of_its_cards() -> None:
    machines = [machine("dear", 3.0), machine("other", 0.5, gpu_id="else"), machine("cheap", 2.0, cards=4)]
    found = cost.cheapest(CARD, machines)
    assert found is not None
    assert (found.instance_type, found.usd_per_hour, found.gpu_count) == ("cheap", 2.0, 4)
    with_units = cost.cheapest(CARD, machines, dbu={"dear": 2.0}, dbu_rate=0.25)
    assert with_units is not None
    assert (with_units.instance_type, with_units.usd_per_hour) == ("dear", 3.5)
    assert cost.cheapest(replace(CARD, gpu_id="none"), machines) is None


def test_old_prices_and_unused_cards_are_told() -> None:
    price = cost.Price(usd_per_hour=1.0, source="s", instance_type="m", gpu_count=1, date="2026-01-01")
    assert price.warnings(datetime.date(2026, 5, 1)) == ()  # 120 days
    (old,) = price.warnings(datetime.date(2026, 5, 2))
    assert "121 days" in old
    (shared,) = replace(price, gpu_count=8, date="").warnings(datetime.date(2030, 1, 1))
    assert "8 cards" in shared


def test_an_amount_says_one_thing_once() -> None:
    with pytest.raises(Contradiction):
        cost.Amount(tokens=1.0, rows=1)
    for wrong in ({"epochs": 0.0}, {"epochs": 1e7}, {"tokens": -1.0}, {"rows": int(1e18)}):
        with pytest.raises(InvalidInput):
            cost.Amount(**wrong)  # type: ignore[arg-type]
