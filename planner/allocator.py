"""Replay PyTorch's CUDA caching allocator over a sequence of requests: allocated and reserved memory, or out of memory.

The rules and constants are those of c10/cuda/CUDACachingAllocator.cpp and .h (torch 2.13): requests are rounded to
512 bytes, live in a small (up to 1 MiB) or a large pool, take the best-fitting free block, are split off when enough
is left, merge with free neighbours when freed. A large block whose remainder is at most 1 MiB stays whole and counts
whole as allocated. Addresses are simulated: segments lie at increasing addresses and never touch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from planner.records import record

MIN_BLOCK = 512  # kMinBlockSize
SMALL_SIZE = 1 << 20  # kSmallSize: largest request of the small pool
SMALL_SEGMENT = 2 << 20  # kSmallBuffer
LARGE_SEGMENT = 20 << 20  # large_segment_size (kLargeBuffer before 2.13)
MIN_LARGE_REQUEST = 10 << 20  # kMinLargeAlloc: requests below it share 20 MiB segments
ROUND_LARGE = 2 << 20  # kRoundLarge

_SHIFT = 80  # wider than any address: absurd requests stay a matter of arithmetic
_ADDRESS = (1 << _SHIFT) - 1
_SEGMENT_GAP = 1 << 30


class OutOfMemory(Exception):
    """A request that does not fit: requested bytes, and what was allocated and reserved at that moment."""

    def __init__(self, requested: int, allocated: int, reserved: int, capacity: int) -> None:
        found = f"{allocated} allocated, {reserved} reserved of {capacity}"
        super().__init__(f"tried to allocate {requested} bytes; {found}")
        self.requested = requested
        self.allocated = allocated
        self.reserved = reserved
        self.capacity = capacity


class Block:
    """A piece of a segment: address, size, neighbours, and whether it is in use."""

    __slots__ = ("address", "following", "free", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: int) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.free = False
        self.previous: Block | None = None
        self.following: Block | None = None


@record
class Settings:
    """PYTORCH_ALLOC_CONF: the options that change the layout."""

    expandable_segments: bool = False
    max_split_size: int = 0
    """Bytes; 0: unlimited. Blocks above it are neither split nor used for much smaller requests."""
    capacity: int = 0
    """Bytes the process may reserve; 0: no limit."""


class CachingAllocator:
    """One device's allocator on one stream."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._free: tuple[list[int], list[int]] = ([], [])  # per pool: size << 80 | address, sorted
        self._by_address: dict[int, Block] = {}
        self._next_address = _SEGMENT_GAP
        self._expandable: list[Block | None] = [None, None]
        self._fine = self.settings.expandable_segments
        """Large blocks are split down to 512 bytes too."""
        self._restricted = bool(self.settings.max_split_size) and not self._fine

    # --- requests ---------------------------------------------------------------------------------------------

    def malloc(self, nbytes: int) -> Block | None:
        """Serve one request; 0 bytes need no block.

        Raises:
            OutOfMemory: the capacity does not allow another segment, even after freeing cached ones.
        """
        if nbytes <= 0:
            return None
        size = -(-nbytes // MIN_BLOCK) * MIN_BLOCK
        pool = 0 if size <= SMALL_SIZE else 1
        free = self._free[pool]
        place = bisect_left(free, size << _SHIFT)
        if place < len(free) and (not self._restricted or self._usable(free[place] >> _SHIFT, size)):
            block = self._by_address.pop(free.pop(place) & _ADDRESS)
        else:
            block = self._new_segment(pool, size)
        left = block.size - size
        if left >= MIN_BLOCK and (left > SMALL_SIZE or pool == 0 or self._fine) and not self._whole(size):
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, merged with free neighbours."""
        self.allocated -= block.size
        block.free = True
        free = self._free[block.pool]
        before = block.previous
        if before is not None and before.free:
            self._forget(before)
            before.size += block.size
            before.following = block.following
            if block.following is not None:
                block.following.previous = before
            block = before
        after = block.following
        if after is not None and after.free:
            self._forget(after)
            block.size += after.size
            block.following = after.following
            if after.following is not None:
                after.following.previous = block
        insort(free, block.size << _SHIFT | block.address)
        self._by_address[block.address] = block

    def empty_cache(self) -> None:
        """Give whole free segments back to the device (torch.cuda.empty_cache)."""
        for pool in (0, 1):
            for key in list(self._free[pool]):
                block = self._by_address[key & _ADDRESS]
                if block.previous is None and block.following is None:
                    self._forget(block)
                    self.reserved -= block.size

    # --- blocks -----------------------------------------------------------------------------------------------

    def _usable(self, found: int, size: int) -> bool:
        """max_split_size: large blocks are kept for large requests, and not for much smaller ones."""
        limit = self.settings.max_split_size
        return not (size < limit <= found or (size >= limit and found >= size + LARGE_SEGMENT))

    def _whole(self, size: int) -> bool:
        """max_split_size: requests above it are not split off."""
        return self._restricted and size >= self.settings.max_split_size

    def _forget(self, block: Block) -> None:
        free = self._free[block.pool]
        del free[bisect_left(free, block.size << _SHIFT | block.address)]
        del self._by_address[block.address]

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.pool)
        rest.free = True
        rest.previous, rest.following = block, block.following
        if block.following is not None:
            block.following.previous = rest
        block.following = rest
        block.size = size
        insort(self._free[block.pool], rest.size << _SHIFT | rest.address)
        self._by_address[rest.address] = rest

    # --- segments ---------------------------------------------------------------------------------------------

    def _new_segment(self, pool: int, size: int) -> Block:
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        wanted = segment_bytes(size)
        self._reserve(wanted, size)
        block = Block(self._next_address, wanted, pool)
        self._next_address += wanted + _SEGMENT_GAP
        return block

    def _reserve(self, wanted: int, request: int) -> None:
        capacity = self.settings.capacity
        if capacity and self.reserved + wanted > capacity:
            self.empty_cache()
            if self.reserved + wanted > capacity:
                raise OutOfMemory(request, self.allocated, self.reserved, capacity)
        self.reserved += wanted
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved

    def _expand(self, pool: int, size: int) -> Block:
        """expandable_segments: one growing segment per pool, mapped in pages of 2 or 20 MiB."""
        page = SMALL_SEGMENT if pool == 0 else LARGE_SEGMENT
        last = self._expandable[pool]
        while last is not None and last.following is not None:
            last = last.following
        tail = last.size if last is not None and last.free else 0
        wanted = -(-(size - tail) // page) * page
        self._reserve(wanted, size)
        if last is not None and last.free:
            self._forget(last)
            last.size += wanted
            self._expandable[pool] = last
            return last
        address = last.address + last.size if last is not None else (pool + 1) << 70
        block = Block(address, wanted, pool)
        if last is not None:
            last.following, block.previous = block, last
        self._expandable[pool] = block
        return block


def segment_bytes(size: int) -> int:
    """Size of the segment taken from the device for a rounded request (get_allocation_size)."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE_REQUEST:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


def replay(events: Iterable[tuple[int, int]], settings: Settings | None = None) -> CachingAllocator:
    """Replay (storage, +bytes) and (storage, -bytes) in order and return the allocator with its peaks."""
    allocator = CachingAllocator(settings)
    malloc, free = allocator.malloc, allocator.free
    blocks: dict[int, Block | None] = {}
    for storage, size in events:
        if size > 0:
            blocks[storage] = malloc(size)
        else:
            block = blocks.pop(storage, None)
            if block is not None:
                free(block)
    return allocator
