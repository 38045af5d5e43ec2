"""Traced: what the worker of `calibrate` answered about one run, checked and typed, and a prediction made from it.

Bytes are blocks of 512 as the CUDA allocator counts them, FLOPs those of one micro batch. Nothing here runs a trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from planner.base.errors import InvalidInput
from planner.base.records import record
from planner.device.cuda_rules import Architecture
from planner.device.hardware import CONTEXT_BYTES, Gpu
from planner.memory import allocator
from planner.memory.walk import MemoryBreakdown, Moment, SegmentPeak
from planner.model.spec import ModelSpec, UnreadModel
from planner.plan.intervals import allocator_ranges, with_whole_blocks
from planner.plan.notes import training_warnings
from planner.plan.predict import Prediction
from planner.plan.verdict import verdict_of
from planner.training.spec import TrainingSpec

_LAYER = re.compile(r"layer\.(\d+) (forward|backward)")
_PHASES = {"head": "loss", "embedding": "embedding", "loss": "loss", "head backward": "head backward"}

Shares = tuple[tuple[str, int], ...]


@record
class TracedSegment:
    """A stretch of the step: its levels in bytes, and what is alive at its highest by category."""

    name: str
    phase: str
    layer: int
    """Number of the decoder layer; -1 outside the layers."""
    start: int
    peak: int
    end: int
    op: str
    module: str
    ledger: Shares


@record
class Traced:
    """One step of the real libraries."""

    model: UnreadModel
    traced_layers: tuple[int, ...]
    """Depths of the stacks that were run; the last is the model's own depth if nothing was extrapolated."""
    static_bytes: int
    trainable_parameters: int
    segments: tuple[TracedSegment, ...]
    modules: Shares
    """Bytes alive at the peak by module, largest first."""
    flops: Mapping[str, Mapping[str, float]]
    """By phase (forward with the loss, recompute, backward) and operation."""
    notes: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]
    events: tuple[tuple[int, int], ...] = ()
    """(storage, +-requested bytes) of loading and two steps, at full depth; empty if not asked for."""

    @property
    def peak(self) -> TracedSegment:
        """The segment that reaches the highest level."""
        return max(self.segments, key=lambda s: s.peak)

    @property
    def extrapolated(self) -> bool:
        """Whether fewer layers were run than the model has."""
        return self.traced_layers[-1] != self.model.num_layers

    @property
    def moment(self) -> Moment:
        """Where the peak is."""
        top = self.peak
        return Moment(phase=top.phase, layer=top.layer, op=top.op)


def request(
    config: Mapping[str, Any], training: TrainingSpec, arch: Architecture, layers: str | int, *, events: bool = False
) -> dict[str, Any]:
    """What to ask the worker (see calibrate.oracle.worker)."""
    facts = {
        "capability": list(arch.capability), "num_sms": arch.num_sms, "torch": list(arch.torch),
        "bitsandbytes": list(arch.bitsandbytes), "cudnn_attention": arch.cudnn_attention,
    }  # fmt: skip
    return {
        "config": dict(config), "training": training.describe(), "layers": layers, "arch": facts, "events": events,
    }  # fmt: skip


def read(answer: Mapping[str, Any], model_id: str) -> Traced:
    """Check and type the worker's answer.

    Raises:
        InvalidInput: it is not what was agreed.
    """
    try:
        return _read(answer, model_id)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"the trace's answer has no usable {error}; run again with --no-cache, and report it if that does not help"
        ) from None


