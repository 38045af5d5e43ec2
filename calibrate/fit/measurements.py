"""Raw results of bursts as files: a run's folder (one file per burst) and measurement files of one or more runs.

Every write is whole or not at all (temporary file, fsync, rename); readers look at finished files only. Nothing is
rounded and no statistic is stored: what a step took is derived when it is needed. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from planner.base.errors import InvalidInput, PlannerError, UnknownName, one_line
from planner.base.records import record
from planner.device import processor
from planner.device.hardware import Gpu
from planner.facts import catalog
from planner.facts.calibration_files import load_json, migrated
from planner.model.depth import first_layers
from planner.timing.coefficients import STACK
from planner.training.spec import TrainingSpec, training_from_dict

RUN_KIND, RUN_VERSION = "loraplan-run", 1
FILE_KIND, FILE_VERSION = "loraplan-measurements", 1
RUN_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
FILE_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

DEVICE_KEYS = ("kind", "name")
"""What the identity of a device must have."""
FINISHED = ("ok", "oom")
"""Results that a resumed run does not repeat."""
BUSY = 0.7
"""Share of a GPU's step in which it computes, from which on its kernels' seconds are looked at."""
ALL_BUSY = 0.9
"""The same, above which even a slow host does not matter."""
DISTURBED_SHARE = 0.5
"""Share of the machine's processors that others used, above which a burst timed by the wall clock is disturbed."""


