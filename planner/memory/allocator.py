"""Replay PyTorch's CUDA caching allocator over a sequence of requests: allocated and reserved memory, or out of memory.

The rules are those of c10/cuda/CUDACachingAllocator.cpp, the constants those of c10/core/AllocatorConfig.h (torch
2.13): requests are rounded to 512 bytes, live in a small (up to 1 MiB) or a large pool, take the best-fitting free
block, are split off when enough is left, merge with free neighbours when freed. A large block whose remainder is at
most 1 MiB stays whole and counts whole as allocated. Addresses are simulated as cudaMalloc hands them out
(`_segment_address`). Left out: several streams, graph pools, garbage_collection_threshold (off by default).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from planner.base.errors import InvalidInput, one_line
from planner.base.records import record

MIN_BLOCK = 512  # kMinBlockSize
SMALL_SIZE = 1 << 20  # kSmallSize: largest request of the small pool
SMALL_SEGMENT = 2 << 20  # kSmallBuffer
LARGE_SEGMENT = 20 << 20  # large_segment_size_ (kLargeBuffer before 2.13)
MIN_LARGE_REQUEST = 10 << 20  # kMinLargeAlloc: requests below it share 20 MiB segments
ROUND_LARGE = 2 << 20  # kRoundLarge
NON_SPLIT_ROUNDING = 20 << 20  # max_non_split_rounding_size: how much larger an unsplit block may be than its request

_SHIFT = 80  # wider than any address: absurd requests stay a matter of arithmetic
_SEGMENT_GAP = 1 << 30
_TOP = 1 << 79
_ADDRESS_BLOCK = 32 << 20
"""cudaMalloc takes address space in blocks of 32 MiB, each below the last; what a segment leaves of its blocks serves
later ones, the lowest place that is large enough first. Of equal free blocks PyTorch takes the one at the lowest
address, so this order decides which segment gives. Read from recordings of an H200 (driver of CUDA 13,
calibrate.measure.history): with it 7 of 9 runs take every segment at the request where the real run did, with falling
addresses alone 4; with the recorded addresses all 9. What the other two lack are holes that a process has from its
start."""
_ADDRESS_SPACE = 1 << 68  # of an expandable segment; torch takes 9/8 of the card's memory, which is never the limit


class OutOfMemory(Exception):
    """A request that does not fit: requested bytes, and what was allocated and reserved at that moment."""

    def __init__(self, requested: int, allocated: int, reserved: int, capacity: int, tried: int = 0) -> None:
        found = f"{allocated} allocated, {reserved} reserved of {capacity}"
        super().__init__(f"tried to allocate {requested} bytes; {found}")
        self.requested = requested
        self.allocated = allocated
        self.reserved = reserved
        self.capacity = capacity
        self.tried = tried or requested
        """Size of the segment asked of the device, which is the number that PyTorch's message starts with."""

    def message(self, total: int, outside: int, number: int = 0) -> str:
        """The numbers as torch.OutOfMemoryError words them (CUDACachingAllocator.cpp, malloc).

        Args:
            total: the card's memory.
            outside: what this process holds beside the allocator: the CUDA context.
            number: of the GPU.
        """
        used = self.reserved + outside
        return (
            f"CUDA out of memory. Tried to allocate {format_size(self.tried)}. GPU {number} has a total capacity of "
            f"{format_size(total)} of which {format_size(max(total - used, 0))} is free. Including non-PyTorch memory, "
            f"this process has {format_size(used)} memory in use. Of the allocated memory "
            f"{format_size(self.allocated)} is allocated by PyTorch, and "
            f"{format_size(self.reserved - self.allocated)} is reserved by PyTorch but unallocated."
        )


class Block:
    """A piece of a segment: address, size, neighbours, and whether it is in use, cached, or not mapped."""

    __slots__ = ("address", "following", "free", "mapped", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: int) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.free = False
        self.mapped = True
        """False: address space of an expandable segment without memory behind it."""
        self.previous: Block | None = None
        self.following: Block | None = None


