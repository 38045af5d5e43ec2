"""The caching allocator rule by rule, its constants against PyTorch's own header, and properties of any sequence."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.base.errors import InvalidInput
from planner.memory import allocator
from planner.memory.allocator import CachingAllocator, OutOfMemory, Settings, parse_settings, replay
from planner.plan.intervals import _within

KIB, MIB, GIB = 2**10, 2**20, 2**30
EXPANDABLE = Settings(expandable_segments=True)


def header() -> str:
    """c10/core/AllocatorConfig.h of the installed torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        pytest.skip("torch is not installed")
    return (Path(found.origin).parent / "include" / "c10" / "core" / "AllocatorConfig.h").read_text(encoding="utf-8")


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kMinBlockSize", allocator.MIN_BLOCK),
        ("kSmallSize", allocator.SMALL_SIZE),
        ("kSmallBuffer", allocator.SMALL_SEGMENT),
        ("kMinLargeAlloc", allocator.MIN_LARGE_REQUEST),
        ("kRoundLarge", allocator.ROUND_LARGE),
    ],
)
def test_constants_are_those_of_the_header(name, value):
    (number,) = re.findall(rf"constexpr size_t {name} = (\d+);", header())
    assert int(number) == value


@pytest.mark.oracle
def test_defaults_are_those_of_the_header():
    text = header()
    assert int(re.findall(r"large_segment_size_\{(\d+)\}", text)[0]) == allocator.LARGE_SEGMENT
    assert "use_expandable_segments_{false}" in text
    assert "max_split_size_{std::numeric_limits<size_t>::max()}" in " ".join(text.split())
    rounding = re.findall(r"without requiring splitting when searching.*?default is\s*(?://)?\s*(\d+) MiB", text, re.S)
    assert [int(n) * MIB for n in rounding] == [allocator.NON_SPLIT_ROUNDING]
    options = set(re.findall(r"Parse `(\w+)` from environment", text))
    assert set(allocator._OPTIONS) - {"max_non_split_rounding_mb"} <= options


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("request_", "block"), [(1, 512), (512, 512), (513, 1024), (3 * MIB + 1, 3 * MIB + 512)])
def test_requests_are_rounded_to_512_bytes(request_, block):
    one = CachingAllocator()
    held = one.malloc(request_)
    assert held is not None
    assert one.allocated == block
    assert one.malloc(0) is None


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (21 * MIB, 22 * MIB),
    ],
)
def test_segments(size, segment):
    assert allocator.segment_bytes(size) == segment
    one = CachingAllocator()
    one.malloc(size)
    assert one.reserved == segment


@pytest.mark.parametrize(
    ("nbytes", "divisions", "size"),
    [(1200, 4, 1536), (5 * KIB, 4, 5 * KIB), (5 * KIB + 1, 4, 6 * KIB), (8 * KIB, 4, 8 * KIB), (1100, 1, 1536)],
)
def test_powers_of_two_can_be_divided(nbytes, divisions, size):
    assert allocator.rounded(nbytes, divisions) == size
    one = CachingAllocator(Settings(roundup_power2_divisions=divisions))
    one.malloc(nbytes)
    assert one.allocated == size


# --- best fit, splitting, merging ----------------------------------------------------------------------------------


def test_small_and_large_requests_never_share_a_segment():
    one = CachingAllocator()
    large = one.malloc(2 * MIB)
    assert large is not None
    one.free(large)
    one.malloc(512 * KIB)
    assert one.reserved == 22 * MIB


def test_a_small_block_is_split_down_to_512_bytes():
    one = CachingAllocator()
    for _ in range(4096):
        one.malloc(512)
    assert one.reserved == 2 * MIB
    one.malloc(1)
    assert one.reserved == 4 * MIB


def test_a_large_block_stays_whole_when_at_most_a_mebibyte_is_left():
    whole = CachingAllocator()
    whole.malloc(19 * MIB)  # a 20 MiB segment, 1 MiB left
    assert (whole.allocated, whole.reserved) == (20 * MIB, 20 * MIB)
    split = CachingAllocator()
    block = split.malloc(12 * MIB)
    assert block is not None
    split.free(block)
    split.malloc(11 * MIB - 512)  # 1 MiB and 512 bytes left
    assert split.allocated == 11 * MIB - 512