@record
class Measurement:
    """One burst: its request, what came back, and on what it ran."""

    request: Mapping[str, Any]
    result: Mapping[str, Any]
    device: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Names the configuration: bursts with equal keys are repeats."""
        return request_key(self.request)

    @property
    def model(self) -> str:
        """Label of the model that was trained."""
        return str(self.request["model"])

    @property
    def training(self) -> TrainingSpec:
        """The settings that ran, with the releases that ran them."""
        asked = training_from_dict(dict(self.request["training"]))
        ran = self.result.get("versions") or {}
        numbers = {name: re.findall(r"\d+", str(ran.get(name, "")))[:2] for name in STACK}
        found = {name: (int(parts[0]), int(parts[1])) for name, parts in numbers.items() if len(parts) == 2}
        return replace(asked, versions=replace(asked.versions, **found))

    @property
    def config(self) -> dict[str, Any]:
        """The model's config at the depth that ran."""
        return first_layers(dict(self.request["config"]), self.request.get("layers"))

    @property
    def ok(self) -> bool:
        """Whether steps were timed."""
        return self.result.get("status") == "ok" and bool(self.result.get("steps_s"))

    @property
    def thread_time(self) -> bool:
        """Whether one CPU thread's own running time counts instead of the wall clock."""
        return self.device.get("kind") == "cpu" and self.result.get("threads") == 1 and "steps_ran_s" in self.result

    @property
    def disturbed(self) -> str:
        """Why the time should not be trusted; empty when it can be."""
        if self.result.get("others"):
            return "another process was on the GPU"
        if self.forked and self.busy_share < ALL_BUSY:
            return "the step waits for a host that a fork had slowed down"
        share = self.result.get("others_cpu_share") or 0.0
        if self.device.get("kind") == "cpu" and not self.thread_time and share > DISTURBED_SHARE:
            return f"others used {100 * share:.0f} % of the processors"
        return ""

    @property
    def forked(self) -> bool:
        """Whether a GPU's burst ran in a forked process, whose host time says little (`calibrate.measure.workers`)."""
        return self.device.get("kind") == "cuda" and self.result.get("worker") == "forked"

    @property
    def busy_share(self) -> float:
        """Share of a step in which a GPU computes, by the profiled step; 0 where none was profiled."""
        kernels = self.kernels_s
        return sum(kernels.values()) / self.step_s if kernels else 0.0

    @property
    def busy(self) -> bool:
        """Whether the GPU computes for most of a step."""
        return self.busy_share >= BUSY

    @property
    def step_s(self) -> float:
        """Seconds of a step: the median on a GPU; on a CPU, where whatever disturbs only adds, the least.

        With phases it is the sum of the least of each, which need not fall into one step.
        """
        if self.device.get("kind") != "cpu":
            return float(median(self.result["steps_s"]))
        phases = self.phases_s
        return sum(phases) if phases is not None else float(min(self.result["steps_s"]))

    @property
    def phases_s(self) -> tuple[float, ...] | None:
        """Seconds of forward, backward and optimizer: the least on a CPU, the median of a GPU's stream."""
        if not self.result.get("phases_s") or self.forked:
            return None
        chosen: Callable[[list[float]], float] = min if self.device.get("kind") == "cpu" else median
        return tuple(chosen([float(s) for s in phase]) for phase in zip(*self.result["phases_s"], strict=True))

    @property
    def kernels_s(self) -> dict[str, float]:
        """Seconds of a GPU's kernels by class of operation, from the profiled step; empty on a CPU."""
        if self.device.get("kind") != "cuda":
            return {}
        found = (self.result.get("profile") or {}).get("seconds_by_class") or {}
        return {str(name): float(seconds) for name, seconds in found.items()}

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Peaks of the timed steps of a GPU: allocated, reserved, and device (NVML, less what was used before)."""
        steady = self.result.get("memory", {}).get("steady step", {})
        found = {name: int(steady[name]) for name in ("allocated", "reserved") if steady.get(name)}
        sampled = self.result.get("device_memory", {})
        if found and sampled.get("samples") and sampled.get("baseline_bytes") is not None:
            found["device"] = int(sampled["peak_bytes"]) - int(sampled["baseline_bytes"])
        return found

    def describe(self) -> dict[str, Any]:
        """As stored."""
        return {"request": dict(self.request), "result": dict(self.result)}


@record
class Run:
    """Bursts of one device in one software stack."""

    device: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    measurements: tuple[Measurement, ...]
    path: str = ""

    @property
    def host(self) -> str:
        """A short name of the machine."""
        return str(self.device.get("host", ""))

    @property
    def gpu(self) -> Gpu:
        """The device as predictions know it."""
        return device_gpu(self.device)


def request_key(request: Mapping[str, Any]) -> str:
    """Hash of what was asked of the worker, without how often it was timed."""
    parts = {name: request.get(name) for name in ("config", "layers", "training", "device_kind", "threads")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def device_gpu(device: Mapping[str, Any]) -> Gpu:
    """The Gpu of a recorded identity: its catalogue entry, with the memory and capability that the driver told.

    Raises:
        UnknownName: the catalogue lacks the card, whose data sheet the coefficients are shares of.
    """
    if device["kind"] == "cpu":
        return processor.as_gpu(dict(device))
    try:
        known = catalog.gpu(str(device["name"]))
    except UnknownName as error:
        raise UnknownName(f"{error}; add its data sheet to data/gpus.json, coefficients are shares of it") from None
    memory, capability = device.get("memory_bytes"), device.get("compute_capability")
    return replace(
        known,
        memory_bytes=int(memory) if memory else known.memory_bytes,
        compute_capability=(int(capability[0]), int(capability[1])) if capability else known.compute_capability,
    )


# --- a run's folder ------------------------------------------------------------------------------------------------


class RunFolder:
    """DIR/run.json and DIR/bursts/*.json; results are added one file at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bursts = path / "bursts"

    def exists(self) -> bool:
        """Whether a run began here."""
        return (self.path / "run.json").is_file()

    def begin(self, header: Mapping[str, Any]) -> None:
        """Create the folder with its header (device, plan, versions)."""
        self.bursts.mkdir(parents=True, exist_ok=True)
        document = {"kind": RUN_KIND, "version": RUN_VERSION, **header}
        write_json(self.path / "run.json", document)

    def header(self) -> dict[str, Any]:
        """The run's header, in the newest version.

        Raises:
            InvalidInput: no run began here, or another loraplan wrote it.
        """
        path = self.path / "run.json"
        if not path.is_file():
            raise InvalidInput(f"{self.path} holds no run (run.json is missing); give a folder of calibrate run --out")
        document = migrated(load_json(path), RUN_KIND, RUN_VERSION, RUN_MIGRATIONS, path)
        _check_device(document, path)
        return document

    def add(self, number: int, request: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Store one result."""
        name = f"{number:04d}-{request_key(request)}.json"
        write_json(self.bursts / name, {"version": RUN_VERSION, "number": number, "request": request, "result": result})

    def results(self) -> dict[int, dict[str, Any]]:
        """Stored results by number; unfinished temporary files are not looked at."""
        found = {}
        for path in sorted(self.bursts.glob("[0-9]*.json")):
            document = load_json(path)
            if not isinstance(document, dict) or not {"number", "request", "result"} <= document.keys():
                raise InvalidInput(f"{path} is not a burst's result; remove it and run again")
            found[int(document["number"])] = document
        return found

    def read(self) -> Run:
        """The run as far as it got."""
        header = self.header()
        stored = self.results().values()
        return _run(header, [{"request": s["request"], "result": s["result"]} for s in stored], str(self.path))


def write_json(path: Path, document: Any) -> None:
    """Write a file whole or not at all.

    Raises:
        InvalidInput: the disk is full or the folder cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}; what was stored before is whole, free space and run again"
        ) from None


# --- measurement files ---------------------------------------------------------------------------------------------


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read run folders and measurement files.

    Raises:
        InvalidInput: neither, or damaged, or newer than known.
    """
    runs: list[Run] = []
    for path in paths:
        runs += [RunFolder(path).read()] if path.is_dir() else _read_file(path)
    return runs


def _read_file(path: Path) -> list[Run]:
    if not path.exists():
        raise InvalidInput(f"{path} does not exist; give a folder of calibrate run --out, or an exported file")
    document = migrated(load_json(path), FILE_KIND, FILE_VERSION, FILE_MIGRATIONS, path)
    runs = document.get("runs")
    if not isinstance(runs, list):
        raise InvalidInput(f"{path} has no runs; export it again")
    for run in runs:
        _check_device(run, path)
    return [_run(run, run["bursts"], str(path)) for run in runs]


def _check_device(document: Any, path: Path) -> None:
    device = document.get("device") if isinstance(document, dict) else None
    if not isinstance(device, dict) or not all(device.get(key) for key in DEVICE_KEYS):
        raise InvalidInput(f"{path} does not say on what device it ran; it cannot be used")


def _run(header: Mapping[str, Any], bursts: Sequence[Mapping[str, Any]], path: str) -> Run:
    device = header["device"]
    first: Mapping[str, str] = next((b["result"]["versions"] for b in bursts if b["result"].get("versions")), {})
    measured = tuple(Measurement(request=b["request"], result=b["result"], device=device) for b in bursts)
    return Run(
        device=device, versions=first, created=str(header.get("created", "")),
        measurements=measured, path=path,
    )  # fmt: skip


def to_document(runs: Sequence[Run]) -> dict[str, Any]:
    """One measurement file of several runs."""
    return {
        "kind": FILE_KIND,
        "version": FILE_VERSION,
        "runs": [
            {
                "device": dict(run.device), "created": run.created,
                "bursts": [m.describe() for m in run.measurements],
            }
            for run in runs
        ],
    }  # fmt: skip


HOSTS_DIFFER = 0.05
"""Hosts of one GPU type that differ by more than this are flagged."""


def merge(runs: Sequence[Run]) -> list[str]:
    """Check that runs of several machines belong together; return a line for every pair of hosts that differ.

    Raises:
        InvalidInput: runs of different devices.
    """
    names = {str(run.device["name"]) for run in runs}
    if len(names) > 1:
        raise InvalidInput(f"runs of different devices do not merge: {one_line(', '.join(sorted(names)), 200)}")
    by_host: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for item in run.measurements:
            if item.ok:
                by_host.setdefault(run.host, {}).setdefault(item.key, []).append(item.step_s)
    hosts = sorted(by_host)
    notes = []
    for index, first in enumerate(hosts):
        for second in hosts[index + 1 :]:
            common = by_host[first].keys() & by_host[second].keys()
            if not common:
                notes.append(f"hosts {first} and {second} have no burst in common: they cannot be compared")
                continue
            ratio = median(min(by_host[second][key]) / min(by_host[first][key]) for key in common)
            if abs(ratio - 1) > HOSTS_DIFFER:
                notes.append(
                    f"host {second} takes {100 * (ratio - 1):+.1f} % of host {first}'s time over {len(common)} bursts: "
                    "check clocks, power limits and cooling before merging"
                )
    return notes


__all__ = ["Measurement", "PlannerError", "Run", "RunFolder", "device_gpu", "merge", "read_runs", "to_document"]
