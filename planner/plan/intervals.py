"""Intervals around a prediction, and where their widths come from."""

from __future__ import annotations

from planner.base.records import record, replace
from planner.device.hardware import CPU, Gpu
from planner.memory import allocator, sequence, walk
from planner.model.spec import ModelSpec
from planner.step.classes.registry import habits_of
from planner.step.modules.mixers import MIXERS
from planner.training.losses import KERNEL_SETS, LOSSES
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec


@record
class Range:
    """An interval in bytes around an expected value."""

    low: int
    expected: int
    high: int

    def shifted(self, by: tuple[int, int, int]) -> Range:
        """Add a (low, expected, high) amount."""
        return Range(low=self.low + by[0], expected=self.expected + by[1], high=self.high + by[2])


def allocator_ranges(
    events: list[tuple[int, int]], small: int, peak: int, reasons: tuple[tuple[str, float], ...], gpu: Gpu | None
) -> tuple[Range, Range, bool]:
    """Replay the allocator without a limit, and within the card when the cache would outgrow it.

    The small pool (requests up to 1 MiB) fragments little and is taken at its peak `small`, rounded to segments; only
    the large pool is replayed. Returns allocated, reserved, and whether the card was too small for the replay.
    """
    share = sum(s for _, s in reasons)
    replayed = allocator.replay(events)
    if gpu is None or gpu.vendor != CPU:
        requested = events.requested if isinstance(events, sequence.Events) else _requested(events)
        peak += replayed.peak_allocated - requested
    small_reserved = -(-small // allocator.SMALL_SEGMENT) * allocator.SMALL_SEGMENT
    expected, ran_out = replayed.peak_reserved + small_reserved, False
    allocated = Range(
        low=int(peak * (1 - share)),
        expected=peak,
        high=max(int(peak * (1 + share)), replayed.peak_allocated + small),
    )
    limit = gpu.rooms[1] if gpu else 0
    unlimited = expected
    if gpu and expected > limit:
        found = _within(events, max(limit - small_reserved, 1))
        ran_out = found is None
        expected = unlimited if found is None else found + small_reserved
    high = max(int(unlimited * (1 + share + FRAGMENTATION)), allocated.high)
    if gpu and not ran_out and allocated.high <= limit:
        high = max(expected, min(high, gpu.rooms[2]))  # the cache cannot outgrow the card
    reserved = Range(low=min(allocated.low, expected), expected=expected, high=high)
    return allocated, reserved, ran_out


def with_whole_blocks(found: walk.MemoryBreakdown, allocated: int) -> walk.MemoryBreakdown:
    """The breakdown with what blocks have beyond their requests (`_requested`) as a line of its own."""
    beyond = allocated - found.peak_allocated_bytes
    if beyond <= 0:
        return found
    return replace(found, peak_allocated_bytes=allocated, ledger=(*found.ledger, ("unsplit blocks", beyond)))


def _requested(events: list[tuple[int, int]]) -> int:
    """Peak of what is asked for, in blocks of 512 bytes.

    torch counts whole blocks as allocated, and a large one whose rest is at most 1 MiB is not split.
    """
    level = peak = 0
    for _, size in events:
        level += walk.rounded(size)
        peak = max(peak, level)
    return peak


def _within(events: list[tuple[int, int]], capacity: int) -> int | None:
    """Peak reserved bytes of a process that may have `capacity`; None if that is too little.

    A process that meets its limit gives its cached segments back and tries again before it fails. Whether enough of
    them are whole then depends on where the driver puts segments: one layout that works is taken for an answer.
    """
    for rising in (False, True):
        try:
            return allocator.replay(events, allocator.Settings(capacity=capacity, rising=rising)).peak_reserved
        except allocator.OutOfMemory:
            continue
    return None


FRAGMENTATION = 0.05
"""Share added to the upper end of reserved memory: what loading and validation leave behind is not replayed."""


def uncertainty(model: ModelSpec, training: TrainingSpec) -> tuple[tuple[str, float], ...]:
    """Why the allocated figure may be off, each with its relative share."""
    reasons = [("kernel temporaries and library releases", 0.01)]
    if LOSSES[training.loss].logits == "chunks" and not OWN_MODULES[training.own_modules].knows_chunks:
        reasons.append(("chunked loss: chunk count and lifetimes differ between implementations", 0.03))
    doubt = KERNEL_SETS[training.kernels].doubt
    if doubt:
        reasons.append((f"{training.kernels}'s fused kernels are modelled coarsely", doubt))
    if training.compile:
        reasons.append(("torch.compile decides what it keeps", 0.10))
    if training.gradient_checkpointing == "offload":
        reasons.append(("offloading keeps some inputs on the GPU until their copy is done", 0.03))
    if QUANTIZATIONS[training.quantization.kind].grouped:
        reasons.append(("group size of the quantized checkpoint", 0.02))
    doubts = habits_of(model.model_type, training.own_modules).doubts
    reasons += doubts(model, training) if doubts is not None else ()
    own_attention = any(
        not attention.has_sdpa(training.versions.transformers)
        and not attention.logit_softcap
        and attention.position != "none"
        for attention in model.attentions()
    )
    if own_attention:
        reasons.append(("the class's own attention keeps score matrices whose lifetimes are modelled coarsely", 0.2))
    kinds = dict.fromkeys(layer.mixer.kind for layer, _ in model.distinct_layers())
    reasons += [reason for kind in kinds for reason in MIXERS[kind].uncertainty]
    if model.derived:
        reasons.append(("a class outside the registry: operations are taken from a common decoder layer", 0.10))
    if model.remote_code:
        reasons.append(("the model's own code is not in transformers", 0.05))
    if any(layer.experts is not None for layer, _ in model.distinct_layers()):
        reasons.append(("expert kernels", 0.03))
    if training.lora is not None and training.lora.use_dora:
        reasons.append(("DoRA's weight norms", 0.03))
    return tuple(reasons)
