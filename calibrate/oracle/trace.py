"""Trace: a training step of the real libraries under fake tensors, every allocation recorded.

The step is the second of a run: what the first one leaves (optimizer state, what modules make when they first run) is
there.

    python -m calibrate.oracle.command --config config.json --training training.json [--layers N] [--events FILE]
        prints one JSON document (static bytes, peaks of both steps, what is alive at the peak, peaks per segment)
    python -m calibrate.oracle.command ... --ops backward [--segment layer.1] [--step 1] [--min-bytes 4096]
        prints the allocations and releases of a phase in order: bytes, live total, operation, module
    --layers auto      extrapolate peaks from stacks of 3 and 4 layers (calibrate.oracle.extrapolate)
    --capability 7.5   which GPU's kernels (default 8.0); --plain switches every CUDA rule off

`config.json` is a Hugging Face config; `training.json` holds TrainingSpec fields, nested or flat as
`TrainingSpec.describe()` prints them ("lora.r": 16). Run it in a process of its own.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calibrate.model import fake_model
from calibrate.oracle import cuda_semantics
from calibrate.oracle.result import STEPS, TraceResult
from calibrate.oracle.step import Step
from calibrate.oracle.tracker import Tracker
from planner.base.errors import Contradiction, InvalidInput
from planner.device.cuda_rules import Architecture
from planner.training.losses import LOSSES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec


def trace(
    config: dict[str, Any],
    training: TrainingSpec,
    *,
    layers: int | None = None,
    arch: Architecture | None = None,
    real: bool = False,
) -> TraceResult:
    """Run a training step, the optimizer's state being there, and return what was allocated.

    Args:
        config: a Hugging Face model config.
        training: the settings of the run.
        layers: decoder layers to keep; None for the model's own depth.
        arch: the GPU whose kernels are imitated.
        real: run real CPU tensors instead of fake ones (tests; small models only).
    """
    arch = arch or Architecture()
    # A collection in mid-step would make release times depend on the process's history; steps leave no tensor cycles.
    # None is made before it either: walking what the libraries have imported takes as long as tracing a layer.
    gc.disable()
    try:
        refuse_unsupported(training)
        result = _trace(fake_model.build(config, training, layers), training, arch, real=real)
        if result is None:
            whole = _trace(fake_model.build(config, training, layers), training, arch, real=real, whole_first_step=True)
            assert whole is not None
            return whole
        return result
    finally:
        gc.enable()


def _trace(
    built: tuple[nn.Module, list[str]],
    training: TrainingSpec,
    arch: Architecture,
    *,
    real: bool,
    whole_first_step: bool = False,
) -> TraceResult | None:
    """Trace a model; None if what stands for the first step would not leave what a first step leaves."""
    model, notes = built
    counts = _parameters(model)
    host_ops = frozenset({"aten.lift_fresh"}) if arch.host_scalars else frozenset()
    tracker = Tracker(cuda_semantics.kernel_temporaries(arch), host_ops, cuda_semantics.LATE_OPS)
    with ExitStack() as stack:
        if not real:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(cuda_semantics.transformers_as_on_device(padded=training.padded))
            stack.enter_context(cuda_semantics.grouped_mm_dtypes())
        stack.enter_context(cuda_semantics.cuda_autocast_lists(arch.autocast_lists))
        stack.enter_context(fake_model.quantized_parameters())
        _load(model, training, tracker, real=real)
        stack.enter_context(tracker)
        stack.enter_context(cuda_semantics.cuda_functions(arch, force_flash=training.attention == "flash2"))
        step = Step(model, training, tracker, arch, real=real)
        if not step.num_layers:
            raise InvalidInput("no stack of decoder layers was found in the model; its class cannot be traced")
        for number in range(1, STEPS + 1):
            tracker.labels.step = number
            if number == 1 and not whole_first_step:
                step.prepare()
            else:
                step.run()
        if not whole_first_step and not step.stands_for_the_first():
            return None
        result = _result(tracker, step.num_layers, notes)
    micro_steps = step.micro_steps
    result.segment_flops = {key[1:]: number // micro_steps for key, number in tracker.flops.items() if key[0] == STEPS}
    result.parameters, result.trainable_parameters = counts
    return result


def _parameters(model: nn.Module) -> tuple[int, int]:
    """Elements of the base model's parameters and of the trainable ones; a shared parameter counts once."""
    base = trainable = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            base += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
    return base, trainable


def refuse_unsupported(training: TrainingSpec) -> None:
    """Refuse settings that the trace would silently leave out.

    Raises:
        Contradiction: naming the setting and what to choose.
    """
    lora, quant = training.lora, training.quantization
    reasons = (
        (training.kernels != "none", f"{training.kernels} kernels; choose --kernels none"),
        (training.compile, "torch.compile; drop --compile"),
        (training.optimizer_in_backward, "an optimizer in the backward; drop --optimizer-in-backward"),
        (not LOSSES[training.loss].traced, f"a {training.loss} loss; choose --loss full-logits-fp32"),
        (QUANTIZATIONS[quant.kind].grouped, f"{quant.kind} bases; choose nf4, fp4, int8 or none"),
        (quant.kind != "none" and quant.quantized_modules != "linears", "a partly quantized base; drop the option"),
        (lora is not None and bool(lora.target_slices), "adapters on slices of a module; drop --target-slices"),
    )
    for unsupported, what in reasons:
        if unsupported:
            raise Contradiction(f"the trace runs the libraries themselves and has no {what}")


def _load(model: nn.Module, training: TrainingSpec, tracker: Tracker, *, real: bool) -> None:
    make = fake_model.RandomMaker() if real else fake_model.fake_maker
    for name, tensor in fake_model.materialise(model, training, make):
        path, _, leaf = name.rpartition(".")
        tracker.labels.modules[:] = [path]
        tracker.adopt(tensor, leaf)
    tracker.labels.modules.clear()


def _result(tracker: Tracker, layers: int, notes: list[str]) -> TraceResult:
    live = static = 0
    peaks = dict.fromkeys(range(1, STEPS + 1), 0)
    segments: dict[str, int] = {}
    reached: dict[str, int] = {}
    peak_event = 0
    for index, event in enumerate(tracker.events):
        live += event.nbytes
        if event.step == 0:
            static = live
            continue
        if live > peaks[event.step]:
            peaks[event.step] = live
            if event.step == STEPS:
                peak_event = index
        if event.step == STEPS and live > segments.get(event.segment, 0):
            segments[event.segment] = live
            reached[event.segment] = index
    return TraceResult(
        static_bytes=static,
        step_peaks=list(peaks.values()),
        peak_event=peak_event,
        segment_peaks=segments,
        segment_peak_events=reached,
        blocks=tracker.blocks,
        events=list(tracker.events),
        layers=layers,
        notes=notes,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")}


# --- input ---------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Library chatter goes to stderr; stdout carries one document."""
    import logging

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
