"""The one verdict rule: worked out by hand at its edges, for numbers and arrays, and used by everything that judges."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from planner.device.hardware import Gpu
from planner.facts import sources
from planner.facts.measurements import COLUMNS
from planner.memory import walk
from planner.model.families import build_spec
from planner.model.spec import ModelSpec
from planner.plan import intervals, largest, predict, search, sweep, validation, verdict
from planner.plan.verdict import CLOSE, FITS, NO, VERDICTS
from planner.report import config_checks, grid
from planner.step import architecture, program
from planner.training import stacks
from planner.training.spec import TrainingSpec

PLANNER = Path(verdict.__file__).parent


class Live(NamedTuple):
    low: Any
    expected: Any
    high: Any


LIVE = Live(90, 100, 110)
CASES = [
    # rooms beside a small, an expected and a large context; whether the allocator failed; the answer
    ((200, 190, 180), False, FITS),
    ((130, 120, 110), False, FITS),  # the upper end just goes in beside a large context
    ((129, 119, 109), False, CLOSE),  # a byte less, and it may not
    ((130, 120, 110), True, CLOSE),  # live memory goes in, the allocator does not find it whole
    ((110, 100, 90), True, CLOSE),  # the expected bytes just go in
    ((109, 99, 89), True, NO),  # they do not, and the allocator failed
    ((109, 99, 89), False, CLOSE),  # they do not, yet the allocator managed: only the lower end refuses
    ((99, 95, 91), False, CLOSE),  # expected above the small context's room: the lower end still goes in
    ((90, 80, 70), False, CLOSE),  # the lower end just goes in beside a small context
    ((89, 79, 69), False, NO),  # a byte less, and it cannot
    ((89, 79, 69), True, NO),
]


@pytest.mark.parametrize(("rooms", "failed", "answer"), CASES)
def test_the_rule_at_its_edges(rooms: tuple[int, int, int], failed: bool, answer: str) -> None:
    assert verdict.verdict_of(LIVE, rooms, failed) == answer


@pytest.mark.extra
def test_arrays_are_judged_as_numbers_are() -> None:
    np = pytest.importorskip("numpy")
    columns = [np.array(column) for column in zip(*(rooms for rooms, _, _ in CASES), strict=True)]
    live = Live(*(np.full(len(CASES), value) for value in LIVE))
    numbers = verdict.judge(live, (columns[0], columns[1], columns[2]), np.array([failed for _, failed, _ in CASES]))
    assert [VERDICTS[number] for number in numbers] == [answer for _, _, answer in CASES]


def test_the_words_are_one_vocabulary() -> None:
    assert VERDICTS == ("fits", "too close to call", "does not fit")
    assert set(verdict.ANSWERS) == {*VERDICTS, None}
    assert set(grid.MARKS) == {NO, CLOSE}
    assert [word for word, _ in config_checks.COUNTED] == [FITS, NO, CLOSE, None]
    assert largest.allowed_verdicts(0.95) == (FITS,)
    assert largest.allowed_verdicts(0.5) == (FITS, CLOSE)


def test_no_other_module_spells_the_words() -> None:
    """Whoever judges by rules of its own has to spell a verdict; everybody else takes the words from their home."""
    found = [
        f"{path.relative_to(PLANNER)}:{node.lineno}"
        for path in sorted(PLANNER.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in (NO, CLOSE)
    ]
    assert found
    assert {where.partition(":")[0] for where in found} == {"verdict.py"}


def test_only_one_function_makes_a_verdict_of_numbers() -> None:
    found = [
        f"{path.stem}.{node.name}"
        for path in sorted(PLANNER.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "Verdict"
    ]
    assert found == ["verdict.verdict_of"]


# --- those who use it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    whole = build_spec(sources.load_config("HuggingFaceTB/SmolLM2-135M").config, model_id="small")
    return replace(whole, layers=whole.layers[:3])


def training() -> TrainingSpec:
    settings = {"micro_batch_size": 8, "seq_len": 1024, "gradient_checkpointing": "full"}
    return stacks.to_training_spec(stacks.resolve("peft-loop", method="lora", given=settings))


def card(nbytes: int, context: tuple[int, int, int] = (0, 0, 0)) -> Gpu:
    return Gpu(gpu_id="card", name="card", memory_bytes=nbytes, memory_basis="user", context_bytes=context)


def test_predict_says_what_the_rule_says(model: ModelSpec) -> None:
    roomy = predict.predict(model, training(), card(2**40))
    need = roomy.allocated
    seen = set()
    for nbytes in (need.low // 2, need.low, need.expected - 1, need.high - 1, need.high, 2 * roomy.reserved.high):
        gpu = card(nbytes)
        found = predict.predict(model, training(), gpu)
        ran_out = found.verdict != FITS and nbytes >= need.high
        expected = verdict.verdict_of(found.allocated, gpu.rooms, nbytes < need.expected or ran_out)
        assert found.verdict == expected, nbytes
        seen.add(found.verdict)
    assert seen == set(VERDICTS)
    assert predict.predict(model, training(), card(need.high - 1)).verdict == CLOSE
    assert predict.predict(model, training(), card(need.expected - 1)).verdict == NO
    assert predict.predict(model, training()).verdict is None


@pytest.mark.extra
def test_a_cell_without_room_for_the_whole_cache_is_too_close(model: ModelSpec) -> None:
    axes = sweep.Axes(micro_batch_size=(8,), seq_len=(1024,), r=(8,), gradient_accumulation_steps=(1,))
    wide = sweep.Sweeper(model, axes).cells(training(), [card(2**40)])
    peak, static = int(wide.allocated_bytes.ravel()[0]), int(wide.static_bytes.ravel()[0])
    surplus = sweep.Surplus(1.0, 2.0, "assumed")  # the cache is as large as what is allocated above the static bytes
    whole = peak + (peak - static)
    for nbytes, answer in ((whole, FITS), (whole - 1, CLOSE), (peak, CLOSE), (peak - 1, NO)):
        cells = sweep.Sweeper(model, axes).cells(training(), [card(nbytes)])
        judged = sweep.judge(model, cells, surplus)
        assert VERDICTS[int(judged.verdict.ravel()[0])] == answer, nbytes - peak


def test_the_search_tries_only_what_fits_beside_a_large_context(model: ModelSpec) -> None:
    run = training()
    context = (2**28, 2**29, 2**30)
    large = card(2**40, context)
    peak = walk.peak_bytes(program.run(model, run, architecture.architecture(large, run)).record)
    high = int(peak * (1 + sum(share for _, share in intervals.uncertainty(model, run))))
    just = card(high + context[2], context)
    assert search._Search(model, just).likely(run)
    for nbytes in (high + context[2] - 1, high + context[1], high + context[0]):
        assert not search._Search(model, card(nbytes, context)).likely(run)
        assert predict.predict(model, run, card(nbytes, context)).verdict != FITS


@pytest.mark.parametrize(
    ("word", "outcome", "counted"),
    [
        (FITS, "ok", "ok_right"), (CLOSE, "ok", "ok_undecided"), (NO, "ok", "ok_wrong"),
        (FITS, "oom", "oom_wrong"), (CLOSE, "oom", "oom_undecided"), (NO, "oom", "oom_right"),
    ],
)  # fmt: skip
def test_validation_scores_the_word_that_is_printed(word: str, outcome: str, counted: str) -> None:
    """The three numbers say the opposite of the word: they are not asked."""
    nbytes = 2**50 if word == FITS else 1
    whole = SimpleNamespace(low=nbytes, expected=nbytes, high=nbytes)
    answer: Any = SimpleNamespace(allocated=whole, reserved=whole, device=whole, verdict=word, warnings=())
    row = dict.fromkeys(COLUMNS, "")
    row |= {"id": "1", "source": "x", "model": "m", "method": "lora", "outcome": outcome, "gpu": "t4", "seq_len": "8"}
    report = validation.score([row], lambda *_: answer)
    assert report.verdicts == {**dict.fromkeys(validation.VERDICT_COUNTS, 0), counted: 1}
    assert report.judged()[counted.partition("_")[2]] == 1
