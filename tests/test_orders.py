"""Micro batches of unequal length: which of them let the allocator's cache grow, and by how much."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from planner import allocator, catalog, cuda_rules
from planner.dataset.batches import Batching, epoch
from planner.dataset.lengths import Lengths
from planner.dataset.orders import TYPICAL, Orders, drawn, growing, orders
from planner.families import build_spec
from planner.predict import predict
from planner.step import program, sequence
from planner.step.engine import Record
from planner.training import LoraSpec, TrainingSpec

LAYERS = 3
MODEL = build_spec(
    {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    model_id="test",
)  # fmt: skip
LORA = TrainingSpec(method="lora", lora=LoraSpec(r=8), seq_len=4096)
ROWS = drawn(1200.0, 900.0, 64, rows=400).clipped(4096)
BATCHING = Batching(batch=1, limit=4096, padding="longest")


class Programs:
    """Programs of one model by length."""

    def __init__(self, training: TrainingSpec) -> None:
        self.training = training
        self.known: dict[tuple[int, bool], Record] = {}

    def __call__(self, length: int, held: bool) -> Record:
        key = (length, held)
        if key not in self.known:
            one = replace(self.training, seq_len=length, gradient_accumulation_steps=1 + held)
            self.known[key] = program.run(MODEL, one, cuda_rules.Architecture()).record
        return self.known[key]


def reserved(order: Sequence[tuple[int, int]], accumulation: int = 1, programs: Programs | None = None) -> int:
    """Peak of the large pool."""
    events = sequence.unequal(order, accumulation, programs or Programs(LORA), allocator.SMALL_SIZE)
    return allocator.replay(events).peak_reserved


@pytest.mark.parametrize("batch", [1, 4])
def test_an_order_grows_to_the_longest(batch: int) -> None:
    for distance in (TYPICAL, 0.25):
        order = growing(ROWS, batch, distance)
        assert [length for _, length in order] == sorted({length for _, length in order})
        assert [number for number, _ in order] == sorted({number for number, _ in order})
        assert order[0][0] == 0
        assert order[-1][1] == ROWS.longest


def test_the_typical_order_is_that_of_shuffled_epochs() -> None:
    """As many growing micro batches, and the first three as long, as in the median of 400 shuffles."""
    rows = drawn(1200.0, 900.0, 1, rows=2000)
    rng = random.Random(7)
    found: list[list[int]] = []
    for _ in range(400):
        kept: list[int] = []
        for _, length, _ in epoch(rows, Batching(batch=2, limit=10**6, padding="longest"), rng):
            if not kept or length > kept[-1]:
                kept.append(length)
        found.append(kept)
    order = [length for _, length in growing(rows, 2, TYPICAL)]
    assert abs(len(order) - statistics.median(len(kept) for kept in found)) <= 1
    for place in range(3):
        middle = statistics.median(kept[place] for kept in found if len(kept) > place)
        assert order[place] == pytest.approx(middle, rel=0.1)


def test_only_rows_padded_to_the_longest_of_a_batch_have_an_order() -> None:
    assert orders(ROWS, BATCHING) is not None
    for padding in ("max", "grouped", "packed"):
        assert orders(ROWS, replace(BATCHING, padding=padding)) is None
    assert orders(Lengths([512] * 8), BATCHING) is None


def test_one_length_is_the_run_that_expand_writes() -> None:
    record = Programs(LORA)(4096, False)
    alike = allocator.replay(sequence.expand(record, 2, allocator.SMALL_SIZE))
    assert reserved([(0, 4096)]) == alike.peak_reserved


@pytest.mark.parametrize("accumulation", [1, 4])
def test_shorter_micro_batches_leave_the_cache_as_it_is(accumulation: int) -> None:
    """Whole epochs reserve what their growing micro batches do; without gradients in between, to the byte."""
    programs, rng = Programs(LORA), random.Random(3)
    for _ in range(6):
        lengths = [ROWS.values[rng.randrange(len(ROWS))] for _ in range(24)] + [ROWS.longest]
        whole = list(enumerate(lengths))
        kept = [(n, length) for n, length in whole if length > max([0, *lengths[:n]])]
        assert reserved(kept, accumulation, programs) == pytest.approx(
            reserved(whole, accumulation, programs), rel=0.03
        )


def test_the_cache_grows_with_every_longer_micro_batch() -> None:
    programs = Programs(LORA)
    first = reserved([(0, 4096)], programs=programs)
    grown = reserved([(0, 2000), (3, 4096)], programs=programs)
    assert grown > 1.15 * first
    assert reserved([(0, 1000), (1, 2000), (3, 4096)], programs=programs) >= grown


def test_reserved_in_a_typical_order_lies_among_shuffled_epochs() -> None:
    programs, rng = Programs(LORA), random.Random(11)
    found = []
    for _ in range(30):
        kept: list[tuple[int, int]] = []
        for number, (_, length, _) in enumerate(epoch(ROWS, BATCHING, rng)):
            if not kept or length > kept[-1][1]:
                kept.append((number, length))
        found.append(reserved(kept, programs=programs))
    low, middle, high = statistics.quantiles(found, n=4)
    made = orders(ROWS, BATCHING)
    assert made is not None
    assert low <= reserved(made.typical, programs=programs) <= high
    assert reserved(made.slow, programs=programs) >= middle


def test_a_prediction_tells_what_the_order_costs() -> None:
    card, made = catalog.gpu("rtx-4090"), orders(ROWS, BATCHING)
    assert made is not None
    equal, unequal = predict(MODEL, LORA, card), predict(MODEL, LORA, card, orders=made)
    assert unequal.allocated == equal.allocated
    assert unequal.reserved.expected > 1.1 * equal.reserved.expected
    assert unequal.reserved.low == equal.reserved.low
    assert unequal.reserved.high >= equal.reserved.high
    assert any("unequal length" in warning for warning in unequal.warnings)
    first = Orders(((0, 4096),), ((0, 4096),), made.second)
    assert predict(MODEL, LORA, card, orders=first).reserved == equal.reserved


def test_an_odd_length_that_needs_more_than_the_longest_counts() -> None:
    """torch 2.1 writes a mask of odd length out for every head (tests/test_remote_code.py)."""
    config = {
        "model_type": "qwen", "hidden_size": 512, "intermediate_size": 2752, "num_attention_heads": 4,
        "num_hidden_layers": 4, "vocab_size": 1000, "max_position_embeddings": 32768,
    }  # fmt: skip
    model = build_spec(config, model_id="qwen")
    training = replace(LORA, lora=LoraSpec(r=8, target_modules=("c_attn",)), attention="eager", seq_len=1024,
                       gradient_checkpointing="none", versions=replace(LORA.versions, torch=(2, 1)))  # fmt: skip
    made = orders(Lengths([600, 1023, 1024, 1024]), replace(BATCHING, limit=1024))
    assert made is not None and made.second == 1023
    odd = predict(model, replace(training, seq_len=1023))
    assert predict(model, training, orders=made).allocated == odd.allocated
