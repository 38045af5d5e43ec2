"""predict(model, training, gpu) -> Prediction: the one way in. Bytes of allocated, reserved and device memory.

Three numbers, never mixed: *allocated* is torch.cuda.max_memory_allocated, *reserved* is max_memory_reserved,
*device* is what NVML shows for the process: reserved plus the CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from planner import timing
from planner.base.records import record, replace
from planner.base.units import GiB
from planner.calibration import Coefficients, Selection, priors
from planner.device import cuda_rules
from planner.device.hardware import CONTEXT_BYTES, CPU, Gpu
from planner.memory import allocator, sequence, walk
from planner.model.spec import ModelSpec, UnreadModel
from planner.plan.verdict import Verdict, verdict_of
from planner.quantizations import QUANTIZATIONS
from planner.step import linears, loading, program
from planner.step.engine import Record
from planner.step.transfers import PAGED_TRANSFER
from planner.training import TrainingSpec

if TYPE_CHECKING:  # rows of one length have no order
    from planner.dataset.orders import Orders

Origin = Literal["known", "computed", "assumed", "fitted"]

WORTH_SAYING = 1.03
"""Reserved memory with rows of unequal length over that with equal ones from which on a warning says so."""

STEPS = 2
"""Optimizer steps replayed: the first creates the state, the second meets the fragmentation the first left."""


@record
class Range:
    """An interval in bytes around an expected value."""

    low: int
    expected: int
    high: int

    def shifted(self, by: tuple[int, int, int]) -> Range:
        """Add a (low, expected, high) amount."""
        return Range(low=self.low + by[0], expected=self.expected + by[1], high=self.high + by[2])


@record
class Prediction:
    """What one configuration needs, and whether a card has it."""

    model: ModelSpec | UnreadModel
    training: TrainingSpec
    gpu: Gpu | None
    allocated: Range
    reserved: Range
    device: Range
    breakdown: walk.MemoryBreakdown
    trainable_parameters: int
    verdict: Verdict | None
    """None without a GPU."""
    warnings: tuple[str, ...]
    uncertainty: tuple[tuple[str, float], ...]
    """(reason, relative share) of the interval of the allocated figure."""
    via: Literal["program", "trace"] = "program"
    libraries: tuple[tuple[str, str], ...] = ()
    """Releases that were traced (see planner.traced)."""
    time: timing.StepTime | None = None
    """None without a GPU, or where no source states the card's rates."""

    @property
    def step_s(self) -> timing.Seconds | None:
        """Seconds of one optimizer step."""
        return self.time.step_s if self.time else None

    @property
    def capacity_bytes(self) -> int:
        """Memory the process may use on the card, its context included; 0 without a GPU."""
        return self.gpu.free_bytes if self.gpu else 0

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        import html

        rows: list[tuple[str, str]] = [("verdict", self.verdict or "no card named")]
        for name in ("allocated", "reserved", "device"):
            value: Range = getattr(self, name)
            text = f"{value.expected / GiB:,.2f} GiB ({value.low / GiB:,.2f} to {value.high / GiB:,.2f})"
            rows.append((name, text))
        if self.step_s is not None:
            rows.append(("step", f"{self.step_s.expected:,.3f} s ({self.step_s.low:,.3f} to {self.step_s.high:,.3f})"))
        body = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
        return f"<table><caption>{html.escape(self.model.model_id)}</caption><tbody>{body}</tbody></table>"

    @property
    def headroom_bytes(self) -> int:
        """Capacity minus the expected device memory (negative: missing)."""
        return self.capacity_bytes - self.device.expected


