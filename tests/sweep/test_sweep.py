"""A sweep is the scalar path, cell by cell: bytes exactly, seconds to 1e-9, and verdicts that never promise more."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from planner.base.errors import InvalidInput
from planner.base.polynomials import Grid, Mixed
from planner.device import cuda_rules
from planner.device.hardware import Gpu
from planner.facts import catalog, sources
from planner.memory import walk
from planner.model import families
from planner.model.spec import ModelSpec
from planner.plan import predict, sweep
from planner.plan.verdict import VERDICTS
from planner.step import architecture, program
from planner.training import stacks
from planner.training.spec import TrainingSpec

pytestmark = pytest.mark.extra

AXES = sweep.Axes(
    micro_batch_size=(1, 3, 16), seq_len=(3, 500, 1100, 5000), r=(1, 16, 200), gradient_accumulation_steps=(1, 2, 9)
)
CARDS = ("t4", "a100-sxm4-80gb", "h100-sxm5-80gb", "mi300x")
CASES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("meta-llama/Llama-3.1-8B", "custom", "qlora", {}),
    ("google/gemma-2-9b", "trl", "lora", {"gradient_checkpointing": "none", "loss": "fused"}),
    ("mistralai/Mixtral-8x7B-v0.1", "custom", "qlora", {"optimizer": "paged-adamw-8bit"}),
    ("mistralai/Mistral-7B-v0.1", "custom", "lora", {"padded": True}),
    ("Qwen/Qwen2.5-1.5B", "torchtune", "full", {"loss": "chunked", "optimizer": "adafactor"}),
    ("microsoft/phi-2", "custom", "qlora", {"compile": True, "kernels": "unsloth"}),
    ("meta-llama/Llama-3.2-1B", "custom", "dora", {"quantization": "int8", "attention": "eager"}),
)


@cache
def model_of(name: str) -> ModelSpec:
    return families.build_spec(sources.load_config(name).config, model_id=name)


def training_of(stack: str, method: str, given: dict[str, Any]) -> TrainingSpec:
    return stacks.to_training_spec(stacks.resolve(stack, method=method, given=given))


def cards_of(names: tuple[str, ...] = CARDS) -> list[Gpu]:
    return [catalog.gpu(name) for name in names]


def places(shape: tuple[int, ...], count: int, seed: int) -> list[tuple[int, ...]]:
    drawn = random.Random(seed)
    return [tuple(drawn.randrange(size) for size in shape) for _ in range(count)]


@pytest.mark.parametrize(("name", "stack", "method", "given"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_cells_are_what_the_scalar_path_says(name: str, stack: str, method: str, given: dict[str, Any]) -> None:
    model, cards = model_of(name), cards_of()
    cells = sweep.Sweeper(model, AXES).cells(training_of(stack, method, given), cards)
    for place in places(cells.allocated_bytes.shape, 12, seed=len(name)):
        card, training = cards[place[0]], sweep.at(cells, place[1:])
        run = program.run(model, training, architecture.architecture(card, training)).record
        found = walk.breakdown(run)
        assert cells.allocated_bytes[place] == found.peak_allocated_bytes, (card.gpu_id, training)
        assert cells.static_bytes[place] == found.static_bytes
        time = predict._time(run, training, card, None)
        if time is None:
            assert np.isnan(cells.step_s[place])
            continue
        seconds, spread = cells.step_s[place], cells.step_spread[place]
        assert seconds == pytest.approx(time.step_s.expected, rel=1e-9)
        assert seconds * (1 + spread) == pytest.approx(time.step_s.high, rel=1e-9)
        assert seconds / (1 + spread) == pytest.approx(time.step_s.low, rel=1e-9)


def test_every_choice_on_one_grid_shares_prices() -> None:
    sweeper = sweep.Sweeper(model_of("meta-llama/Llama-3.1-8B"), AXES)
    card = catalog.gpu("a100-sxm4-80gb")
    sweeper.cells(training_of("custom", "lora", {}), [card])
    (clock,) = sweeper.clocks.values()
    before = len(clock.known)
    sweeper.cells(training_of("custom", "lora", {"gradient_checkpointing": "none"}), [card])
    assert before == len(clock.known) > 15


def test_cards_of_one_class_run_the_same_program() -> None:
    """`program_class` names all that the program reads of a capability: checked on every card of the catalogue."""
    model = model_of("Qwen/Qwen2.5-1.5B")
    for method, few_rows, classes in (("lora", False, 3), ("qlora", True, 6)):
        training = training_of("custom", method, {})
        if few_rows:  # where the cards' fused 4-bit kernels differ
            training = replace(training, micro_batch_size=1, seq_len=12, gradient_checkpointing="none")
        found: dict[Any, set[tuple[int, int]]] = {}
        for card in catalog.gpus():
            arch = architecture.architecture(card, training)
            run = program.run(model, training, arch)
            seen = (walk.peak_bytes(run.record) - cuda_rules.blas_bytes(arch), len(run.record.kernels))
            found.setdefault(cuda_rules.program_class(arch, four_bit=method == "qlora"), set()).add(seen)
        assert all(len(seen) == 1 for seen in found.values()), method
        assert len(found) == classes


def test_verdicts_never_promise_more_than_predict() -> None:
    """Cells around the capacity: "does not fit" is predict's, "fits" is never where predict says it does not."""
    model = model_of("Qwen/Qwen2.5-1.5B")
    axes = sweep.Axes(micro_batch_size=(1, 2, 4, 8), seq_len=(1024, 2048, 4096), r=(8,))
    seen = set()
    for given in ({}, {"gradient_checkpointing": "none"}):
        training = training_of("custom", "qlora", given)
        cells = sweep.Sweeper(model, axes).cells(training, cards_of(("rtx-3060-12gb", "rtx-4090")))
        judged = sweep.judge(model, cells, sweep.replayed_surplus(model, cells))
        for number, card in enumerate(cells.cards):
            near = np.argsort(abs(cells.allocated_bytes[number].ravel() / card.free_bytes - 1))[:4]
            for index in near:
                place = tuple(int(i) for i in np.unravel_index(index, axes.shape))
                found = predict.predict(model, sweep.at(cells, place), card)
                verdict = VERDICTS[judged.verdict[(number, *place)]]
                seen.add((verdict, found.verdict))
                assert judged.device_low_bytes[(number, *place)] <= found.device.expected
                if verdict != "too close to call":
                    assert (verdict == "does not fit") == (found.verdict == "does not fit"), (card.gpu_id, place)
    assert {verdict for verdict, _ in seen} >= {"fits", "does not fit"}


