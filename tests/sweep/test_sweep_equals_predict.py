"""A swept cell is the cell that `predict` computes: bytes to the byte, seconds to 1e-9, for every row of every table.

Each row of the program's own registries (stacks and methods, losses, kernels, optimizers, quantizations, model classes,
releases that its source compares with, ...) is held fixed once while everything else is drawn; a new row is drawn too.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pytest

from planner.base.errors import PlannerError
from planner.base.polynomials import Grid, Mixed, next_power_of_two, value_of
from planner.device import processor
from planner.device.hardware import Gpu
from planner.facts import catalog, sources
from planner.memory import walk
from planner.model import families
from planner.model.spec import ModelSpec
from planner.plan import predict, sweep
from planner.step import architecture, program
from planner.training import releases, stacks, versions
from planner.training.choices import CHOICES
from planner.training.spec import TrainingSpec, Versions

pytestmark = pytest.mark.extra

PLANNER = Path(program.__file__).parent.parent
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 500, 512, 1000, 1001, 1024, 1537, 4096)
BATCHES = (1, 2, 3, 5, 8, 16)
RANKS = (1, 2, 7, 8, 16, 64, 200)
DRAWS = 400
"""Attempts to find settings that go with a row."""
CELLS = 5
"""Cells of each drawn sweep that are computed by themselves."""


# --- the rows --------------------------------------------------------------------------------------------------------


def releases_named() -> list[tuple[str, tuple[int, int]]]:
    """Every release that the source of the step compares with, and the one before it, by library."""
    dates = releases.release_dates()
    paths = [path for room in ("step", "device", "model", "training") for path in (PLANNER / room).rglob("*.py")]
    pairs = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = [part.value for part in node.elts if isinstance(part, ast.Constant)] if _is_tuple(node) else []
            numbers = [part for part in parts if type(part) is int]
            if len(parts) == len(numbers) == 2:
                pairs.add((numbers[0], numbers[1]))
    found = set()
    for library in (item.name for item in fields(Versions)):
        known = sorted(dates[library])
        for pair in pairs:
            if pair not in known and not (pair[0] == known[-1][0] and 0 < pair[1] - known[-1][1] <= 3):
                continue
            before = [release for release in known if release < pair]
            found |= {(library, release) for release in [*before[-1:], pair]}
    return sorted(found)


def _is_tuple(node: ast.AST) -> TypeGuard[ast.Tuple]:
    return isinstance(node, ast.Tuple) and len(node.elts) == 2


@cache
def models() -> dict[str, ModelSpec]:
    """One model of the catalogue for each class, cut to its first layers and one of each kind."""
    found: dict[str, ModelSpec] = {}
    for name in catalog.model_ids():
        try:
            model = families.build_spec(sources.load_config(name).config, model_id=name)
        except PlannerError:
            continue
        kinds = {id(layer): layer for layer in model.layers[2:]}
        found.setdefault(model.model_type, replace(model, layers=(*model.layers[:2], *kinds.values())))
    return found


@cache
def cards() -> list[Gpu]:
    """The catalogue, and CPUs that differ in their products."""
    plain, wide = (processor.as_gpu({**processor.facts(), "vector": vector}) for vector in ("avx2", "avx512f"))
    return [*catalog.gpus(), replace(plain, gpu_id="cpu-avx2"), replace(wide, gpu_id="cpu-avx512")]


KEY_OF = {"dtype": "base_dtype", "checkpointing": "gradient_checkpointing", "own modules": "own_modules"}
"""Where a setting is called otherwise than its row in CHOICES."""


def rows() -> Iterator[tuple[str, Any]]:
    """(what, value) of every row that is held fixed once."""
    yield from (("stack", name) for name in stacks.STACKS)
    for what, values in CHOICES.items():
        yield from ((KEY_OF.get(what, what), value) for value in values)
    yield from (("autocast", value) for value in ("none", "bf16", "fp16"))
    yield from (("flag", (name, value)) for name in FLAGS for value in (True, False))
    yield from (("model", kind) for kind in sorted(models()))
    yield from (("versions", release) for release in releases_named())


FLAGS = tuple(
    item.name for item in fields(TrainingSpec) if item.default in (True, False) and type(item.default) is bool
)


# --- drawing ---------------------------------------------------------------------------------------------------------


def drawn(rng: random.Random, what: str, value: Any) -> tuple[ModelSpec, TrainingSpec]:
    """A model and settings with that row.

    Raises:
        PlannerError: they exclude each other.
    """
    stack = rng.choice(sorted(stacks.STACKS))
    method = rng.choice(CHOICES["method"])
    model = rng.choice(sorted(models()))
    given: dict[str, Any] = {}
    for key, values in CHOICES.items():
        if key not in ("method", "dtype", "quantization", "own modules") and rng.random() < 0.3:
            given[KEY_OF.get(key, key)] = rng.choice(values)
    if method == "qlora" and rng.random() < 0.5:
        given["quantization"] = rng.choice(CHOICES["quantization"])
    if rng.random() < 0.3:
        given |= {"autocast": rng.choice(("none", "bf16", "fp16")), "base_dtype": rng.choice(CHOICES["dtype"])}
    if rng.random() < 0.3:
        given["lora_dropout"] = 0.1
    for name in FLAGS:
        if rng.random() < 0.1:
            given[name] = rng.choice((True, False))
    if rng.random() < 0.3:
        given["versions"] = versions_of(*rng.choice(releases_named()))
    if what == "stack":
        stack = value
    elif what == "method":
        method = value
    elif what == "model":
        model = value
    elif what == "versions":
        given["versions"] = versions_of(*value)
    elif what == "flag":
        given[value[0]] = value[1]
    else:
        given[what] = value
    return models()[model], stacks.to_training_spec(stacks.resolve(stack, method=method, given=given))


def versions_of(library: str, release: tuple[int, int]) -> Versions:
    """The release, and those of the other libraries that were current with it."""
    return versions.parse_versions({library: ".".join(map(str, release))})


def some(rng: random.Random, values: tuple[int, ...], number: int) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(values, number)))


def axes_of(rng: random.Random, model: ModelSpec) -> sweep.Axes:
    """A few of each number; lengths around the model's window too."""
    lengths = some(rng, LENGTHS, 4)
    window = next((attention.sliding_window for attention in model.attentions() if attention.sliding_window), 0)
    if window:
        lengths = tuple(sorted({*lengths, window - 1, window, window + 1}))
    return sweep.Axes(
        micro_batch_size=some(rng, BATCHES, 2),
        seq_len=lengths,
        r=some(rng, RANKS, 2),
        gradient_accumulation_steps=(1, rng.choice((2, 8))),
    )