def test_the_smallest_block_that_is_large_enough_is_taken():
    one = CachingAllocator()
    blocks = [one.malloc(size * MIB) for size in (40, 20, 30)]
    for block in blocks:
        assert block is not None
        one.free(block)
    taken = one.malloc(18 * MIB)
    assert taken is not None
    assert blocks[1] is not None
    assert taken.address == blocks[1].address
    assert one.reserved == 90 * MIB


def test_of_equal_blocks_the_lowest_address_is_taken():
    one = CachingAllocator()
    blocks = [one.malloc(20 * MIB) for _ in range(3)]
    for block in reversed(blocks):
        assert block is not None
        one.free(block)
    assert [block.address for block in blocks if block] == sorted((b.address for b in blocks if b), reverse=True)
    taken = one.malloc(20 * MIB)
    assert taken is blocks[2]  # of the newest segment


def test_segments_may_lie_the_other_way_round():
    one = CachingAllocator(Settings(rising=True))
    blocks = [one.malloc(20 * MIB) for _ in range(3)]
    addresses = [block.address for block in blocks if block]
    assert addresses == sorted(addresses)
    for block in blocks:
        assert block is not None
        one.free(block)
    assert one.malloc(20 * MIB) is blocks[0]


def test_out_of_memory_means_in_either_layout():
    alive = [(number, 30 * MIB) for number in range(4)]
    assert _within(alive, 120 * MIB) == 120 * MIB
    assert _within(alive, 119 * MIB) is None


