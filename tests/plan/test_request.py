"""One way in: what a request takes, that it does not change, and that every command goes through it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import InvalidInput, UnknownName
from planner.plan import request as requests
from planner.plan.answering import ask
from planner.plan.given import NAMES, Settings
from planner.plan.jobs import Files
from planner.plan.request import Cost, Known, Request, resolve
from planner.plan.values import key_of, value_of
from planner.training.options import OPTIONS
from planner.training.settings import SETTINGS

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = "openai-community/gpt2"
CONFIG = f"base_model: {SMALL}\nadapter: qlora\nload_in_4bit: true\nlora_r: 8\nmicro_batch_size: 3\nsequence_len: 512\n"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "qlora.yml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


# --- settings -----------------------------------------------------------------------------------------------------


def test_a_setting_that_does_not_exist_names_those_that_are_near() -> None:
    with pytest.raises(UnknownName, match="unknown setting 'micro_batch'; did you mean micro_batch_size"):
        Settings({"micro_batch": 2})


def test_settings_hold_what_was_said_and_cannot_be_changed() -> None:
    said = Settings({"r": 8, "seq_len": None, "target_slices": "0,2", "skip_modules": "none", "torch": "2.4"})
    assert dict(said) == {"r": 8, "target_slices": [0, 2], "skip_modules": (), "torch": "2.4"}
    assert said.options()["versions"].torch == (2, 4)  # type: ignore[attr-defined]
    assert "torch" not in said.options()
    with pytest.raises(TypeError):
        said["r"] = 4  # type: ignore[index]
    with pytest.raises(AttributeError, match="cannot be changed"):
        said.r = 4  # type: ignore[attr-defined]
    assert said.but({"r": 4})["r"] == 4 and said["r"] == 8
    assert "r" not in said.but({"r": None})
    with pytest.raises(InvalidInput, match="write part numbers"):
        Settings({"target_slices": "q"})


def test_names_are_those_of_the_options() -> None:
    assert set(NAMES) == set(SETTINGS) | set(OPTIONS)
    for key, option in OPTIONS.items():
        for flag in option.flags:
            assert key_of(flag.partition("/")[0]) == key


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("optimizer", "paged_adamw_8bit", "paged-adamw-8bit"),
        ("gradient_checkpointing", True, "full"),
        ("gradient_checkpointing", False, "none"),
        ("gradient_checkpointing", "unsloth", "offload"),
        ("base_dtype", "bfloat16", "bf16"),
        ("attention", "flash_attention_2", "flash2"),
        ("micro_batch_size", "4", 4),
        ("lora_alpha", 16, 16.0),
        ("double_quant", "yes", True),
        ("target_modules", ["q_proj", "v_proj"], "q_proj,v_proj"),
    ],
)
def test_values_are_read_as_the_command_reads_them(key: str, written: object, value: object) -> None:
    assert value_of(key, written) == value


# --- requests -----------------------------------------------------------------------------------------------------


def test_a_request_is_typed_frozen_and_by_keyword() -> None:
    request = Request(model=SMALL)
    with pytest.raises(AttributeError):
        request.model = "other"  # type: ignore[misc]
    with pytest.raises(TypeError, match="has no field batch"):
        Request(batch=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Request(SMALL)  # type: ignore[misc]


def test_resolving_changes_nothing_of_the_request(config: str) -> None:
    said = Settings({"r": 4, "stack": "trl"})
    request = Request(model=SMALL, settings=said, job=Files((config,)), gpu="t4")
    before = repr(request)
    first, second = resolve(request), resolve(request)
    assert repr(request) == before
    assert first.training == second.training and first.notes == second.notes
    assert first.training.lora is not None and first.training.lora.r == 4
    assert first.training.micro_batch_size == 3  # the config's


def test_a_config_names_the_model_and_is_told_once(config: str) -> None:
    told: list[str] = []
    plan = resolve(Request(job=Files((config,))), Known(tell=told.append))
    assert plan.config.model_id == SMALL
    assert len(told) == 1 and "axolotl" in told[0]
    with pytest.raises(InvalidInput, match="no model"):
        resolve(Request())


def test_a_config_of_a_model_is_a_model() -> None:
    named, given = (
        resolve(Request(model=SMALL)),
        resolve(Request(model=dict(resolve(Request(model=SMALL)).config.config))),
    )
    assert given.spec.num_parameters == named.spec.num_parameters
    assert given.config.origin == "the config given"


def test_the_margin_and_the_remarks_reach_the_answer() -> None:
    answer = ask(Request(model=SMALL, gpu="t4", margin="10%", remarks=("nothing is known of the moon",)))
    gpu = answer.prediction.gpu
    assert gpu is not None and answer.margin_bytes == gpu.memory_bytes // 10
    assert "nothing is known of the moon" in answer.prediction.warnings


def test_cost_is_part_of_the_request() -> None:
    answer = ask(Request(model=SMALL, gpu="t4", cost=Cost(tokens="1M", price=2.0)))
    assert answer.run is not None and answer.run.usd is not None
    assert answer.run.usd.expected == pytest.approx(2.0 * answer.run.hours.expected)


# --- every command ------------------------------------------------------------------------------------------------

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("fits", SMALL, "--gpu", "t4"),
    ("fits", "CONFIG", "--gpu", "t4"),
    ("fits", "CONFIG", "CONFIG", "--gpu", "t4"),
    ("compare", "--model", SMALL, "--gpu", "t4", "r=4", "r=8"),
    ("lint", "CONFIG"),
    ("lora", SMALL),
    ("lora", SMALL, "--lab", "5.2"),
    ("simulate", SMALL, "--gpu", "t4", "--rows", "10"),
    ("export", "peft", SMALL),
)
NUMPY: tuple[tuple[str, ...], ...] = (
    ("table", SMALL, "--gpu", "t4"),
    ("max", SMALL, "--gpu", "t4", "--up-to", "4"),
    ("pick", SMALL, "--gpu", "t4"),
    ("validate", "--where", "gpu=t4"),
)


class Resolved(Exception):
    """Stops a command where it resolves its request."""


@pytest.mark.parametrize(
    "words", [*COMMANDS, *(pytest.param(words, marks=pytest.mark.extra) for words in NUMPY)], ids=" ".join
)
def test_every_command_resolves_a_request(
    run: Callable[..., Any], config: str, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    seen: list[Request] = []
    real = requests.resolve

    def resolve_seen(request: Request, shared: Known | None = None) -> Any:
        seen.append(request)
        return real(request, shared)

    patched(monkeypatch, real, resolve_seen)
    run(*(config if word == "CONFIG" else word for word in words))
    assert seen and all(isinstance(request, Request) for request in seen)


@pytest.mark.oracle
def test_a_trace_resolves_a_request(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(request: Request, shared: Known | None = None) -> Any:
        assert request.tracing is not None
        raise InvalidInput("resolved")

    patched(monkeypatch, requests.resolve, stopped)
    assert "resolved" in run("trace", SMALL).err
    assert "resolved" in run("fits", SMALL, "--via", "trace").err


def patched(monkeypatch: pytest.MonkeyPatch, real: object, other: object) -> None:
    """Put another function in the place of `resolve`, wherever a module holds it already or will take it from."""
    import importlib
    import sys

    for name in ("answering", "table", "compared", "checks", "limits", "published"):
        try:
            importlib.import_module(f"planner.plan.{name}")
        except ImportError:  # numpy is an extra
            continue
    for name, module in list(sys.modules.items()):
        if name.startswith("planner.") and getattr(module, "resolve", None) is real:
            monkeypatch.setattr(module, "resolve", other)


# --- the house ----------------------------------------------------------------------------------------------------

CLI = sorted((ROOT / "planner/cli").glob("*.py"))
PLAN = sorted((ROOT / "planner/plan").glob("*.py"))

BELOW = ("planner.base", "planner.plan", "planner.report", "planner.exporters", "planner.facts", "planner.course")
"""Rooms that a command may call."""

READS = {
    "planner.importers": "the type of a job that was read",
    "planner.training": "the option table",
    "planner.model": "the catalogue's listing",
    "planner.device": "the catalogue's listing",
    "planner.runs": "rows of data and the catalogue's listing",
    "planner.timing": "the type of a calibration",
}
"""Other rooms, and what a command reads of them."""

LINES = 40


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def lines_of(function: ast.FunctionDef) -> int:
    """Lines of code, without decorators, signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", CLI, ids=lambda path: path.stem)