def assert_equal(model: ModelSpec, cells: sweep.Cells, place: tuple[int, ...]) -> None:
    """One cell against the program and the clock of `predict`."""
    card, training = cells.cards[place[0]], sweep.at(cells, place[1:])
    run = program.run(model, training, architecture.architecture(card, training)).record
    found = walk.breakdown(run)
    label = f"{model.model_id} on {card.gpu_id}: {training}"
    assert cells.allocated_bytes[place] == found.peak_allocated_bytes, label
    assert cells.static_bytes[place] == found.static_bytes, label
    time = predict._time(run, training, card, None)
    if time is None:
        assert np.isnan(cells.step_s[place]), label
        return
    assert cells.step_s[place] == pytest.approx(time.step_s.expected, rel=1e-9), label
    high = cells.step_s[place] * (1 + cells.step_spread[place])
    assert high == pytest.approx(time.step_s.high, rel=1e-9), label


@pytest.mark.parametrize(("what", "value"), list(rows()), ids=str)
def test_a_row_of_every_table(what: str, value: Any) -> None:
    rng = random.Random(f"{what} {value}")
    for _ in range(DRAWS):
        try:
            model, training = drawn(rng, what, value)
            axes = axes_of(rng, model)
            cells = sweep.Sweeper(model, axes).cells(training, rng.sample(cards(), 2))
        except PlannerError:
            continue
        break
    else:
        pytest.fail(f"no settings go with {what} {value}")
    shape = cells.allocated_bytes.shape
    for _ in range(CELLS):
        assert_equal(model, cells, tuple(rng.randrange(size) for size in shape))