def architecture(gpu: Gpu | None, training: TrainingSpec) -> cuda_rules.Architecture:
    """The facts about card and libraries that decide which kernels run; an A100's where nothing is known."""
    versions = training.versions
    if gpu is not None and gpu.vendor == CPU:
        return replace(cuda_rules.Architecture.plain(), torch=versions.torch, bitsandbytes=versions.bitsandbytes)
    capability = (gpu.compute_capability if gpu is not None else None) or (8, 0)
    return cuda_rules.Architecture(
        capability=capability,
        num_sms=(gpu.sm_count if gpu else 0) or 108,
        torch=versions.torch,
        bitsandbytes=versions.bitsandbytes,
        warmup_limit=loading.warmup_limit(gpu.rooms[1], versions.transformers) if gpu is not None else 0,
        cudnn_attention=cuda_rules.prefers_cudnn_attention(capability, versions.torch),
    )


def predict(
    model: ModelSpec,
    training: TrainingSpec,
    gpu: Gpu | None = None,
    *,
    warnings: tuple[str, ...] = (),
    coefficients: Coefficients | None = None,
    orders: Orders | None = None,
) -> Prediction:
    """Predict the memory of one training step and, with a GPU, whether the run fits and how long a step takes.

    Args:
        coefficients: of the time model; the card's priors by default.
        orders: in which micro batches of unequal length arrive, the longest being `training.seq_len`; None: they are
            equally long.

    Raises:
        PlannerError: for settings that exclude each other or that the model does not have.
    """
    run = program.run(model, training, architecture(gpu, training))
    alike = None
    if orders is not None:
        run, alike = _neediest(run, model, training, orders, gpu)
    breakdown = walk.breakdown(run.record, run.layer_names)
    reasons = uncertainty(model, training)
    allocated, reserved, out_of_memory = _with_allocator(run.record, breakdown.peak_allocated_bytes, reasons, gpu)
    if orders:
        equal = reserved
        reserved, out_of_memory = _over_orders(
            model, training, orders, alike, (equal, out_of_memory), run.record, reasons, gpu
        )
        if reserved.expected > WORTH_SAYING * equal.expected:
            warnings = (*warnings, _about_orders(reserved, equal))
    if gpu is not None and gpu.vendor == CPU:
        reserved = allocated  # a CPU's memory is malloc's: no cache that is kept
    device = reserved.shifted(gpu.context_bytes if gpu is not None else CONTEXT_BYTES)
    breakdown = with_whole_blocks(breakdown, allocated.expected)
    return Prediction(
        model=model,
        training=training,
        gpu=gpu,
        allocated=allocated,
        reserved=reserved,
        device=device,
        breakdown=breakdown,
        trainable_parameters=int(run.trainable_parameters),
        verdict=verdict_of(allocated, gpu.rooms, out_of_memory) if gpu else None,
        warnings=(*warnings, *training_warnings(model, training, gpu)),
        uncertainty=reasons,
        time=_time(run.record, training, gpu, coefficients),
    )


def predict_on(
    model: ModelSpec, training: TrainingSpec, gpu: Gpu, chosen: Selection | None, orders: Orders | None = None
) -> Prediction:
    """Predict with a card's calibration (None: its priors)."""
    if chosen is None:
        return predict(model, training, gpu, orders=orders)
    return predict(model, training, chosen.card(gpu), coefficients=chosen.coefficients, orders=orders)


def _time(
    record: Record, training: TrainingSpec, gpu: Gpu | None, coefficients: Coefficients | None
) -> timing.StepTime | None:
    if gpu is None or not timing.predictable(gpu):
        return None
    room = None
    if any(kernel.op == PAGED_TRANSFER for kernel in record.kernels):
        room = gpu.rooms[1] - walk.peak_bytes(record)
    return timing.step_time(record, training, gpu, coefficients or priors(gpu), room)


def _with_allocator(
    record: Record, peak: int, reasons: tuple[tuple[str, float], ...], gpu: Gpu | None
) -> tuple[Range, Range, bool]:
    small = sequence.small_peak(record, allocator.SMALL_SIZE)
    return allocator_ranges(sequence.expand(record, STEPS, allocator.SMALL_SIZE), small, peak, reasons, gpu)