def test_free_neighbours_merge():
    one = CachingAllocator()
    first, second, third = (one.malloc(6 * MIB) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert one.reserved == 20 * MIB
    for block in (first, third, second):
        one.free(block)
    one.malloc(19 * MIB - 512)
    assert one.reserved == 20 * MIB


def test_segments_do_not_merge():
    assert replay([(1, 20 * MIB), (2, 20 * MIB), (1, -1), (2, -1), (3, 40 * MIB)]).peak_reserved == 80 * MIB


# --- options -------------------------------------------------------------------------------------------------------


def test_expandable_segments_grow_by_pages():
    events = [(1, 20 * MIB), (2, 20 * MIB), (1, -1), (2, -1), (3, 40 * MIB)]
    assert replay(events, EXPANDABLE).peak_reserved == 40 * MIB
    one = CachingAllocator(EXPANDABLE)
    one.malloc(33 * MIB)
    assert (one.allocated, one.reserved) == (33 * MIB, 40 * MIB)
    one.malloc(512)
    assert one.reserved == 42 * MIB
    one.malloc(7 * MIB + 512)  # 7 MiB are left behind the first block: one more page
    assert one.reserved == 62 * MIB


def test_expandable_segments_give_back_whole_pages_inside_a_hole():
    one = CachingAllocator(EXPANDABLE)
    blocks = [one.malloc(30 * MIB) for _ in range(3)]
    assert one.reserved == 100 * MIB
    assert blocks[1] is not None
    one.free(blocks[1])
    one.empty_cache()
    assert one.reserved == 80 * MIB  # of 30..60 MiB only the page 40..60, and none of 90..100
    one.malloc(30 * MIB)  # the hole is mapped again
    assert one.reserved == 100 * MIB


def test_best_fit_spares_the_end_of_what_is_mapped():
    one = CachingAllocator(EXPANDABLE)
    blocks = [one.malloc(size * MIB) for size in (9, 2, 8)]  # 1 MiB stays at the end of the page
    assert blocks[0] is not None
    assert blocks[2] is not None
    one.free(blocks[2])  # 9 MiB, followed by unmapped addresses
    one.free(blocks[0])  # 9 MiB between others
    taken = one.malloc(8 * MIB)
    assert taken is not None
    assert taken.address == blocks[0].address


def test_max_split_size_keeps_large_blocks_for_large_requests():
    events = [(1, 100 * MIB), (1, -1), (2, 30 * MIB)]
    assert replay(events).peak_reserved == 100 * MIB
    limited = Settings(max_split_size=64 * MIB)
    assert replay(events, limited).peak_reserved == 130 * MIB
    near = [(1, 100 * MIB), (1, -1), (2, 81 * MIB)]
    one = replay(near, limited)
    assert (one.peak_reserved, one.allocated) == (100 * MIB, 100 * MIB)  # not split
    far = [(1, 100 * MIB), (1, -1), (2, 80 * MIB)]
    assert replay(far, limited).peak_reserved == 180 * MIB


def test_max_split_size_gives_back_oversized_blocks_first():
    settings = Settings(max_split_size=64 * MIB, capacity=200 * MIB)
    one = CachingAllocator(settings)
    large, small = one.malloc(160 * MIB), one.malloc(40 * MIB)
    assert large is not None
    assert small is not None
    one.free(large)
    one.free(small)
    one.malloc(130 * MIB)  # 160 MiB are too many for it
    assert one.retries == 1
    assert one.reserved == 170 * MIB  # the 40 MiB segment stayed in the cache


def test_settings_are_read_from_the_environment_variables_words():
    text = "expandable_segments:True, max_split_size_mb:128,roundup_power2_divisions:8"
    found = parse_settings(text, capacity=5)
    assert found.expandable_segments
    assert found.max_split_size == 128 * MIB
    assert found.roundup_power2_divisions == 8
    assert found.capacity == 5
    assert parse_settings("") == Settings()


@pytest.mark.parametrize(
    "text",
    ["x:1", "expandable_segments:1", "max_split_size_mb:-1", "max_split_size_mb:20", "roundup_power2_divisions:3"],
)
def test_settings_that_are_none_are_refused(text):
    with pytest.raises(InvalidInput, match=r"must be|unknown"):
        parse_settings(text)


# --- running out ---------------------------------------------------------------------------------------------------


def test_cached_segments_are_given_back_before_a_request_fails():
    one = CachingAllocator(Settings(capacity=100 * MIB))
    block = one.malloc(60 * MIB)
    assert block is not None
    one.free(block)
    one.malloc(80 * MIB)
    assert (one.reserved, one.retries) == (80 * MIB, 1)


def test_a_segment_in_use_is_not_given_back():
    one = CachingAllocator(Settings(capacity=40 * MIB))
    one.malloc(5 * MIB)  # holds a 20 MiB segment
    with pytest.raises(OutOfMemory) as failure:
        one.malloc(30 * MIB - 5)
    error = failure.value
    assert (error.requested, error.tried) == (30 * MIB, 30 * MIB)
    assert (error.allocated, error.reserved, error.capacity) == (5 * MIB, 20 * MIB, 40 * MIB)
    one.malloc(10 * MIB)  # the failure left it usable


def test_the_message_has_the_numbers_that_pytorch_prints():
    error = OutOfMemory(3 * MIB, 2 * GIB, 7 * GIB // 2, 5 * GIB, 20 * MIB)
    assert error.message(total=5 * GIB, outside=GIB // 2) == (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 5.00 GiB of which 1024.00 MiB "
        "is free. Including non-PyTorch memory, this process has 4.00 GiB memory in use. Of the allocated memory "
        "2.00 GiB is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated."
    )


@pytest.mark.parametrize(
    ("nbytes", "text"), [(1024, "1024 bytes"), (1536, "1.50 KiB"), (MIB, "1024.00 KiB"), (3 * GIB, "3.00 GiB")]
)
def test_sizes_are_printed_as_pytorch_does(nbytes, text):
    assert allocator.format_size(nbytes) == text


# --- any sequence --------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 3 * MIB),
    st.integers(MIB - 600, MIB + 600),
    st.integers(8 * MIB, 130 * MIB),
)
SETTINGS = st.sampled_from(
    [
        Settings(),
        EXPANDABLE,
        Settings(max_split_size=32 * MIB),
        Settings(expandable_segments=True, max_split_size=32 * MIB),
        Settings(roundup_power2_divisions=4),
        Settings(large_segment=32 * MIB),
        Settings(expandable_segments=True, large_segment=32 * MIB),
    ]
)


@st.composite
def sequences(draw) -> list[tuple[int, int]]:
    """Events in which every release follows its allocation."""
    events: list[tuple[int, int]] = []
    alive: list[int] = []
    for number in range(draw(st.integers(1, 40))):
        if alive and draw(st.booleans()):
            events.append((alive.pop(draw(st.integers(0, len(alive) - 1))), -1))
        events.append((number, draw(SIZES)))
        alive.append(number)
    return events


def check(one: CachingAllocator) -> None:
    """The books are right: neighbours touch, no two free ones, the totals are the sums of the blocks."""
    listed = [block for pool in one._free_blocks for block in pool]
    for keys, blocks in zip(one._free, one._free_blocks, strict=True):
        assert keys == sorted(keys)
        assert keys == [block.size << allocator._SHIFT | block.address for block in blocks]
    for block in listed:
        assert block.free
        assert block.mapped
        for neighbour in (block.previous, block.following):
            assert neighbour is None or not neighbour.free
        if block.following is not None:
            assert block.address + block.size == block.following.address
    assert one.reserved == one.allocated + sum(block.size for block in listed)
    assert 0 <= one.allocated <= one.peak_allocated <= one.peak_reserved


@given(sequences(), SETTINGS)
def test_any_sequence_keeps_the_books(events, settings):
    one = CachingAllocator(settings)
    blocks = {}
    live = segments = 0
    for storage, size in events:
        if size > 0:
            blocks[storage] = one.malloc(size)
            page = settings.large_segment if size > MIB else 2 * MIB
            segments += allocator.segment_bytes(allocator.rounded(size, settings.roundup_power2_divisions), page) + page
            live += size
        else:
            one.free(blocks.pop(storage))
        check(one)
    assert one.peak_reserved <= segments
    for block in blocks.values():
        one.free(block)
    check(one)
    assert one.allocated == 0
    one.empty_cache()
    check(one)
    assert one.reserved == 0


@given(sequences(), SETTINGS)
def test_a_replay_is_deterministic(events, settings):
    first, second = replay(events, settings), replay(events, settings)
    assert (first.peak_allocated, first.peak_reserved) == (second.peak_allocated, second.peak_reserved)
    assert first.reserved == second.reserved


PLAIN = st.builds(
    Settings,
    capacity=st.one_of(st.just(0), st.integers(2, 900).map(lambda mebibytes: mebibytes * MIB)),
    rising=st.booleans(),
    large_segment=st.sampled_from((20 * MIB, 32 * MIB)),
)


@given(sequences(), PLAIN)
def test_one_loop_does_what_malloc_and_free_do(events, settings):
    """`replay` writes them out: the same blocks, counters and failure after every sequence."""
    one = CachingAllocator(settings)
    blocks, failure = {}, None
    try:
        for storage, size in events:
            if size > 0:
                blocks[storage] = one.malloc(size)
            else:
                one.free(blocks.pop(storage))
    except OutOfMemory as error:
        failure = error
    try:
        other = replay(events, settings)
    except OutOfMemory as error:
        assert failure is not None
        assert vars(error) == vars(failure)
        return
    assert failure is None
    check(other)
    assert other._free == one._free
    for name in ("allocated", "reserved", "peak_allocated", "peak_reserved", "retries"):
        assert getattr(other, name) == getattr(one, name)


@given(sequences())
def test_native_segments_are_at_most_one_a_request(events):
    asked = sum(allocator.segment_bytes(allocator.rounded(size)) for _, size in events if size > 0)
    assert replay(events).peak_reserved <= asked


@given(sequences(), st.integers(10, 400), st.booleans())
def test_a_card_is_never_overdrawn(events, capacity, expandable):
    one = CachingAllocator(Settings(capacity=capacity * MIB, expandable_segments=expandable))
    blocks = {}
    for storage, size in events:
        if size > 0:
            try:
                blocks[storage] = one.malloc(size)
            except OutOfMemory as error:
                assert error.reserved == one.reserved
                assert one.reserved + error.tried > capacity * MIB or expandable
        elif storage in blocks:
            one.free(blocks.pop(storage))
        check(one)
        assert one.peak_reserved <= capacity * MIB


def test_segments_fill_address_blocks_from_the_lowest_gap() -> None:
    """What 20 MiB leave of a block of 32 MiB takes segments of 2 MiB, rising; a larger one begins a block below."""
    allocator = CachingAllocator()
    first, second = allocator.malloc(18 << 20), allocator.malloc(20 << 20)
    small = [allocator.malloc(1 << 20) for _ in range(3)]
    assert first is not None
    assert second is not None
    assert second.address == first.address - (32 << 20)
    addresses = [block.address for block in small if block is not None]
    assert addresses == [second.address + (n << 20) for n in (20, 21, 22)]