def test_releases_are_read_from_the_source() -> None:
    found = releases_named()
    assert {library for library, _ in found} >= {"torch", "transformers", "bitsandbytes"}
    assert {("transformers", (4, 48)), ("transformers", (4, 47)), ("bitsandbytes", (0, 43))} <= set(found)


# --- where the program once asked whether a sweep runs it ------------------------------------------------------------


def whole(name: str) -> ModelSpec:
    return families.build_spec(sources.load_config(name).config, model_id=name)


LLAMA = "meta-llama/Llama-3.1-8B"
SEPTEMBER_2024 = versions.parse_versions({"transformers": "4.45"})
UNFUSED = {"gradient_checkpointing": "none", "loss": "fused"}
ONCE: tuple[tuple[str, str, str, dict[str, Any], dict[str, Any], str], ...] = (
    (LLAMA, "litgpt", "lora", {}, {"micro_batch_size": (1, 2), "seq_len": (1024, 4096)}, "as many chunks as torchtune"),
    (LLAMA, "litgpt", "lora", {}, {"seq_len": (1000, 2048)}, "a last chunk that is not whole"),
    ("meta-llama/Llama-3.2-1B", "litgpt", "full", {}, {"micro_batch_size": (1, 3), "seq_len": (1000, 1025)}, "chunks"),
    (LLAMA, "hf-trainer", "lora", {"versions": SEPTEMBER_2024}, {"micro_batch_size": (1, 2)}, "one row copied"),
    ("Qwen/Qwen-7B", "custom", "lora", UNFUSED, {"seq_len": (1001, 1024)}, "a mask that is not padded"),
    (LLAMA, "custom", "lora", {"kernels": "liger"}, {"micro_batch_size": (1, 2), "seq_len": (1, 2)}, "a row of one"),
    ("microsoft/phi-2", "custom", "lora", {}, {"seq_len": (100, 200)}, "partly turned heads"),
    (LLAMA, "custom", "lora", {"optimizer": "adafactor"}, {"r": (8, 16)}, "factors"),
)  # fmt: skip
"""Model, stack, method, settings, axes, and what was at stake: a sweep took its own way there."""


@pytest.mark.parametrize(("name", "stack", "method", "given", "axes", "why"), ONCE, ids=[one[-1] for one in ONCE])
def test_no_cell_has_a_way_of_its_own(
    name: str, stack: str, method: str, given: dict[str, Any], axes: dict[str, tuple[int, ...]], why: str
) -> None:
    training = stacks.to_training_spec(stacks.resolve(stack, method=method, given=given))
    own = {key: (sweep.number_of(training, key),) for key in sweep.NUMBERS}
    cells = sweep.Sweeper(whole(name), sweep.Axes(**own | axes)).cells(
        training, [catalog.gpu("h100"), catalog.gpu("t4")]
    )
    for place in np.ndindex(cells.allocated_bytes.shape):
        assert_equal(whole(name), cells, place)


def test_cells_that_differ_part_into_blocks_that_agree() -> None:
    """Whichever axes a condition or a count depends on; also of a single rank, none comes back as it was."""
    grid = Grid([1, 2, 3], [10, 10, 10], [4, 8])
    pairs, ranks = np.arange(3), np.arange(2)
    both: Any = grid.batch * grid.rank
    batch: Any = grid.batch
    asked: tuple[tuple[Callable[[], int], Any], ...] = (
        (lambda: len(range(both)), ranks), (lambda: len(range(both)), ranks[1:]), (lambda: both > 8, ranks),
        (lambda: both > 8, ranks[1:]), (lambda: len(range(batch)), ranks), (lambda: grid.rank > 4, ranks),
    )  # fmt: skip
    for number, (ask, active) in enumerate(asked):
        grid.activate(pairs, active)
        with pytest.raises(Mixed) as parted:
            ask()
        seen = np.zeros((3, 2), dtype=int)
        wanted = np.broadcast_to(parted.value.holds, (3, 2))
        for some_pairs, some_ranks in sweep._parted(parted.value.holds, pairs, active):
            grid.activate(some_pairs, some_ranks)
            block = np.ix_(some_pairs, some_ranks)
            seen[block] += 1
            assert (wanted[block] == ask()).all(), number
        assert (seen[:, active] == 1).all() and seen.sum() == 3 * len(active), number


