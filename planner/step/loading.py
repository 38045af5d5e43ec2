"""How transformers' from_pretrained takes memory when it puts the weights on the GPU itself (`device_map`).

It begins with one block of the model's size, which it gives back at once, so that the weights find room there
(`warmup_bytes`). Since 5.0 threads read weights ahead of the one that quantizes them: what they have read
lies on the GPU in 16 bit until its turn comes, and takes the place of what is made meanwhile. What the cache looks
like when training begins follows from that order, and how large it grows from how it looks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from planner.model import storage as model_storage
from planner.step.context import Step
from planner.step.engine import ITEMSIZE, Size
from planner.training.quantizations import QUANTIZATIONS

READERS = 4
"""Threads that read weights (transformers core_model_loading.py GLOBAL_WORKERS; fewer where there are fewer cores)."""

# Seconds. The first three: medians of from_pretrained on CPU cores (this project, 2026-11; transformers 5.17 and 5.24,
# tiny NF4 modules): 0.04 to 0.18 ms, 0.4 to 0.7 ms, 0.04 to 0.08 ms. The rate is assumed: a mapped file through
# pageable memory.
_ANNOUNCE_S = 1e-4
"""To hand a weight to the readers; nothing is quantized before all are handed out."""
_QUANTIZE_S = 5e-4
_READ_S = 5e-5
_READ_BYTES_PER_S = 2e9

Event = tuple[int, Size]
"""(storage, bytes taken; negative: given back)."""


def readers(step: Step) -> int:
    """Threads that read weights of this run ahead; 0: every weight is read when its turn comes.

    The source of 5.4 and later says that a model that is quantized while it is read is read in sequence. Measured runs
    of 5.17 on a T4 say otherwise: after loading, and only where bitsandbytes quantized, equal runs hold unlike blocks.
    """
    train = step.train
    return READERS if train.device_map and train.versions.transformers >= (5, 0) and not step.arch.on_cpu else 0


def warm_up(step: Step, adapted: Iterable[tuple[int, str]]) -> None:
    """Take and give back the block that from_pretrained begins with."""
    train, model = step.train, step.model
    if not train.device_map or step.arch.on_cpu:
        return
    targets = set(adapted)
    quantized = sum(
        spec.weight_elements * number
        for layer, number in model.distinct_layers()
        for spec in layer.linears
        if model_storage.is_quantized(spec, train, (id(layer), spec.name) in targets)
    )
    nbytes = warmup_bytes(
        model.num_parameters,
        quantized,
        train.quantization.kind,
        itemsize=ITEMSIZE[train.base_dtype],
        transformers=train.versions.transformers,
    )
    nbytes = min(nbytes, step.arch.warmup_limit or nbytes)
    if nbytes:
        step.eng.empty(nbytes, "int8", "loading")


def warmup_bytes(parameters: int, quantized: int, kind: str, *, itemsize: int, transformers: tuple[int, int]) -> int:
    """What from_pretrained takes in one piece, and gives back, before it puts weights on the GPU itself.

    Source: transformers modeling_utils.py caching_allocator_warmup. 4.50: the bytes of the unquantized model. 4.51 to
    4.57: half of them for every quantizer (a factor 4 for 2). Since 5.0 (get_total_byte_count): what the weights are
    going to need, half a byte for a 4-bit one, without scales (more than the card has: the weights do not fit).
    """
    if transformers < (4, 50):
        return 0
    if transformers < (5, 0):
        return parameters * itemsize // (2 if kind != "none" and transformers >= (4, 51) else 1)
    half_bytes = QUANTIZATIONS[kind].warm_up_half_bytes
    if half_bytes is None:
        half_bytes = 2 * itemsize
    return (parameters - quantized) * itemsize + quantized * half_bytes // 2


def warmup_limit(free: int, transformers: tuple[int, int]) -> int:
    """Most of `free` bytes of a card that the block of `warmup_bytes` takes where the weights need less; 0: no limit.

    Source: caching_allocator_warmup, 4.52 to 4.57: free memory less 1.2 GiB (4.50 and 4.51: 95 % of it).
    """
    if not (4, 50) <= transformers < (5, 0):
        return 0
    return max(free - int(1.2 * 2**30), 0) if transformers >= (4, 52) else free * 95 // 100


def by_name(step: Step) -> bool:
    """Whether weights come in the order of their names, not of the modules (safetensors; sorted since 5.0)."""
    return step.train.device_map and step.train.method != "full"


def overlap(events: Sequence[Event], arrivals: Sequence[int], threads: int) -> list[Event]:
    """Return the events of loading in the order that `threads` readers and one quantizing thread make.

    `events` are those of reading in sequence; `arrivals` the storages that hold a weight as it was read, in that order.
    What follows an arrival there, up to the next one, is its quantization. Times are nominal: see the constants.
    """
    starts = {storage: number for number, storage in enumerate(arrivals)}
    first = next((place for place, (storage, _) in enumerate(events) if storage in starts), len(events))
    work: list[tuple[list[Event], list[Event]]] = [([], []) for _ in arrivals]  # made, given back
    read: list[Event] = []
    for event in events[first:]:
        if event[0] in starts and event[1] > 0:
            read.append(event)
        else:
            work[len(read) - 1][event[1] < 0].append(event)
    free = [0.0] * threads
    now = len(read) * _ANNOUNCE_S
    timed: list[tuple[float, int, Sequence[Event]]] = []  # when, number, what then happens
    for number, (event, (made, given_back)) in enumerate(zip(read, work, strict=True)):
        begins = max(free[0], number * _ANNOUNCE_S)
        ends = begins + _READ_S + event[1] / _READ_BYTES_PER_S
        heapq.heapreplace(free, ends)
        now = max(now, ends)
        timed += (begins, len(timed), (event,)), (now, len(timed) + 1, made)
        now += _QUANTIZE_S * bool(made or given_back)
        timed.append((now, len(timed), given_back))
    timed.sort()
    out = list(events[:first])
    for _, _, happens in timed:
        out += happens
    return out