def _read(answer: Mapping[str, Any], model_id: str) -> Traced:
    found, model = answer["summary"], answer["model"]
    segments = tuple(_segment(s) for s in found["segments"])
    if not segments or not found["traced_layers"]:
        raise ValueError("segments")
    return Traced(
        model=UnreadModel(
            model_id=model_id,
            model_type=str(model["model_type"]),
            num_layers=int(found["layers"]),
            hidden_size=int(model["hidden_size"]),
            vocab_size=int(model["vocab_size"]),
            num_parameters=int(found["parameters"]),
            max_position_embeddings=int(model["max_position_embeddings"]),
        ),
        traced_layers=tuple(int(n) for n in found["traced_layers"]),
        static_bytes=int(found["static_bytes"]),
        trainable_parameters=int(found["trainable_parameters"]),
        segments=segments,
        modules=_shares(found["modules"]),
        flops={str(p): {str(k): float(v) for k, v in counts.items()} for p, counts in found["flops"].items()},
        notes=tuple(str(n) for n in found["notes"]),
        versions=tuple((str(k), str(v)) for k, v in found["versions"].items()),
        events=tuple((int(i), int(n)) for i, n in answer.get("events", ())),
    )


def _segment(values: Mapping[str, Any]) -> TracedSegment:
    name = str(values["name"])
    match = _LAYER.fullmatch(name)
    return TracedSegment(
        name=name,
        phase=match[2] if match else _PHASES.get(name, name),
        layer=int(match[1]) if match else -1,
        start=int(values["start"]),
        peak=int(values["peak"]),
        end=int(values["end"]),
        op=str(values["op"]),
        module=str(values["module"]),
        ledger=_shares(values["ledger"]),
    )


def _shares(values: Mapping[str, Any]) -> Shares:
    return tuple((str(name), int(number)) for name, number in values.items())


# --- a prediction ----------------------------------------------------------------------------------------------------

_REASONS: tuple[tuple[str, float], ...] = (("kernel temporaries and library releases", 0.01),)


def predict_traced(
    traced: Traced,
    training: TrainingSpec,
    gpu: Gpu | None = None,
    *,
    model: ModelSpec | None = None,
    warnings: tuple[str, ...] = (),
) -> Prediction:
    """Return what planner.plan.predict would, from the trace's events instead of the program's.

    `model` is what the registry knows of the family, if anything. The tracer adds gradients out of place, which a
    run on CUDA does not: where a peak lies in such a sum the trace is high by one tensor of the residual stream.
    """
    reasons = _REASONS
    if training.gradient_checkpointing == "offload":
        reasons += (("offloading keeps some inputs on the GPU until their copy is done", 0.03),)
    peak = traced.peak
    small, large = _pools(traced.events)
    allocated, reserved, ran_out = allocator_ranges(large, small, peak.peak, reasons, gpu)
    segments = tuple(SegmentPeak(phase=s.phase, layer=s.layer, bytes=s.peak) for s in traced.segments)
    breakdown = MemoryBreakdown(
        peak_allocated_bytes=peak.peak,
        moment=traced.moment,
        ledger=peak.ledger,
        static_bytes=traced.static_bytes,
        segments=segments,
    )
    notes = training_warnings(model, training, gpu) if model is not None else ()
    return Prediction(
        model=model or traced.model,
        training=training,
        gpu=gpu,
        allocated=allocated,
        reserved=reserved,
        device=reserved.shifted(gpu.context_bytes if gpu is not None else CONTEXT_BYTES),
        breakdown=with_whole_blocks(breakdown, allocated.expected),
        trainable_parameters=traced.trainable_parameters,
        verdict=verdict_of(allocated, gpu.rooms, ran_out) if gpu else None,
        warnings=(*warnings, *traced.notes, *notes),
        uncertainty=reasons,
        via="trace",
        libraries=traced.versions,
    )


def _pools(events: Iterable[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
    """The peak of the small pool, in blocks, and the events of the large one."""
    level = peak = 0
    large: list[tuple[int, int]] = []
    for storage, nbytes in events:
        if abs(nbytes) > allocator.SMALL_SIZE:
            large.append((storage, nbytes))
            continue
        blocks = -(-abs(nbytes) // allocator.MIN_BLOCK) * allocator.MIN_BLOCK
        level += blocks if nbytes > 0 else -blocks
        peak = max(peak, level)
    return peak, large
