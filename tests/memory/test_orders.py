"""Micro batches of unequal length: which of them let the allocator's cache grow, and by how much."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from planner.device import cuda_rules
from planner.facts import catalog
from planner.memory import allocator, sequence
from planner.model.families import build_spec
from planner.model.spec import ModelSpec
from planner.plan.predict import predict
from planner.runs.dataset.batches import Batching, epoch
from planner.runs.dataset.lengths import Lengths
from planner.runs.dataset.orders import SLOW, TYPICAL, Orders, drawn, growing, orders
from planner.step import program
from planner.step.engine import Record
from planner.training.spec import LoraSpec, TrainingSpec

LAYERS = 3


def llama(hidden: int, vocab: int = 32000, layers: int = LAYERS) -> ModelSpec:
    return build_spec(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": 11 * hidden // 4,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocab,
            "tie_word_embeddings": False,
        },
        model_id="test",
    )  # fmt: skip


MODEL, WIDE = llama(256), llama(1024)
LORA = TrainingSpec(method="lora", lora=LoraSpec(r=8), seq_len=4096)
ROWS = drawn(1200.0, 900.0, 64, rows=400).clipped(4096)
BATCHING = Batching(batch=1, limit=4096, padding="longest")


class Programs:
    """Programs of one model by length."""

    def __init__(self, training: TrainingSpec, model: ModelSpec = MODEL) -> None:
        self.training, self.model = training, model
        self.known: dict[tuple[int, bool], Record] = {}

    def __call__(self, length: int, held: bool) -> Record:
        key = (length, held)
        if key not in self.known:
            one = replace(self.training, seq_len=length, gradient_accumulation_steps=1 + held)
            self.known[key] = program.run(self.model, one, cuda_rules.Architecture()).record
        return self.known[key]


def reserved(
    order: Sequence[tuple[int, int]],
    accumulation: int = 1,
    programs: Programs | None = None,
    starts: Sequence[int] = (),
) -> int:
    """Peak of the large pool."""
    events = sequence.unequal(order, accumulation, programs or Programs(LORA), allocator.SMALL_SIZE, starts)
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
    low, _, high = statistics.quantiles(found, n=4)
    made = orders(ROWS, BATCHING)
    assert made is not None
    assert low <= reserved(made.order(TYPICAL), programs=programs) <= high
    slow = max(reserved(made.order(distance), programs=programs) for distance in SLOW)
    assert sum(each <= slow for each in found) >= 0.9 * len(found)


@pytest.mark.parametrize(
    "training",
    [
        TrainingSpec(method="lora", lora=LoraSpec(r=512), seq_len=2048),
        TrainingSpec(method="full", seq_len=2048),
    ],
    ids=["large adapters", "full"],
)
def test_so_it_does_where_gradients_and_state_fragment_the_cache(training: TrainingSpec) -> None:
    """Against every micro batch of 16 shuffled epochs; gradients stay over four micro batches."""
    programs, rng, accumulation = Programs(training, WIDE), random.Random(5), 4
    rows = drawn(1600.0, 1300.0, 64, rows=64).clipped(2048)
    how = replace(BATCHING, limit=2048)
    made = orders(rows, how)
    assert made is not None
    found = []
    for _ in range(16):
        whole = [(number, length) for number, (_, length, _) in enumerate(epoch(rows, how, rng))]
        found.append(reserved([*whole, (len(whole), 2048)], accumulation, programs))
    starts = made.starts(accumulation)
    typical, *slow = (
        reserved(made.order(distance), accumulation, programs, starts) for distance in (TYPICAL, *SLOW)
    )  # fmt: skip
    assert min(found) <= typical <= statistics.quantiles(found, n=4)[2]
    assert sum(each <= max(typical, *slow) for each in found) >= 0.8 * len(found)


def test_a_new_state_lets_the_cache_grow_anew() -> None:
    """The state takes blocks that the first step's micro batches left, so those that grew it come again."""
    requests = []
    for training in (LORA, TrainingSpec(method="full", seq_len=2048)):
        events = sequence.unequal([(0, 1100), (2, 2048)], 4, Programs(training, WIDE), allocator.SMALL_SIZE)
        requests.append(sum(size == 1100 * 32000 * 4 for _, size in events))
    assert requests[1] == 2 * requests[0] > 0


def test_gradients_of_a_row_almost_as_long_stand_in_the_longest_ones_way() -> None:
    """They lie in what such a row left of the block of the longest logits, which then need another."""
    lora = LoraSpec(r=1024)
    training = TrainingSpec(method="lora", lora=lora, seq_len=2048, gradient_checkpointing="none")
    model = llama(512, vocab=128_000, layers=4)
    programs = Programs(training, model)
    alone = reserved([(0, 2048)], 4, programs)
    grown = [reserved([(0, 2048)], 4, programs, [length]) for length in range(1600, 2048, 64)]
    assert min(grown) == alone
    assert max(grown) == alone + 2048 * 128_000 * 4
    light = Programs(replace(training, lora=LoraSpec(r=8)), model)
    assert reserved([(0, 2048)], 4, light, [1856]) == reserved([(0, 2048)], 4, light)


def test_starts_come_as_near_to_the_longest_as_an_epoch_has_steps_for() -> None:
    made = Orders(seen=Lengths(range(1, 1025)), batch=1)
    assert made.starts(16) == (512, 768, 896, 960, 992)
    assert made.starts(128) == (512, 768, 896)
    assert Orders(seen=Lengths([512] * 8 + [1024] * 8), batch=1).starts(1) == (768,)


def test_a_prediction_tells_what_the_order_costs() -> None:
    card, made = catalog.gpu("rtx-4090"), orders(ROWS, BATCHING)
    assert made is not None
    equal, unequal = predict(MODEL, LORA, card), predict(MODEL, LORA, card, orders=made)
    assert unequal.allocated == equal.allocated
    assert unequal.reserved.expected > 1.1 * equal.reserved.expected
    assert unequal.reserved.low == equal.reserved.low
    assert unequal.reserved.high >= equal.reserved.high
    assert any("unequal length" in warning for warning in unequal.warnings)
    first = Orders(seen=Lengths([4000] + [4096] * 99), batch=1)
    assert predict(MODEL, LORA, card, orders=first).reserved == equal.reserved


def test_an_odd_length_that_needs_more_than_the_longest_counts() -> None:
    """torch 2.1 writes a mask of odd length out for every head (tests/model/test_remote_code.py)."""
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


def test_where_odd_lengths_need_more_they_come_after_the_longest() -> None:
    model = build_spec(
        {
            "model_type": "qwen", "hidden_size": 512, "intermediate_size": 2752, "num_attention_heads": 4,
            "num_hidden_layers": 4, "vocab_size": 1000, "max_position_embeddings": 32768,
        },
        model_id="qwen",
    )  # fmt: skip
    training = replace(LORA, lora=LoraSpec(r=8, target_modules=("c_attn",)), attention="eager", seq_len=2048,
                       gradient_checkpointing="none", versions=replace(LORA.versions, torch=(2, 1)))  # fmt: skip
    made = orders(Lengths([*range(400, 2048), *[2048] * 4000]), replace(BATCHING, limit=2048))
    assert made is not None
    order = made.order(TYPICAL, 1555)
    assert order[0][1] == 2048 and 1555 < order[1][1] < order[-1][1] == 2047
    longest = predict(model, replace(training, seq_len=2047))
    assert predict(model, training, orders=made).reserved.expected > 1.2 * longest.reserved.expected
