"""predict(model, training, gpu) -> Prediction: the one way in. Bytes of allocated, reserved and device memory.

Three numbers, never mixed: *allocated* is torch.cuda.max_memory_allocated, *reserved* is max_memory_reserved,
*device* is what NVML shows for the process: reserved plus the CUDA context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from planner.base.records import record
from planner.base.units import GiB
from planner.device.hardware import CONTEXT_BYTES, CPU, Gpu
from planner.memory import allocator, sequence, walk
from planner.model.spec import ModelSpec, UnreadModel
from planner.plan.intervals import Range, allocator_ranges, uncertainty, with_whole_blocks
from planner.plan.notes import training_warnings
from planner.plan.orders import _about_orders, _neediest, _over_orders
from planner.plan.verdict import Verdict, verdict_of
from planner.step import program
from planner.step.architecture import architecture
from planner.step.engine import Record
from planner.timing import rates, step_time
from planner.timing.coefficients import Coefficients, Selection, priors
from planner.training.spec import TrainingSpec

if TYPE_CHECKING:  # rows of one length have no order
    from planner.runs.dataset.orders import Orders

Origin = Literal["known", "computed", "assumed", "fitted"]

WORTH_SAYING = 1.03
"""Reserved memory with rows of unequal length over that with equal ones from which on a warning says so."""

STEPS = 2
"""Optimizer steps replayed: the first creates the state, the second meets the fragmentation the first left."""


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
    """Releases that were traced (see planner.plan.traced)."""
    time: step_time.StepTime | None = None
    """None without a GPU, or where no source states the card's rates."""

    @property
    def step_s(self) -> step_time.Seconds | None:
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
) -> step_time.StepTime | None:
    if gpu is None or not rates.predictable(gpu):
        return None
    room = None
    if any(kernel.kind.only_without_room for kernel in record.kernels):
        room = gpu.rooms[1] - walk.peak_bytes(record)
    return step_time.step_time(record, training, gpu, coefficients or priors(gpu), room)


def _with_allocator(
    record: Record, peak: int, reasons: tuple[tuple[str, float], ...], gpu: Gpu | None
) -> tuple[Range, Range, bool]:
    small = sequence.small_peak(record, allocator.SMALL_SIZE)
    return allocator_ranges(sequence.expand(record, STEPS, allocator.SMALL_SIZE), small, peak, reasons, gpu)


__all__ = ["GiB", "Prediction", "Verdict", "predict"]