def test_the_program_never_asks_whether_a_size_is_a_number() -> None:
    """What it did with the answer was a way of its own for sweeps; `planner.base.polynomials` is where both meet."""
    asking = [
        f"{path.name}:{node.lineno}"
        for path in (PLANNER / "step").glob("*.py")
        if path.name != "polynomials.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type")
        and {"int", "float", "Polynomial"} & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    ]  # fmt: skip
    assert not asking


def test_numbers_and_polynomials_round_alike() -> None:
    lengths = list(range(1, 600))
    grid = Grid([1] * len(lengths), lengths, [8])
    rules: tuple[Callable[[Any], Any], ...] = (
        lambda n: n % 16,
        lambda n: next_power_of_two(n - 1),
        lambda n: n / 7,
        lambda n: -(-(n - 1) // 128) * 128,
        lambda n: (3 * n) // (n + 5),
    )
    for rule in rules:
        assert value_of(rule(grid.length)).ravel().tolist() == [rule(n) for n in lengths]


# --- everything that a replay shows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", CHOICES["dtype"])
def test_cpus_with_different_products_are_priced_apart(base_dtype: str) -> None:
    given = {"autocast": "none", "base_dtype": base_dtype}
    training = stacks.to_training_spec(stacks.resolve("custom", method="lora", given=given))
    model = models()["llama"]
    cells = sweep.Sweeper(model, sweep.Axes(seq_len=(17, 64))).cells(training, cards()[-2:])
    for place in np.ndindex(cells.allocated_bytes.shape):
        assert_equal(model, cells, place)
    assert (cells.step_s[0] != cells.step_s[1]).all() == (base_dtype != "fp32")


def test_a_small_result_is_predict_in_everything() -> None:
    """`sweep` of few cells: allocated with unsplit blocks, reserved, device, verdict and seconds."""
    training = stacks.to_training_spec(stacks.resolve("custom", method="qlora", given={}))
    model, cards_ = whole("Qwen/Qwen2.5-1.5B"), [catalog.gpu("rtx-3060-12gb"), catalog.gpu("l4")]
    axes = {"micro_batch_size": (1, 5), "seq_len": (60, 2048), "gradient_checkpointing": ("none", "full")}
    found = sweep.sweep(model, training, cards_, axes)
    unsplit, verdicts = 0, set()
    for cells, judged in zip(found.cells, found.judged, strict=True):
        for place in np.ndindex(cells.allocated_bytes.shape):
            one = predict.predict(model, sweep.at(cells, place[1:]), cells.cards[place[0]])
            unsplit += dict(one.breakdown.ledger).get("unsplit blocks", 0)
            verdicts.add(one.verdict)
            assert one.step_s is not None
            assert cells.allocated_bytes[place] == one.allocated.expected
            assert judged.reserved_bytes[place] == one.reserved.expected
            assert judged.device_low_bytes[place] == one.device.low
            assert judged.device_bytes[place] == one.device.expected
            assert judged.device_high_bytes[place] == one.device.high
            assert judged.headroom_bytes[place] == one.headroom_bytes
            assert cells.step_s[place] == pytest.approx(one.step_s.expected, rel=1e-9)
    columns = found.columns()
    assert set(columns["verdict"]) == verdicts and len(verdicts) > 1
    assert unsplit > 0 and len(columns["verdict"]) == 16


def test_the_replayed_cell_of_a_large_result_is_predict_s() -> None:
    """The surplus is taken over live memory, as `judge` adds it: unsplit blocks are counted once, as cache."""
    model = whole("Qwen/Qwen2.5-1.5B")
    training = stacks.to_training_spec(stacks.resolve("custom", method="qlora", given={}))
    card = catalog.gpu("h100")
    cells = sweep.Sweeper(model, sweep.Axes(seq_len=(60,))).cells(training, [card])
    judged = sweep.judge(model, cells, sweep.replayed_surplus(model, cells))
    found = predict.predict(model, sweep.at(cells, (0, 0, 0, 0)), card)
    assert dict(found.breakdown.ledger)["unsplit blocks"] > 0
    assert judged.reserved_bytes.item() == pytest.approx(found.reserved.expected, abs=1)