def _neediest(
    run: program.Program, model: ModelSpec, training: TrainingSpec, orders: Orders, gpu: Gpu | None
) -> tuple[program.Program, int | None]:
    """The program of the micro batch that needs most: the longest, or the next where kernels pad an odd length.

    With the next comes the length that needs as much as the longest (`Orders.order`).
    """
    arch = architecture(gpu, training)

    def of(length: int) -> program.Program:
        return program.run(model, replace(training, seq_len=length), arch)

    most = walk.peak_bytes(run.record)
    short, needy = orders.seen.shortest, orders.second
    other = of(needy)
    if walk.peak_bytes(other.record) <= most:
        return run, None
    while needy - short > 2:
        middle = (short + needy) // 2 | 1  # an odd one is no multiple of what kernels want
        if middle == needy:
            break
        if walk.peak_bytes(of(middle).record) > most:
            needy = middle
        else:
            short = middle
    return other, short


def _over_orders(
    model: ModelSpec,
    training: TrainingSpec,
    orders: Orders,
    alike: int | None,
    equal: tuple[Range, bool],
    record: Record,
    reasons: tuple[tuple[str, float], ...],
    gpu: Gpu | None,
) -> tuple[Range, bool]:
    """Reserved memory, and whether the card is too small, where micro batches differ in length.

    Expected: the typical order; low: the longest micro batch first, as `equal`; high: the slowly growing orders.
    """
    from planner.dataset.orders import SLOW, TYPICAL

    arch = architecture(gpu, training)
    peak, small = walk.peak_bytes(record), sequence.small_peak(record, allocator.SMALL_SIZE)
    known: dict[tuple[int, bool], Record] = {}

    def record_of(length: int, held: bool) -> Record:
        if (length, held) not in known:
            one = replace(training, seq_len=length, gradient_accumulation_steps=1 + held)
            known[length, held] = program.run(model, one, arch).record
        return known[length, held]

    accumulation = training.gradient_accumulation_steps
    starts = orders.starts(accumulation)

    def reserved_in(distance: float) -> tuple[Range, bool]:
        order = orders.order(distance, alike)
        events = sequence.unequal(order, accumulation, record_of, allocator.SMALL_SIZE, starts)
        return allocator_ranges(events, small, peak, reasons, gpu)[1:]

    typical, ran_out = reserved_in(TYPICAL)
    low, high = min(equal[0].low, typical.low), max(equal[0].high, typical.high)
    for distance in SLOW:
        if gpu is None or high < gpu.rooms[2]:  # else it says already that the card may be full
            high = max(high, reserved_in(distance)[0].high)
    return Range(low=low, expected=typical.expected, high=high), ran_out


def _about_orders(reserved: Range, equal: Range) -> str:
    return (
        f"rows of unequal length fragment PyTorch's cache: {reserved.expected / GiB:.1f} GiB are reserved when they "
        f"come in a typical order, {equal.expected / GiB:.1f} GiB when the longest comes first; grouping by length, "
        "packing or PYTORCH_ALLOC_CONF=expandable_segments:True avoids it"
    )


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
    if training.loss == "chunked" and not training.uses_own_modules:
        reasons.append(("chunked loss: chunk count and lifetimes differ between implementations", 0.03))
    if training.kernels == "unsloth":
        reasons.append(("unsloth's fused kernels are modelled coarsely", 0.06))
    if training.compile:
        reasons.append(("torch.compile decides what it keeps", 0.10))
    if training.gradient_checkpointing == "offload":
        reasons.append(("offloading keeps some inputs on the GPU until their copy is done", 0.03))
    if QUANTIZATIONS[training.quantization.kind].grouped:
        reasons.append(("group size of the quantized checkpoint", 0.02))
    if training.uses_own_modules:
        reasons += _own_modules(model, training)
    own_attention = any(
        not layer.attention.has_sdpa(training.versions.transformers)
        and not layer.attention.logit_softcap
        and layer.attention.position != "none"
        for layer, _ in model.distinct_layers()
    )
    if own_attention:
        reasons.append(("the class's own attention keeps score matrices whose lifetimes are modelled coarsely", 0.2))
    if model.derived:
        reasons.append(("a class outside the registry: operations are taken from a common decoder layer", 0.10))
    if model.remote_code:
        reasons.append(("the model's own code is not in transformers", 0.05))
    if any(layer.experts is not None for layer, _ in model.distinct_layers()):
        reasons.append(("expert kernels", 0.03))
    if training.lora is not None and training.lora.use_dora:
        reasons.append(("DoRA's weight norms", 0.03))
    return tuple(reasons)