def test_a_condition_that_cells_disagree_on_parts_them() -> None:
    grid = Grid([1, 2, 3], [10, 10, 10], [4, 8])
    with pytest.raises(Mixed) as parted:
        bool(grid.batch * 10 > 15)
    assert parted.value.holds.tolist() == [[False], [True], [True]]
    grid.activate(np.array([1, 2]), np.array([0, 1]))
    assert grid.batch * 10 > 15
    assert grid.length == 10  # a constant axis is a number
    assert (grid.batch * 4 + grid.batch * 4) // 8 is grid.batch
    rounded = -(-(grid.batch * 100) // 64) * 64
    assert rounded.value.ravel().tolist() == [128, 256, 320]
    assert (grid.batch * 5).next_power_of_two().value.ravel().tolist() == [8, 16, 16]


def test_absurd_sizes_are_refused_not_wrong() -> None:
    axes = sweep.Axes(micro_batch_size=(1, 2**20), seq_len=(2**20, 2**27))
    training = training_of("custom", "lora", {"attention": "eager"})
    with pytest.raises(InvalidInput, match="passes 2"):
        sweep.Sweeper(model_of("meta-llama/Llama-3.1-8B"), axes).cells(training, cards_of(("t4",)))
    with pytest.raises(InvalidInput, match="axis r"):
        sweep.Axes(r=(0,))
    with pytest.raises(InvalidInput, match="cells at once"):
        sweep.Sweeper(model_of("microsoft/phi-2"), replace(AXES, seq_len=tuple(range(1, 200_000))))