@record
class Settings:
    """PYTORCH_ALLOC_CONF: the options that change the layout, and the memory that there is."""

    expandable_segments: bool = False
    max_split_size: int = 0
    """Bytes; 0: unlimited. Blocks above it are neither split nor used for much smaller requests."""
    max_non_split_rounding: int = NON_SPLIT_ROUNDING
    roundup_power2_divisions: int = 0
    """Round requests up to this many steps between powers of two; 0 or 1: to 512 bytes."""
    large_segment: int = LARGE_SEGMENT
    capacity: int = 0
    """Bytes the process may reserve; 0: no limit."""
    rising: bool = False
    """Segments at rising addresses instead of falling ones."""

    def __post_init__(self) -> None:
        divisions = self.roundup_power2_divisions
        if divisions < 0 or divisions & (divisions - 1):
            raise InvalidInput(f"roundup_power2_divisions is {divisions}; must be 0 or a power of two")
        if self.max_split_size and self.max_split_size <= LARGE_SEGMENT:
            raise InvalidInput(f"max_split_size is {self.max_split_size} bytes; must be more than 20 MiB")


def parse_settings(text: str, capacity: int = 0) -> Settings:
    """Read the value of PYTORCH_ALLOC_CONF, for example `expandable_segments:True,max_split_size_mb:128`.

    Raises:
        InvalidInput: an option that is unknown here, or a value that is none.
    """
    values: dict[str, int | bool] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = (word.strip() for word in part.partition(":"))
        known = _OPTIONS.get(name)
        if known is None:
            raise InvalidInput(f"allocator option {one_line(name)!r} is unknown; known: {', '.join(_OPTIONS)}")
        key, unit = known
        if unit == 0:
            if value.lower() not in ("true", "false"):
                raise InvalidInput(f"allocator option {name} is {one_line(value)!r}; must be True or False")
            values[key] = value.lower() == "true"
        elif value.isascii() and value.isdigit() and len(value) < 10:
            values[key] = int(value) * unit
        else:
            raise InvalidInput(f"allocator option {name} is {one_line(value)!r}; must be a whole number")
    return Settings(capacity=capacity, **values)  # type: ignore[arg-type]


_OPTIONS: dict[str, tuple[str, int]] = {
    "expandable_segments": ("expandable_segments", 0),
    "max_split_size_mb": ("max_split_size", 1 << 20),
    "max_non_split_rounding_mb": ("max_non_split_rounding", 1 << 20),
    "roundup_power2_divisions": ("roundup_power2_divisions", 1),
    "large_segment_size_mb": ("large_segment", 1 << 20),
}
"""Option -> field of Settings and its unit in bytes (0: True or False)."""