def test_a_command_is_words_in_one_call_and_an_exit_code(path: Path) -> None:
    allowed = [*BELOW, *READS, "planner.cli", "calibrate", "planner"]
    if path.stem == "catalogue":  # names the mixers of a model's layers by their rows
        allowed.append("planner.step")
    listed = path.stem in ("catalogue", "calibrate")  # these print tables of their own, of no run
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("planner", "calibrate"):
            room = ".".join(str(node.module).split(".")[:2])
            assert room in allowed or room.startswith("calibrate"), f"{path.name} imports {node.module}"
            assert listed or node.module not in ENGINE, f"{path.name} imports {node.module}"
    long = {function.name: lines_of(function) for function in functions(path) if lines_of(function) > LINES}
    assert not {name: n for name, n in long.items() if (path.stem, name) != ("catalogue", "")}, long


ENGINE = (
    "planner.plan.predict", "planner.plan.sweep", "planner.plan.largest", "planner.plan.search", "planner.plan.lint",
    "planner.plan.money", "planner.plan.curves", "planner.plan.configure", "planner.plan.settled",
)  # fmt: skip
"""What a command must not call by itself: the plan's answers do."""


@pytest.mark.parametrize("path", PLAN, ids=lambda path: path.stem)
def test_no_dictionary_of_settings_travels_through_the_plan(path: Path) -> None:
    for function in functions(path):
        arguments = (*function.args.args, *function.args.kwonlyargs, *function.args.posonlyargs)
        for argument in arguments:
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            assert not kind.startswith("dict[str, Any]"), f"{path.name} {function.name} {argument.arg}: {kind}"
        assert ast.unparse(function.returns or ast.Constant(None)) != "dict[str, Any]" or path.stem not in PURE, path


PURE = (
    "request",
    "given",
    "configure",
    "jobs",
    "answering",
    "saying",
    "values",
    "limits",
    "compared",
    "checks",
    "table_",
)
"""Modules that make no document of plain values either."""
