"""Constants of the time model and of intervals against tests/facts/timing.csv: one row for each, with its source."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from planner.device import processor
from planner.device.hardware import Gpu
from planner.facts import catalog, sources
from planner.model import families
from planner.plan.intervals import uncertainty
from planner.step.kernels import KERNELS
from planner.timing.coefficients import Coefficient, priors
from planner.training.optimizers import OPTIMIZERS
from planner.training.spec import training_from_dict
from tests.helpers.calibration_samples import CPU_FACTS

FACTS = Path(__file__).parent.parent / "facts" / "timing.csv"
with FACTS.open(encoding="utf-8", newline="") as _file:
    ROWS = list(csv.DictReader(_file))

TABLES: dict[str, Any] = {"optimizer": OPTIMIZERS, "kernel": KERNELS}
"""[row, field, ...] of a table of the planner."""


def _card(name: str) -> Gpu:
    return processor.as_gpu(CPU_FACTS) if name == "cpu" else catalog.gpu(name)


def _coefficient(card: str, name: str) -> Coefficient:
    return priors(_card(card))[name]


def _spec(name: str) -> Any:
    return families.build_spec(sources.load_config(name).config, model_id=name)


def _value(function: str, arguments: list[Any]) -> Any:
    """What the code says now: the value of a name, or of a call with `arguments`."""
    if function == "prior":
        found = _coefficient(*arguments)
        return found.value, found.standard_error
    if function == "bounds":
        found = _coefficient(*arguments)
        return found.low, found.high
    if function == "uncertainty":
        settings = {"method": "lora", "lora.r": 8, **arguments[0]}
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        return sum(share for _, share in uncertainty(_spec("meta-llama/Llama-3.2-1B"), training_from_dict(settings)))
    if function == "uncertainty_of":
        training = training_from_dict({"method": "lora", "lora.r": 8})
        return sum(share for _, share in uncertainty(_spec(arguments[0]), training))
    if function in TABLES:
        return [getattr(TABLES[function][arguments[0]], field) for field in arguments[1:]]
    module, _, name = function.rpartition(".")
    if name == "get":
        module, _, table = module.rpartition(".")
        (key,) = arguments
        return getattr(importlib.import_module(module), table)[tuple(key) if isinstance(key, list) else key]
    value = getattr(importlib.import_module(module), name)
    return value(*(tuple(a) if isinstance(a, list) else a for a in arguments)) if arguments else value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['function']}-{row['arguments']}" for row in ROWS])
def test_a_fact(row: dict[str, str]) -> None:
    arguments = json.loads(row["arguments"]) if row["arguments"] else []
    found, expected = _plain(_value(row["function"], arguments)), json.loads(row["expected"])
    if isinstance(expected, (int, float)) or (isinstance(expected, list) and isinstance(expected[0], float)):
        assert found == pytest.approx(expected, rel=1e-6)
    else:
        assert found == expected
    assert row["source"]


@pytest.mark.parametrize("card", ["a100-sxm4-80gb", "cpu"])
def test_every_coefficient_is_a_fact(card: str) -> None:
    """GPUs' own, and those in which a CPU differs."""
    named = {json.loads(row["arguments"])[1] for row in ROWS if row["function"] == "prior" and card in row["arguments"]}
    own = priors(_card(card))
    differing = {name for name in own if card != "cpu" or own[name] != priors(_card("a100-sxm4-80gb")).get(name)}
    bounds_only = {"cudnn_forward", "cudnn_backward", "efficient_forward", "efficient_backward"}  # not a CPU's
    assert differing - (bounds_only if card == "cpu" else set()) <= named