class CachingAllocator:
    """One device's allocator on one stream."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        """Requests for which cached segments were given back."""
        self._free: tuple[list[int], list[int]] = ([], [])  # per pool: size << 80 | address, sorted
        self._free_blocks: tuple[list[Block], list[Block]] = ([], [])  # the blocks of these keys, in their order
        self._lowest_address, self._highest_address = _TOP, 0
        self._gaps: list[tuple[int, int]] = []
        """(address, bytes) left in address blocks, rising."""
        self._fine = self.settings.expandable_segments
        """Large blocks are split down to 512 bytes too."""
        self._limit = self.settings.max_split_size
        self._divisions = self.settings.roundup_power2_divisions
        self._unmapped: tuple[list[Block], list[Block]] = ([], [])  # expandable: per pool, by address
        if self._fine:
            self._unmapped = ([_address_space(0, SMALL_SEGMENT)], [_address_space(1, self.settings.large_segment)])

    # --- requests ---------------------------------------------------------------------------------------------

    def malloc(self, nbytes: int) -> Block | None:
        """Serve one request; 0 bytes need no block.

        Raises:
            OutOfMemory: the capacity does not allow another segment, even after freeing cached ones.
        """
        if nbytes <= 0:
            return None
        size = -(-nbytes // MIN_BLOCK) * MIN_BLOCK if self._divisions < 2 else rounded(nbytes, self._divisions)
        pool = 0 if size <= SMALL_SIZE else 1
        free = self._free[pool]
        place = bisect_left(free, size << _SHIFT)
        if self._fine:
            place = self._least_expandable(pool, place)
        if place < len(free) and (not self._limit or self._usable(free[place] >> _SHIFT, size)):
            del free[place]
            block = self._free_blocks[pool].pop(place)
        else:
            block = self._new_block(pool, size)
        left = block.size - size
        if left >= MIN_BLOCK and (left > SMALL_SIZE or pool == 0 or self._fine) and not self._whole(pool, size):
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, merged with free neighbours."""
        self.allocated -= block.size
        self._cache(block)

    def empty_cache(self) -> None:
        """Give free memory back to the device (torch.cuda.empty_cache): whole segments, pages of expandable ones."""
        for pool in (1, 0):
            for block in list(self._free_blocks[pool]):
                if self._fine:
                    self._unmap(block)
                elif block.previous is None and block.following is None:
                    self._give_back(block)

    # --- blocks -----------------------------------------------------------------------------------------------

    def _usable(self, found: int, size: int) -> bool:
        """max_split_size: large blocks are kept for large requests, and not for much smaller ones."""
        limit = self._limit
        return not (size < limit <= found or (size >= limit and found >= size + self.settings.max_non_split_rounding))

    def _whole(self, pool: int, size: int) -> bool:
        """max_split_size: larger requests are not split off (not where blocks are split down to 512 bytes)."""
        return bool(self._limit) and pool == 1 and not self._fine and size >= self._limit

    def _cache(self, block: Block) -> None:
        """Put a block among the free ones, merged with free neighbours."""
        block.free = True
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
        self._keep(block)

    def _keep(self, block: Block) -> None:
        key = block.size << _SHIFT | block.address
        free = self._free[block.pool]
        place = bisect_left(free, key)
        free.insert(place, key)
        self._free_blocks[block.pool].insert(place, block)

    def _forget(self, block: Block) -> None:
        free = self._free[block.pool]
        place = bisect_left(free, block.size << _SHIFT | block.address)
        del free[place], self._free_blocks[block.pool][place]

    def _split(self, block: Block, size: int) -> None:
        rest = _cut(block, size)
        rest.free = True
        self._keep(rest)

    # --- segments ---------------------------------------------------------------------------------------------

    def _new_block(self, pool: int, size: int) -> Block:
        """Take memory from the device; if it has none, give cached memory back and try again."""
        block = self._try(pool, size)
        if block is None and self._limit and self._release_large(size):
            self.retries += 1
            block = self._try(pool, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._try(pool, size)
        if block is None:
            tried = segment_bytes(size, self.settings.large_segment)
            raise OutOfMemory(size, self.allocated, self.reserved, self.settings.capacity, tried)
        return block

    def _try(self, pool: int, size: int) -> Block | None:
        if self._fine:
            return self._expand(pool, size)
        wanted = segment_bytes(size, self.settings.large_segment)
        if not self._reserve(wanted):
            return None
        if self.settings.rising:
            self._highest_address += wanted + _SEGMENT_GAP
            return Block(self._highest_address - wanted, wanted, pool)
        return Block(self._segment_address(wanted), wanted, pool)

    def _segment_address(self, wanted: int) -> int:
        """Address of a new segment: the lowest gap that holds it, else below everything."""
        for place, (address, room) in enumerate(self._gaps):
            if room >= wanted:
                self._gaps[place : place + 1] = [(address + wanted, room - wanted)] if room > wanted else []
                return address
        room = -(-wanted // _ADDRESS_BLOCK) * _ADDRESS_BLOCK
        self._lowest_address -= room
        if room > wanted:
            self._gaps.insert(0, (self._lowest_address + wanted, room - wanted))
        return self._lowest_address

    def _reserve(self, wanted: int) -> bool:
        if self.settings.capacity and self.reserved + wanted > self.settings.capacity:
            return False
        self.reserved += wanted
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return True

    def _give_back(self, block: Block) -> None:
        self._forget(block)
        self.reserved -= block.size
        insort(self._gaps, (block.address, block.size))

    def _release_large(self, size: int) -> bool:
        """max_split_size: give back one block that is large enough, or the largest ones until they are together."""
        wanted = max(size, self._limit)
        free = self._free_blocks[1]
        place = bisect_left(self._free[1], wanted << _SHIFT)
        if place < len(free):
            candidates = [free[place]]
        else:
            candidates = [block for block in reversed(free) if block.size >= self._limit]
        released = 0
        for block in candidates:
            if released >= wanted:
                break
            if not self._fine and block.previous is None and block.following is None:
                released += block.size
                self._give_back(block)
        return released >= wanted

    # --- expandable segments ----------------------------------------------------------------------------------

    def _least_expandable(self, pool: int, place: int) -> int:
        """Best fit counts a block at the end of what is mapped as large as it can grow."""
        free, best = self._free_blocks[pool], place
        while best + 1 < len(free) and self._room(free[best + 1]) < self._room(free[best]):
            best += 1
        return best

    @staticmethod
    def _room(block: Block) -> int:
        after = block.following
        return block.size + (after.size if after is not None and not after.mapped else 0)

    def _expand(self, pool: int, size: int) -> Block | None:
        """Map pages of 2 or 20 MiB behind a free block, or where nothing is mapped; None if there is no memory."""
        block = self._place(pool, size)
        if not block.mapped:
            grown = self._map(block, size)
            if grown is None:
                return None
            block = grown
        while block.size < size:
            assert block.following is not None
            grown = self._map(block.following, size - block.size)
            if grown is None:
                return None
            block = grown
        self._forget(block)
        return block

    def _place(self, pool: int, size: int) -> Block:
        """The lowest stretch of free and unmapped addresses that has room."""
        for unmapped in self._unmapped[pool]:
            before = unmapped.previous
            start = before if before is not None and before.free else unmapped
            room, block = 0, start
            while room < size and block is not None and (block.free or not block.mapped):
                room += block.size
                block = block.following  # type: ignore[assignment]
            if room >= size:
                return start
        raise AssertionError("an expandable segment ran out of addresses")

    def _map(self, block: Block, nbytes: int) -> Block | None:
        """Put memory behind the start of an unmapped block; return it merged with its free neighbours."""
        page = SMALL_SEGMENT if block.pool == 0 else self.settings.large_segment
        wanted = min(-(-nbytes // page) * page, block.size)
        if not self._reserve(wanted):
            return None
        unmapped = self._unmapped[block.pool]
        place = unmapped.index(block)
        if wanted < block.size:
            rest = _cut(block, wanted)
            rest.mapped = False
            unmapped[place] = rest
        else:
            del unmapped[place]
        block.mapped = True
        before = block.previous
        self._cache(block)
        return before if before is not None and before.free else block

    def _unmap(self, block: Block) -> None:
        """Take the whole pages inside a free block from it."""
        page = SMALL_SEGMENT if block.pool == 0 else self.settings.large_segment
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if start >= end:
            return
        self._forget(block)
        block.free = False
        middle = block
        if start > block.address:
            middle = _cut(block, start - block.address)
            self._cache(block)
        if end < middle.address + middle.size:
            self._cache(_cut(middle, end - start))
        self.reserved -= middle.size
        middle.mapped = False
        self._merge_unmapped(middle)

    def _merge_unmapped(self, block: Block) -> None:
        unmapped = self._unmapped[block.pool]
        after = block.following
        if after is not None and not after.mapped:
            unmapped.remove(after)
            block.size += after.size
            block.following = after.following
            if after.following is not None:
                after.following.previous = block
        before = block.previous
        if before is not None and not before.mapped:
            before.size += block.size
            before.following = block.following
            if block.following is not None:
                block.following.previous = before
        else:
            insort(unmapped, block, key=lambda b: b.address)


def _address_space(pool: int, page: int) -> Block:
    """An expandable segment before its first page is mapped."""
    block = Block((pool + 1) * page << 46, _ADDRESS_SPACE // page * page, pool)
    block.mapped = False
    return block


def _cut(block: Block, size: int) -> Block:
    """Shorten a block to `size` and return the rest as its neighbour."""
    rest = Block(block.address + size, block.size - size, block.pool)
    rest.previous, rest.following = block, block.following
    if block.following is not None:
        block.following.previous = rest
    block.following = rest
    block.size = size
    return rest


def rounded(nbytes: int, divisions: int = 0) -> int:
    """Size of the block for a request: 512 bytes, or the next of `divisions` steps between powers of two.

    Source: CUDACachingAllocator.cpp round_size, roundup_power2_next_division.
    """
    if divisions < 2 or nbytes <= MIN_BLOCK * divisions:
        return -(-nbytes // MIN_BLOCK) * MIN_BLOCK
    power = 1 << (nbytes.bit_length() - 1)
    step = power >> (divisions.bit_length() - 1)
    return -(-nbytes // step) * step


def segment_bytes(size: int, large_segment: int = LARGE_SEGMENT) -> int:
    """Size of the segment taken from the device for a rounded request (get_allocation_size)."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE_REQUEST:
        return large_segment
    return -(-size // ROUND_LARGE) * ROUND_LARGE


def format_size(nbytes: int) -> str:
    """Bytes as PyTorch's messages print them (CUDACachingAllocator.cpp format_size)."""
    if nbytes <= 1 << 10:
        return f"{nbytes} bytes"
    for unit, shift in (("KiB", 10), ("MiB", 20)):
        if nbytes <= 1 << (shift + 10):
            return f"{nbytes / (1 << shift):.2f} {unit}"
    return f"{nbytes / (1 << 30):.2f} GiB"


def replay(events: Iterable[tuple[int, int]], settings: Settings | None = None) -> CachingAllocator:
    """Replay (storage, +bytes) and (storage, -bytes) in order and return the allocator with its peaks."""
    allocator = CachingAllocator(settings)
    chosen = allocator.settings
    if not (chosen.expandable_segments or chosen.max_split_size or chosen.roundup_power2_divisions > 1):
        _replay_plain(allocator, events)
        return allocator
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


_Pool = tuple[list[int], list[Block], int]
"""Keys of free blocks, the blocks, the number of the pool."""


class _Requests(dict[int, tuple[int, int, list[int], list[Block], int]]):
    """Per requested size: the size of its block, the least key that serves it, and its pool."""

    def __init__(self, pools: Sequence[_Pool]) -> None:
        self.pools = pools

    def __missing__(self, nbytes: int) -> tuple[int, int, list[int], list[Block], int]:
        size = rounded(nbytes)
        self[nbytes] = found = (size, size << _SHIFT, *self.pools[size > SMALL_SIZE])
        return found


def _replay_plain(allocator: CachingAllocator, events: Iterable[tuple[int, int]]) -> None:
    """`malloc` and `free` in one loop, where no setting changes a rule: a prediction replays tens of thousands."""
    pools = tuple((allocator._free[pool], allocator._free_blocks[pool], pool) for pool in (0, 1))
    requests = _Requests(pools)
    alive: dict[int, Block] = {}
    spare: list[Block] = []  # ended by a merge, to be used again
    allocated = peak = 0
    for storage, size in events:
        if size > 0:
            size, key, keys, blocks, pool = requests[size]
            place = bisect_left(keys, key)
            if place < len(keys):
                block = blocks[place]
            else:
                allocator.allocated = allocated
                block = allocator._new_block(pool, size)
                place = -1
            left = block.size - size
            split = left > SMALL_SIZE or (left and not pool)
            if split:
                moved = spare.pop() if spare else Block(0, 0, pool)
                moved.address = address = block.address + size
                block.size, moved.size = size, left
                moved.pool, moved.free, moved.previous = pool, True, block
                moved.following = after = block.following
                block.following = moved
                if after is not None:
                    after.previous = moved
                key = left << _SHIFT | address
            block.free = False
            allocated += block.size
            if allocated > peak:
                peak = allocated
            alive[storage] = block
            if not split:
                if place >= 0:
                    del keys[place], blocks[place]
                continue
        else:
            found = alive.pop(storage, None)
            if found is None:
                continue
            moved, size = found, found.size
            allocated -= size
            keys, blocks, pool = pools[moved.pool]
            before, after = moved.previous, moved.following
            place = -1
            if after is not None and after.free:
                place = bisect_left(keys, after.size << _SHIFT | after.address)
                size += after.size
                spare.append(after)
                moved.following = after = after.following
                if after is not None:
                    after.previous = moved
            if before is not None and before.free:
                if place >= 0:
                    del keys[place], blocks[place]
                place = bisect_left(keys, before.size << _SHIFT | before.address)
                size += before.size
                spare.append(moved)
                before.following = after
                if after is not None:
                    after.previous = before
                moved = before
            moved.size, moved.free = size, True
            key = size << _SHIFT | moved.address
        if place >= 0 and ((place and keys[place - 1] > key) or (place + 1 < len(keys) and keys[place + 1] < key)):
            del keys[place], blocks[place]
            place = -1
        if place >= 0:  # where that is which it was cut from or merged with
            keys[place], blocks[place] = key, moved
        else:
            place = bisect_left(keys, key)
            keys.insert(place, key)
            blocks.insert(place, moved)
    allocator.allocated, allocator.peak_allocated = allocated, peak