def _own_modules(model: ModelSpec, training: TrainingSpec) -> Iterator[tuple[str, float]]:
    """What is not known of litgpt's modules (planner.step.classes.litgpt)."""
    dense = all(layer.experts is None and layer.attention.kind == "standard" for layer, _ in model.distinct_layers())
    four_bit = QUANTIZATIONS[training.quantization.kind].packed_4bit
    if not dense:
        yield "litgpt's experts and latent attention are approximated by those of transformers", 0.15
    elif four_bit and training.versions.bitsandbytes < linears.KEEPS_NO_INPUT:
        yield "what bitsandbytes before 0.43 kept between litgpt's micro batches is not wholly explained", 0.15
    else:
        yield "litgpt's releases differ", 0.03


def lacks_bf16(gpu: Gpu) -> bool:
    """Whether the card has no bf16 matrix units (NVIDIA before compute capability 8.0)."""
    capability = gpu.compute_capability
    return gpu.bf16_native is False or (capability is not None and capability < (8, 0) and gpu.vendor != "AMD")


def training_warnings(model: ModelSpec | None, training: TrainingSpec, gpu: Gpu | None) -> tuple[str, ...]:
    """Visible warnings: what the hardware lacks, and what the settings cost unnoticed (None: an unread model)."""
    notes: list[str] = []
    capability = gpu.compute_capability if gpu else None
    half = "bf16" in (training.autocast, training.base_dtype, training.quantization.compute_dtype)
    if gpu and half and lacks_bf16(gpu):
        notes.append(f"{gpu.name} has no bf16 tensor cores: use fp16 (--autocast fp16 --base-dtype fp16)")
    if {training.autocast, training.base_dtype} == {"bf16", "fp16"}:
        notes.append(
            f"autocast {training.autocast} makes a copy of every {training.base_dtype} weight it meets: "
            f"--base-dtype {training.autocast} avoids it"
        )
    if training.uses_own_modules and (training.kernels != "none" or training.attention == "eager"):
        asked = "eager attention" if training.attention == "eager" else f"{training.kernels} kernels"
        notes.append(f"litgpt's own modules have no {asked}: the estimate is without")
    if training.attention == "flash2" and capability and capability < (8, 0):
        notes.append(f"FlashAttention-2 needs compute capability 8.0, {gpu.name if gpu else ''} has less: use sdpa")
    if model is None:
        return tuple(notes)
    experts = [layer.experts for layer, _ in model.distinct_layers() if layer.experts]
    if experts and QUANTIZATIONS[training.quantization.kind].by_bitsandbytes:
        notes.append("expert weights are fused 3-D parameters that bitsandbytes does not quantize: they stay 16-bit")
    if model.tied and training.lora and "lm_head" in training.lora.modules_to_save:
        notes.append("lm_head is tied to the embeddings: saving it as a module trains an untied copy")
    if _int(training.seq_len) > model.max_position_embeddings > 0:
        notes.append(
            f"seq_len {_int(training.seq_len)} is longer than the model's {model.max_position_embeddings} positions"
        )
    return tuple(notes)


def _int(value: Any) -> int:
    return int(value.max()) if hasattr(value, "max") else int(value)


__all__ = ["GiB", "Prediction", "Range", "Verdict", "architecture", "predict", "uncertainty"]
