"""Padding, grouping and packing estimates against brute-force batches, and against transformers' own sampler."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.runs.dataset.batches import (
    PADDINGS,
    Batching,
    Padding,
    _over_megabatches,
    epoch,
    expected_cost,
    megabatch_rows,
    pack,
    padded,
    positions,
    seen_lengths,
)
from planner.runs.dataset.lengths import Lengths


def data(kind: str, n: int = 5000) -> Lengths:
    rng = random.Random(7)
    draw = {
        "skewed": lambda: int(rng.lognormvariate(5.3, 0.8)) + 4,
        "two groups": lambda: rng.choice((40, 900)) + rng.randrange(20),
        "uniform": lambda: rng.randrange(1, 3000),
        "constant": lambda: 512,
    }[kind]
    return Lengths(draw() for _ in range(n))


@pytest.mark.parametrize("kind", ["skewed", "two groups", "uniform", "constant"])
@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("padding", PADDINGS)
def test_estimates_agree_with_brute_force_within_one_percent(kind: str, batch: int, padding: Padding) -> None:
    lengths = data(kind)
    how = Batching(batch=batch, limit=1024, padding=padding)
    seen = seen_lengths(lengths, how)
    estimate = padded(lengths, batch, 1024, padding)
    rng = random.Random(1)
    computed = useful = batches = 0
    epochs = 8
    for _ in range(epochs):
        for rows, length, tokens in epoch(seen, how, rng):
            computed += rows * length
            useful += tokens
            batches += 1
    assert estimate.computed_tokens == pytest.approx(computed / epochs, rel=0.01)
    assert estimate.useful_tokens * epochs == useful
    assert estimate.batches * epochs == batches


@pytest.mark.parametrize("n", [1, 3, 7, 61, 403])
def test_small_data_and_a_last_batch_that_is_not_full(n: int) -> None:
    lengths = data("skewed", n)
    for batch in (1, 4, 8):
        for padding in ("longest", "grouped"):
            how = Batching(batch=batch, limit=2048, padding=padding)
            seen = seen_lengths(lengths, how)
            sums = [sum(r * length for r, length, _ in epoch(seen, how, random.Random(s))) for s in range(600)]
            assert padded(lengths, batch, 2048, padding).computed_tokens == pytest.approx(sum(sums) / 600, rel=0.02)


@pytest.mark.oracle
def test_grouping_is_what_transformers_does() -> None:
    """Its own sampler, on the same lengths."""
    torch = pytest.importorskip("torch")
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths, batch = data("skewed", 3000), 8
    sums = []
    for seed in range(20):
        order = get_length_grouped_indices(list(lengths.values), batch, generator=torch.Generator().manual_seed(seed))
        values = [lengths.values[i] for i in order]
        sums.append(sum(max(values[i : i + batch]) * len(values[i : i + batch]) for i in range(0, len(values), batch)))
    assert padded(lengths, batch, 10**6, "grouped").computed_tokens == pytest.approx(sum(sums) / 20, rel=0.01)


def test_packing_is_best_fit_decreasing() -> None:
    """TRL's documented example: lengths 5, 2, 3, 1 in rows of 4 give fills 4, 4 and 2."""
    assert sorted(pack(Lengths([5, 2, 3, 1]), 4), reverse=True) == [4, 4, 2]


def naive_pack(rows: list[int], limit: int) -> list[int]:
    bins: list[int] = []
    for row in sorted((min(r, limit) for r in rows), reverse=True):
        fitting = [i for i, fill in enumerate(bins) if fill + row <= limit]
        if fitting:
            bins[max(fitting, key=lambda i: bins[i])] += row
        else:
            bins.append(row)
    return bins


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=120), st.integers(20, 150))
def test_packing_agrees_with_a_naive_search(rows: list[int], limit: int) -> None:
    assert sorted(pack(Lengths(rows), limit)) == sorted(naive_pack(rows, limit))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 9), st.integers(1, 400))
def test_order_of_waste(rows: list[int], batch: int, limit: int) -> None:
    """No padding computes less than what is useful; grouping never computes more than not grouping."""
    lengths = Lengths(rows)
    found = {padding: padded(lengths, batch, limit, padding) for padding in ("max", "longest")}
    grouped = _over_megabatches(
        lengths.clipped(limit).counts, batch, megabatch_rows(len(rows), batch), len(rows), positions
    )
    assert found["max"].computed_tokens >= found["longest"].computed_tokens - 1e-6
    assert found["longest"].computed_tokens >= grouped - 1e-6
    assert grouped >= found["longest"].useful_tokens - 1e-6


def test_expected_longest_of_two_by_hand() -> None:
    """Two of {1, 2, 3}: longest 2, 3, 3 on average 8/3; then one row alone, 2 on average."""
    how = Batching(batch=2, limit=9, padding="longest")
    assert expected_cost(Lengths([1, 2, 3]), how, positions) == pytest.approx(2 * 8 / 3 * 1 + 2)
    assert expected_cost(Lengths([1, 2, 3]), how, positions, rows_used=2) == pytest.approx(2 * 8 / 3)


def test_expected_cost_of_any_function_of_the_length() -> None:
    """Seconds are not proportional to tokens: the square of the length, against the batches themselves."""
    lengths = data("skewed", 4000)
    for padding in ("longest", "grouped"):
        how = Batching(batch=8, limit=1024, padding=padding)
        seen = seen_lengths(lengths, how)
        sums = [sum(r * x * x for r, x, _ in epoch(seen, how, random.Random(s))) for s in range(10)]
        estimate = expected_cost(seen, how, lambda rows, length: float(rows * length * length))
        assert estimate == pytest.approx(sum(sums) / 10, rel=0.01)


def test_megabatches() -> None:
    assert megabatch_rows(10_000, 8) == 400
    assert megabatch_rows(100, 8) == 24
    assert megabatch_rows(3, 8) == 8


def test_percentiles_and_truncation() -> None:
    lengths = Lengths(range(1, 101))
    assert [lengths.percentile(p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert lengths.truncated(90) == (10, 55)
    assert (lengths.shortest, lengths.longest, lengths.mean) == (1, 100, 50.5)
    assert sum(rows for _, _, rows in lengths.histogram(7)) == 100
