"""A name of an optimizer, quantization, loss, set of kernels, framework or of own modules stands in its table only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from calibrate.oracle import cases
from planner.cli.main import cli
from planner.training.losses import KERNEL_SETS, LOSSES
from planner.training.optimizers import OPTIMIZERS
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.stacks import STACKS

ROOT = Path(__file__).resolve().parent.parent.parent
TABLES = ("optimizers", "quantizations", "losses", "own_modules", "stacks", "settings")
DTYPE = "int8"
"""The name of a quantization, and of a tensor's dtype in the step: looked for where a choice is compared."""
NAMES = {*OPTIMIZERS, *QUANTIZATIONS, *LOSSES, *KERNEL_SETS} - {"none", DTYPE}
FRAMEWORKS = {*STACKS, *OWN_MODULES} - {"none"}

ELSEWHERE: dict[str, dict[str, str]] = {
    "planner/training/spec.py": {"full-logits-fp32": "a default of the type", "adamw-fused": "a default of the type"},
    "planner/exporters/frameworks.py": {"nf4": "axolotl's own fixed type", "adamw": "what entrenar falls back to"},
}
"""File -> names that stand there too, and why. A whole file of runs to measure is in MEASURED."""
MEASURED = ("calibrate/oracle/cases.py", "calibrate/oracle/extrapolate.py", "calibrate/measure/grid.py")
"""Grids of runs: which settings are measured or compared with a trace (below: no optimizer is left out)."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("planner", "calibrate"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent.name != "training" or path.stem not in TABLES:
                yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_rows_are_named_in_their_tables_only() -> None:
    found = [
        f"{file}:{node.lineno} {node.value!r}"
        for file, tree in sources()
        for node in literals(tree)
        if node.value in NAMES and file not in MEASURED and node.value not in ELSEWHERE.get(file, {})
    ]
    assert not found, "read the row's field instead:\n" + "\n".join(found)


def test_every_optimizer_is_compared_with_a_trace() -> None:
    assert {*cases.LORA_OPTIMIZERS, *cases.FULL_OPTIMIZERS} == set(OPTIMIZERS)


@pytest.mark.parametrize("file", ELSEWHERE)
def test_what_is_allowed_is_there(file: str) -> None:
    inside = {node.value for node in literals(ast.parse((ROOT / file).read_text(encoding="utf-8")))}
    assert set(ELSEWHERE[file]) <= inside


def test_an_8_bit_base_is_asked_for_by_its_row() -> None:
    found = [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and file not in MEASURED
        if any(name.value == DTYPE for name in literals(node)) and re.search("kind|quant", ast.unparse(node))
    ]
    assert not found, "read the row's field instead:\n" + "\n".join(found)


def _parts(node: ast.Compare | ast.BoolOp) -> Iterator[ast.AST]:
    """What is compared or chosen, and what is in it where that is a tuple or a set."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, (ast.Tuple, ast.Set, ast.List)):
            yield from child.elts


def test_no_framework_is_compared_by_name() -> None:
    found = [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Compare, ast.BoolOp))  # a == "trl"; a or "custom"
        and any(isinstance(part, ast.Constant) and part.value in FRAMEWORKS for part in _parts(node))
    ]
    assert not found, "read the stack's field instead:\n" + "\n".join(found)


def test_own_modules_are_asked_for_by_name_in_the_registry_only() -> None:
    found = [
        f"{file}:{node.lineno}"
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and "own_modules" in ast.unparse(node) and "registry" not in file
    ]
    assert not found, "\n".join(found)


def flags_of(command: click.Command, ctx: click.Context) -> set[str]:
    """Every flag of a command and of the commands below it."""
    found = {flag for param in command.get_params(ctx) for flag in (*param.opts, *param.secondary_opts)}
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            assert inner is not None
            found |= flags_of(inner, click.Context(inner))
    return found


def test_flags_named_in_messages_exist() -> None:
    known = flags_of(cli, click.Context(cli))
    assert {"--rank", "--no-kbit-prep", "--target-modules"} <= known
    missing = {
        f"{file}:{node.lineno} {flag}"
        for file, tree in sources()
        if file.startswith("planner/")
        for node in literals(tree)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*\b", str(node.value))
        if flag not in known | {"--config"}  # trl's
    }
    assert not missing, "\n".join(sorted(missing))
