"""SETTINGS: a row or a field that is forgotten fails at import, by name."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from planner.base.errors import PlannerError
from planner.importers import values
from planner.training.kinds import Number, Whole
from planner.training.options import OPTIONS, flag_of
from planner.training.settings import LIBRARIES, SECTIONS, SETTINGS, Default, SettingRow, check_complete, conditions
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

COMPLETE = {f.name: getattr(SETTINGS["r"], f.name) for f in dataclasses.fields(cast(Any, SettingRow))}
SPECS = {"training": TrainingSpec, "lora": LoraSpec, "quantization": QuantizationSpec}


def with_row(key: str, **changes: Any) -> dict[str, SettingRow]:
    return {**SETTINGS, key: SettingRow(**{**COMPLETE, **changes})}


@pytest.mark.parametrize("left_out", COMPLETE)
def test_a_row_without_a_field_fails_and_names_it(left_out: str) -> None:
    with pytest.raises(TypeError, match=rf"SettingRow needs {left_out}$"):
        SettingRow(**{name: value for name, value in COMPLETE.items() if name != left_out})


def test_a_setting_that_fills_nothing_fails_and_names_the_field() -> None:
    with pytest.raises(TypeError, match="option made_up: LoraSpec has no field made_up"):
        check_complete(with_row("made_up", field="made_up"))


@pytest.mark.parametrize("key", [key for key in SETTINGS if key != "versions"])
def test_a_field_that_no_setting_fills_fails_and_is_named(key: str) -> None:
    rest = {name: row for name, row in SETTINGS.items() if name != key}
    row = SETTINGS[key]
    with pytest.raises(TypeError, match=f"no row for the field {row.field} of {SPECS[row.spec].__name__}"):
        check_complete(rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defaults": (Default(1, "", conditions({"compile": True})), Default(1))}, "depends on compile, which comes"),
        ({"defaults": (Default(1, "", conditions({"method": "lora"})),)}, "no default without a condition"),
        ({"defaults": ()}, "no default without a condition"),
        ({"section": "Elsewhere"}, "needs a known section"),
        ({"flags": ()}, "needs a known section, flags"),
        ({"help": ""}, "needs a known section, flags and help"),
    ],
)
def test_a_row_that_contradicts_the_others_fails(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"option r: .*{message}"):
        check_complete(
            {key: SettingRow(**{**COMPLETE, **changes}) if key == "r" else row for key, row in SETTINGS.items()}
        )


def test_every_option_has_its_own_flags_and_place() -> None:
    flags = [flag for option in OPTIONS.values() for part in option.flags for flag in part.split("/")]
    assert len(flags) == len(set(flags))
    places = [(row.section, row.place) for row in SETTINGS.values() if row.section]
    assert len(places) == len(set(places))
    assert {section for section, _ in places} == set(SECTIONS)
    assert set(OPTIONS) == (set(SETTINGS) - {"versions"}) | {"stack"} | set(LIBRARIES)
    assert flag_of("gradient_checkpointing") == "--checkpointing"


def valid(spec: str, field: str, value: Any) -> None:
    """Build the spec with one field changed."""
    kind = SPECS[spec]
    base: dict[str, Any] = {"lora": LoraSpec()} if kind is TrainingSpec else {}
    cast(Any, kind)(**({"method": "lora"} if kind is TrainingSpec else {}), **base, **{field: value})


@pytest.mark.parametrize("key", [key for key, row in SETTINGS.items() if isinstance(row.kind, Whole)])
def test_bounds_of_whole_numbers_are_those_of_the_specs(key: str) -> None:
    row = SETTINGS[key]
    assert isinstance(row.kind, Whole)
    highest = row.kind.high
    valid(row.spec, row.field, row.kind.low)
    valid(row.spec, row.field, highest)
    for outside in (row.kind.low - 1, highest + 1):
        with pytest.raises(PlannerError, match=str(outside)):
            valid(row.spec, row.field, outside)
        with pytest.raises(ValueError, match="must be a whole number"):
            values.option_value(key, outside, {})


@pytest.mark.parametrize("key", [key for key, row in SETTINGS.items() if isinstance(row.kind, Number)])
def test_numbers_keep_their_bounds_wherever_they_come_from(key: str) -> None:
    kind = SETTINGS[key].kind
    assert isinstance(kind, Number)
    for outside in (kind.low - 1, kind.high * 2, float("nan"), True, "x"):
        with pytest.raises(PlannerError, match=f"{key} is .*; must be"):
            kind.checked(key, outside)
        with pytest.raises(ValueError, match="must be"):
            values.option_value(key, outside, {})
    assert kind.checked(key, kind.low) == values.option_value(key, kind.low, {}) == kind.low
