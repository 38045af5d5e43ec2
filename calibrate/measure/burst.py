"""A worker process: one configuration, warm-up and timed real training steps, raw values out as ONE JSON line.

    python -m calibrate.measure.burst < request.json

The model is the genuine transformers class with random weights at real dimensions, quantized by bitsandbytes, adapted
by PEFT; weights are made on the device module by module, so no host memory holds the model and nothing is downloaded.
Running out of memory is a result, not an error. Everything that libraries print goes to stderr.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from calibrate.measure import recorder
from calibrate.measure.device import CudaDevice, Device, MemorySampler, open_device
from planner.base.errors import InvalidInput, PlannerError, one_line
from planner.step.kernels import UNMARKED, Marks, profile_marks
from planner.training.losses import LOSSES

PROTOCOL = 1
"""Version of request and result."""
PHASES = ("forward", "backward", "optimizer")
LEAST_STEPS = 4
"""Timed steps that every burst runs, however long they take."""
ENOUGH_S = 8.0
"""Seconds of timed steps after which a burst asks for no more."""

LONGEST, NAME = 24, 100
"""Kernels that a profile names, by their seconds in all; characters of a kernel's name (templates run to thousands)."""


def main() -> int:
    """Read one request from stdin, run it, write one JSON line to the real stdout; --ahead: import first."""
    if sys.argv[1:] == ["--ahead"]:
        from calibrate.measure.preload import preload

        preload()
    answer(json.loads(sys.stdin.read()))
    return 0


