"""Walks over small records worked by hand: the peak, its owners, the small pool, and the record written out."""

from __future__ import annotations

from planner.memory import allocator, sequence, walk
from planner.step.engine import Record, Storage

MiB = 1 << 20


def test_a_peak_in_the_backward_of_repeated_layers() -> None:
    """Three layers keep 512 each, the head's backward makes 2048, every layer's leaves 4096 beside a workspace of 1024.

    Loading takes 50,000 bytes for a moment, which is no peak of the step. Blocks of 512.
    """
    record = Record()
    held = [Storage(record, 1000, "weight")]
    read = Storage(record, 50_000, "loading")
    del read
    record.enter("forward", 0, 3)
    held.append(Storage(record, 512, "linear"))
    record.enter("backward")
    held.append(Storage(record, 2048, "linear_grad"))
    record.enter("backward", 0, 3)
    held.append(Storage(record, 4096, "weight_grad"))
    work = Storage(record, 700, "flash_attention_workspace")
    del work
    record.enter("optimizer")
    record.close()
    found = walk.breakdown(record)
    assert found.peak_allocated_bytes == walk.peak_bytes(record) == 1024 + 3 * 512 + 2048 + 3 * 4096 + 1024
    assert dict(found.ledger) == {
        "base weights": 1024, "activations": 3 * 512, "logits and loss": 2048, "activation gradients": 3 * 4096,
        "workspaces": 1024,
    }  # fmt: skip
    assert found.static_bytes == 1024


def layered() -> Record:
    """Three layers keep 600 and 2048 bytes each until their backward, which makes a gradient that outlives it."""
    record = Record()
    weight = Storage(record, 3 * MiB, "weight")
    record.enter("state")
    state = Storage(record, 5 * MiB, "optimizer_state")
    record.enter("forward", 0, 3)
    small, kept = Storage(record, 600, "linear"), Storage(record, 2048, "linear")
    record.enter("backward", 0, 3)
    gradient = Storage(record, 4096, "gradient")
    del small, kept
    record.enter("optimizer")
    record.close()
    del weight, state, gradient
    return record


def test_the_small_pool_counts_every_layer() -> None:
    """Up to 2048 bytes: 3 x (1024 + 2048); up to a MiB the gradients too: the last layer's comes before its frees."""
    assert sequence.small_peak(layered(), 2048) == 3 * 3072
    assert sequence.small_peak(layered(), MiB) == 3 * 4096 + 3072
    assert sequence.small_peak(layered(), 1) == 0


def test_a_record_written_out_runs_the_backward_from_the_last_layer() -> None:
    events = sequence.expand(layered(), 1, smallest=600)
    made = [name for name, size in events if size == 2048]
    freed = [name for name, size in events if size == -2048]
    assert len(made) == 3
    assert freed == made[::-1]
    assert 600 not in {abs(size) for _, size in events}  # requests of at most that many bytes are left out
    assert 2048 not in {abs(size) for _, size in sequence.expand(layered(), 1, smallest=2048)}


def test_what_a_step_leaves_behind_ends_with_it() -> None:
    """Gradients of 3 x 4096 are freed at the end of every step; weights, and the state of the first, stay."""
    for steps in (1, 2, 3):
        events = sequence.expand(layered(), steps)
        assert sum(size for _, size in events) == 8 * MiB
        level = peak = 0
        for _, size in events:
            level += walk.rounded(size)
            peak = max(peak, level)
        assert events.requested == peak
    # the first step has its peak when the state appears, beside three gradients; a second one with three layers kept
    assert sequence.expand(layered(), 1).requested == 8 * MiB + 3 * 4096
    assert sequence.expand(layered(), 2).requested == 8 * MiB + max(3 * 4096 + 3072, 3 * 3072 + 4096)


def test_a_large_block_is_split_where_more_than_a_mebibyte_is_left() -> None:
    """c10 CUDACachingAllocator.cpp should_split: remaining > kSmallSize. 19 MiB lie in a segment of 20 MiB."""
    for request, counted in ((19 * MiB, 20 * MiB), (19 * MiB - 512, 19 * MiB - 512), (19 * MiB + 512, 20 * MiB)):
        assert allocator.replay([(0, request)]).peak_allocated == counted
        alone = allocator.CachingAllocator()
        alone.malloc(request)
        assert alone.peak_allocated == counted
