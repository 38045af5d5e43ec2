"""Classes of transformers: each is described in one file, and no other place names one."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from planner.step.classes import registry
from planner.step.habits import COMMON, Habits

STEP = Path(import_module("planner.step").__file__ or "").parent
CLASSES = STEP / "classes"


@pytest.mark.parametrize("file", sorted({*registry.FILES.values()}))
def test_each_file_describes_what_the_registry_says(file: str) -> None:
    described = import_module(f"planner.step.classes.{file}").HABITS
    assert set(described) == {name for name, where in registry.FILES.items() if where == file}
    for name, habits in described.items():
        assert isinstance(habits, Habits)
        assert habits != COMMON, f"{name} does nothing else than most: it needs no entry"


def test_every_file_is_in_the_registry() -> None:
    files = {path.stem for path in CLASSES.glob("*.py")} - {"__init__", "registry", "litgpt"}
    assert files == {*registry.FILES.values()}


def test_a_class_without_a_file_does_what_most_do() -> None:
    assert registry.habits_of("smollm3") is COMMON


def test_a_frameworks_modules_keep_of_a_class_what_they_do_not_replace() -> None:
    own = registry.habits_of("qwen2_moe", own_modules="litgpt")
    assert own.shared_first and own.router_dtype == "logits"
    assert own.layer is not None and not own.repeats_for_flash


def test_no_module_of_the_step_compares_names_of_models() -> None:
    found = [
        f"{path.relative_to(STEP)}:{number} {line.strip()}"
        for path in STEP.rglob("*.py")
        if CLASSES not in path.parents
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"model_type *(==|!=|in |not in )|model_type\)|(stack|framework) *(==|!=) *[\"']", line)
    ]
    assert not found