def answer(request: dict[str, Any]) -> None:
    """Run one request in this process and write its result."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # from here on whatever a library prints is chatter
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    result = {"protocol": PROTOCOL, **run(request)}
    out.write(json.dumps(result) + "\n")
    out.flush()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run one burst and return its raw values; `status` is ok, oom or error."""
    import torch

    began = time.perf_counter()
    threads = int(request.get("threads", 1))
    device = open_device(request["device"], threads)
    sampler = MemorySampler(device.used_bytes)  # its baseline is what was there before this process's CUDA context
    burst = _Burst(request, device, sampler)
    try:
        _prepare(device, request, threads)
        with sampler.running():
            burst.measure()
        status, message = "ok", ""
    except PlannerError as error:
        status, message = "error", str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        status, message = "oom", one_line(str(error), 2000)
    except RuntimeError as error:
        kind = "oom" if _is_memory(str(error)) else "error"
        status, message = kind, one_line(f"{type(error).__name__}: {error}", 2000)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError) as error:
        status, message = "error", one_line(f"{type(error).__name__}: {error}", 2000)
    return {
        "status": status, "message": message, **burst.found, "device_memory": sampler.result(),
        "device_identity": _quietly(device.identity), "device_notes": device.notes, "versions": versions(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", "")),
        "threads": torch.get_num_threads(), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _prepare(device: Device, request: dict[str, Any], threads: int) -> None:
    """Make the device ready: threads of a CPU; a GPU's context, with the allocator's settings."""
    import torch

    if device.kind == "cpu":
        torch.set_num_threads(threads)
    elif isinstance(device, CudaDevice):
        torch.cuda.set_device(device.index)
        if request.get("allocator"):
            torch.cuda.memory._set_allocator_settings(request["allocator"])
    torch.manual_seed(int(request.get("seed", 0)))


def timed_steps(most: int, step_s: float) -> int:
    """How many steps a burst of such steps will time."""
    return min(most, max(LEAST_STEPS, math.ceil(ENOUGH_S / max(step_s, 1e-9))))


def _is_memory(message: str) -> bool:
    """torch's CPU allocator and some CUDA libraries report exhausted memory as a plain RuntimeError."""
    return any(mark in message.lower() for mark in ("out of memory", "can't allocate memory", "alloc_failed"))


def _quietly(read: Any) -> Any:
    try:
        return read()
    except (PlannerError, RuntimeError, OSError) as error:
        return {"error": one_line(str(error), 200)}


def versions() -> dict[str, str]:
    """Releases of everything that decides how fast a step is."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda or ""}
    for name in ("transformers", "peft", "bitsandbytes", "accelerate"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
        module = sys.modules.get(name)  # a folder on PYTHONPATH has no metadata
        if name not in found and module is not None:
            found[name] = str(getattr(module, "__version__", ""))
    if torch.version.cuda and torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


class _Burst:
    """One configuration being measured; `found` grows, so that a failure keeps what was read before it."""

    def __init__(self, request: dict[str, Any], device: Device, sampler: MemorySampler) -> None:
        self.request = request
        self.device = device
        self.sampler = sampler
        self.found: dict[str, Any] = {"memory": {}}
        self.patches = ExitStack()
        """What the libraries are told about this model, for as long as the process runs."""

    def measure(self) -> None:
        """Load, adapt, warm up, time, then look closer in untimed steps."""
        if self.request.get("history"):
            self.found["history"] = recorder.recorded_steps(self._load, self.device)
            return
        began = time.perf_counter()
        spent = self.found["stages_s"] = {}

        def done(stage: str) -> None:
            nonlocal began
            now = time.perf_counter()
            spent[stage], began = now - began, now

        step = self._load()
        done("load")
        self.found["trainable_parameters"] = sum(p.numel() for p in step.trainable)
        self.found["warmup_s"] = [self._timed(step)[1] for _ in range(int(self.request.get("warmup", 2)))]
        done("warmup")
        self._phase_peaks(step)
        self._timed_steps(step)
        done("steps")
        if self.request.get("profile", True):
            self.found["profile"] = profile(step, self.device)
            done("profile")

    def _load(self) -> Any:
        from calibrate.measure.training_step import TrainingStep
        from calibrate.model import fake_model
        from planner.training.spec import TrainingSpec, training_from_dict

        training: TrainingSpec = training_from_dict(self.request["training"])
        refuse(training)
        self.device.reset_peak()
        self._mark("idle")
        config = self.request["config"]
        model, notes = fake_model.build(config, training, self.request.get("layers"))
        self.found["notes"] = notes
        make = fake_model.RandomMaker(self.device.name)
        # quantized weights are plain parameters here, and DoRA must find them
        self.patches.enter_context(fake_model.quantized_parameters())
        for _ in fake_model.materialise(model, training, make):
            pass  # one module at a time: its 16-bit weight is gone before the next one is made
        self._mark("load and adapters")
        step = TrainingStep(model, training, device=self.device.name)
        gc.collect()
        gc.freeze()  # later collections need not walk the model
        return step

    @property
    def ran(self) -> Callable[[], float]:
        """Clock of the time this thread ran: on one thread of a busy CPU what a free one would have taken."""
        one = self.device.kind == "cpu" and int(self.request.get("threads", 1)) == 1
        return time.thread_time if one else time.perf_counter

    def _mark(self, name: str) -> None:
        self.device.synchronize()
        self.found["memory"][name] = {**self.device.peak(), "used": self.device.used_bytes()}
        self.device.reset_peak()

    def _timed(self, step: Any) -> tuple[float, float, list[float]]:
        """One step: seconds on the wall, seconds this thread ran, seconds of its phases as the device saw them."""
        clock = _PhaseClock(step, self.device, self.ran)
        self.device.synchronize()
        start, ran = time.perf_counter(), self.ran()
        step.run()
        self.device.synchronize()
        return time.perf_counter() - start, self.ran() - ran, clock.seconds()

    def _phase_peaks(self, step: Any) -> None:
        """Peaks inside the phases of one untimed step."""
        names = {"backward": "forward", "optimizer": "backward", "end": "optimizer"}
        seen: list[str] = []

        def enter(phase: str, segment: str) -> None:
            if phase in names and not (phase == "end" and seen[-1:] != ["optimizer"]):
                seen.append(phase)
                self._mark(names[phase])

        step._enter = enter
        self.device.reset_peak()
        step.run()
        del step._enter

    def _timed_steps(self, step: Any) -> None:
        """The steps that count: no profiler, no reading but the clock; peaks around all of them."""
        self.device.reset_peak()
        before, wall = self.device.state(), time.perf_counter()
        timed: list[tuple[float, float, list[float]]] = []
        with self.sampler.paused():
            while len(timed) < int(self.request.get("steps", 5)):
                if len(timed) >= LEAST_STEPS and time.perf_counter() - wall >= ENOUGH_S:
                    break
                timed.append(self._timed(step))
        self.sampler.sample()  # what a step reserves stays
        wall, after = time.perf_counter() - wall, self.device.state()
        self._mark("steady step")
        self.found["steps_s"] = [seconds for seconds, _, _ in timed]
        self.found["steps_ran_s"] = [ran for _, ran, _ in timed]
        self.found["phases_s"] = [phases for _, _, phases in timed]
        self.found["state_before"], self.found["state_after"] = before, after
        self.found["timed_wall_s"] = wall
        busy, own = (_difference(before, after, key) for key in ("busy_s", "own_s"))
        if busy is not None and own is not None:
            self.found["others_cpu_share"] = max(busy - own, 0.0) / (wall * (os.cpu_count() or 1))


def refuse(training: Any) -> None:
    """Refuse what real steps cannot run.

    Raises:
        InvalidInput: naming it.
    """
    if training.attention == "flash2":
        raise InvalidInput("bursts run eager and sdpa attention; flash2 needs a package that is not measured here")
    if training.gradient_checkpointing == "offload":
        raise InvalidInput("bursts run checkpointing none and full, not offload")
    if training.kernels != "none" or training.compile:
        raise InvalidInput("bursts run the plain modules: no fused kernels, no torch.compile")
    if not LOSSES[training.loss].traced:
        raise InvalidInput(f"bursts hold whole logits: there is no {training.loss} loss to measure")


def _difference(before: dict[str, Any], after: dict[str, Any], key: str) -> float | None:
    first, last = before.get(key), after.get(key)
    return None if first is None or last is None else float(last) - float(first)


class _PhaseClock:
    """When the phases of a step begin: the host's clock on a CPU, events of the stream on a GPU (no waiting)."""

    def __init__(self, step: Any, device: Device, clock: Callable[[], float]) -> None:
        self.marks: list[tuple[str, Any]] = []
        self.cuda = device.kind == "cuda"
        self.clock = clock
        step._enter = self._enter

    def _enter(self, phase: str, segment: str) -> None:
        if phase == "loss":
            return
        if not self.cuda:
            self.marks.append((phase, self.clock()))
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((phase, event))

    def seconds(self) -> list[float]:
        """Seconds in forward, backward and optimizer, in the order of PHASES."""
        spent = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if phase in spent:
                spent[phase] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
        return [spent[phase] for phase in PHASES]


# --- a closer look -------------------------------------------------------------------------------------------------


def profile(step: Any, device: Device) -> dict[str, Any]:
    """One extra step under torch's profiler: kernels (a CPU's operations) launched, seconds by class of operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.kind == "cuda" else [])
    with torch_profile(activities=kinds, profile_memory=device.kind == "cpu") as run:
        step.run()
        device.synchronize()
    if device.kind == "cuda":
        return _cuda_classes(run.profiler.kineto_results.events())
    found = _cpu_classes(run.key_averages())
    found["peak_over_base_bytes"] = _cpu_peak(run)
    return found


def class_of(name: str, marks: Marks | None = None) -> str:
    """The class of an operation or kernel by the parts of names that the kinds of kernels state (`marks`: those)."""
    lowered = name.lower()
    for kind, parts in marks or profile_marks():
        if any(part in lowered for part in parts):
            return kind
    return UNMARKED


def _cuda_classes(events: Any) -> dict[str, Any]:
    """What ran on the GPU, from the profiler's raw events (its tree of them takes seconds to build)."""
    seconds: dict[str, float] = {}
    named: dict[str, list[float]] = {}
    marks = profile_marks()
    for event in events:
        if str(event.device_type()).rpartition(".")[2] != "CUDA" or event.is_user_annotation():
            continue
        name, spent = event.name(), event.duration_ns() / 1e9
        kind = class_of(name, marks)
        seconds[kind] = seconds.get(kind, 0.0) + spent
        row = named.setdefault(name[:NAME], [0, 0.0])
        row[0] += 1
        row[1] += spent
    longest = sorted(named.items(), key=lambda item: -item[1][1])[:LONGEST]
    return {
        "kernels": int(sum(count for count, _ in named.values())), "seconds_by_class": seconds,
        "longest": [[name, int(count), spent] for name, (count, spent) in longest],
    }  # fmt: skip


def _cpu_classes(rows: Any) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    operations = 0
    marks = profile_marks()
    for row in rows:
        if "::" in row.key:  # aten::, bitsandbytes::, not autograd's bookkeeping
            operations += row.count
            kind = class_of(row.key, marks)
            seconds[kind] = seconds.get(kind, 0.0) + row.self_cpu_time_total / 1e6
    return {"kernels": operations, "seconds_by_class": seconds}


def _cpu_peak(run: Any) -> int:
    """Highest sum of torch's CPU allocations and frees during the step: what was added to the weights and state."""
    live = highest = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += int(event.nbytes())
            highest = max(highest, live)
    return highest


if __name__ == "__main__":
    sys.exit(main())
