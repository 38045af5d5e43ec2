"""The house rules: imports go down only, heavy libraries stay out of the planner, files and functions stay small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

ROOMS: tuple[str, ...] = (
    "base",
    "device",
    "training",
    "model",
    "step",
    "memory",
    "timing",
    "sweep",
    "facts",
    "runs",
    "importers",
    "plan",
    "course",
    "exporters",
    "report",
    "cli",
)
"""Rooms of `planner`, lowest first: a module imports from its own room and from lower ones, inside functions too."""

CLIMBS: tuple[str, ...] = ()
"""Imports that still go up. None may be added; one that is gone must leave this list."""

LAZY = {
    "numpy": ("",),
    "pyarrow": ("report", "runs"),
    "pandas": ("plan", "report"),
    "huggingface_hub": ("facts",),
    "yaml": ("importers", "plan"),
    "pynvml": ("facts",),
    "calibrate": ("cli", "plan"),
    "matplotlib": ("report",),
    "tokenizers": ("runs",),
    "jinja2": ("runs",),
    "orjson": ("runs",),
}
"""What is not in the standard library and may be imported inside a function, and where ("" is everywhere)."""

AT_IMPORT = {"click": ("cli", "plan.tracing")}
"""What may be imported when a module is loaded."""

HEAVY = (
    "torch", "transformers", "peft", "bitsandbytes", "numpy", "pandas", "yaml", "matplotlib", "pydantic", "tabulate",
    "calibrate", "planner.importers",
)  # fmt: skip
"""What `loraplan fits` must not load: it answers in the time of an import."""

UNUSED = (
    "array", "dataclasses", "gettext", "http", "locale", "pathlib", "random", "struct", "tempfile", "urllib",
    "planner.report.config_checks", "planner.runs.cost", "planner.runs.dataset", "planner.facts.gguf_config",
    "planner.facts.headers", "planner.importers", "planner.plan.search", "planner.plan.sweep",
    "planner.step.classes.litgpt",
)  # fmt: skip
"""What bare `fits` with a model of the catalogue has no use for and must not load, unless click or Python did."""

MODULE_LINES = 650
FUNCTION_LINES = 80

PLANNER = sorted((ROOT / "planner").rglob("*.py"))
SOURCES = [*PLANNER, *sorted((ROOT / "calibrate").rglob("*.py")), *sorted((ROOT / "loraplan").rglob("*.py"))]


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(module, inside a function, line) of every import; `from planner import x` is planner.x."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}:{child.lineno}: write imports in full"
                if child.module and child.module.split(".")[0] in ("planner", "calibrate"):
                    yield from ((f"{child.module}.{alias.name}", inside, child.lineno) for alias in child.names)
                else:
                    yield child.module or "", inside, child.lineno
            elif not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return walk(tree_of(path), False)


def room(module: str) -> str:
    """The module or package directly under planner: planner.step.ops -> step; "" for planner itself."""
    return [*module.split("."), ""][1]


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of this repository that it imports, inside functions too, for type checking not."""
    names = {name_of(path) for path in SOURCES}
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        here = name_of(path)
        found = {module if module in names else module.rpartition(".")[0] for module, _, _ in imports(path)}
        edges[here] = (found & names) - {here}
    return edges


def test_every_module_has_a_room() -> None:
    rooms = {room(name_of(path)) for path in PLANNER} - {""}
    assert rooms == set(ROOMS), f"ROOMS names each room once: {sorted(rooms ^ set(ROOMS))}"


def test_imports_go_down_only() -> None:
    rank = {name: place for place, name in enumerate(("", *ROOMS))}
    climbs = {
        f"{here} -> {there}"
        for here, found in graph().items()
        for there in found
        if here.startswith("planner") and there.startswith("planner") and rank[room(there)] > rank[room(here)]
    }
    assert climbs <= set(CLIMBS), "\n".join(sorted(climbs - set(CLIMBS)))
    assert climbs == set(CLIMBS), f"these are gone, take them out of CLIMBS: {sorted(set(CLIMBS) - climbs)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = graph()
    circles = []
    for start in edges:
        reached: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            module = ahead.pop()
            if module not in reached:
                reached.add(module)
                ahead += edges[module]
        if start in reached:
            circles.append(start)
    assert circles == []


def test_the_planner_needs_only_the_standard_library() -> None:
    wrong = []
    for path in PLANNER:
        here = room(name_of(path))
        for module, inside, line in imports(path):
            top = module.split(".")[0]
            if top in ("planner", "") or top in sys.stdlib_module_names:
                continue
            allowed = AT_IMPORT.get(top, ()) + (LAZY.get(top, ()) if inside else ())
            if "" not in allowed and here not in allowed and name_of(path).removeprefix("planner.") not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}" + ("" if inside else " when loaded"))
    assert not wrong, "\n".join(wrong)


def test_calibrate_does_not_use_the_command_line() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "calibrate")
        for module, _, line in imports(path)
        if module.startswith(("planner.cli", "planner.report"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_say_what_they_are_for_and_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(tree_of(path)), "the module has no docstring"
    assert text.count("\n") <= MODULE_LINES, f"{text.count(chr(10))} lines: two subjects in one module?"
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


FITS = """
from planner.cli.main import main
try:
    main(['fits', 'meta-llama/Llama-3.1-8B', '--gpu', 'rtx-4090'])
except SystemExit as end:
    assert end.code in (0, 1)
"""


def loaded_by(code: str) -> list[str]:
    """Modules that code loads in a process of its own, beside those of a bare Python with click."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, click\nold = set(sys.modules)\n{code}\nprint(*set(sys.modules) - old)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("code", ["import planner.plan.predict", "import planner.cli.main", FITS])
def test_starting_loads_nothing_heavy(code: str) -> None:
    assert not set(HEAVY) & set(loaded_by(code))


def test_bare_fits_loads_only_what_it_uses() -> None:
    """Its start-up is paid with every answer; `make bench` says how much."""
    loaded = loaded_by(FITS)
    assert "planner.plan.predict" in loaded
    assert not set(UNUSED) & set(loaded)


def test_nothing_outside_the_tests_imports_from_them() -> None:
    names = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    outside = [
        path
        for folder in ("loraplan", "planner", "calibrate", "benchmarks", ".ci")
        for path in (ROOT / folder).rglob("*.py")
    ]
    for path in outside:
        for module, _, line in imports(path):
            assert module.split(".")[0] not in names, f"{path}:{line} imports {module}"


def test_tests_share_by_helpers_and_fixtures_only() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        for module, _, line in imports(path):
            assert module.split(".")[0] != "tests" or module.startswith("tests.helpers"), f"{path}:{line} {module}"
