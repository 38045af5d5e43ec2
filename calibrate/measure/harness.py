"""Run a grid of bursts within a time budget: one process each, results kept as they come, resumable.

A burst that runs out of memory, crashes, hangs or answers nonsense is a result like any other and cannot touch the
next one. Another process on the GPU stops the run unless sharing was allowed. Seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from calibrate.fit.measurements import FINISHED, RunFolder, device_gpu
from calibrate.measure import grid
from calibrate.measure.burst import timed_steps
from calibrate.measure.device import Device
from calibrate.measure.workers import Forking, Workers, fresh_workers, result_of
from planner.base.errors import InvalidInput, PlannerError
from planner.base.records import record
from planner.device.hardware import Gpu
from planner.facts import calibration_files
from planner.timing import coefficients as calibration

WARMUP = 2
STEPS = {"cpu": 10, "cuda": 8}
"""Steps of a burst that do not count (kernels are loaded, the optimizer makes its state), and that do."""
OTHER_STEPS = 3
"""Steps' worth of time that phase peaks and the profiler cost."""
START_S = {"cpu": 2.0, "cuda": 8.0}
"""First guess of a burst's time beside its steps; later the median of what was seen."""
SLACK = 8.0
"""A burst may take this many times its predicted steps, and a minute, before it is taken to hang."""
LEAST_LIMIT_S = 60.0
LARGEST_SHARE = 1 / 6
"""A burst of a grid that is predicted to take more of the budget is passed over."""
MOST_PASSED_OVER = 50
"""Bursts passed over before a run ends: what is left of the grid is too large."""


@record
class Progress:
    """Where a run stands."""

    done: int
    failed: int
    spent_s: float
    budget_s: float
    last: str


@record
class Settings:
    """How a run was asked for."""

    device: str
    budget_s: float
    threads: int = 1
    check: bool = False
    """Draw from shapes that the fitting grid does not have."""
    share: bool = False
    """Go on although others use the GPU (bursts are marked)."""
    most: int = 0
    """At most so many bursts; 0: as many as the budget allows."""
    seed: int | None = None
    """Of the grid's mixed draws; None: the grid's own."""
    job: str = ""
    """Hash of the one job that is measured (`measurements.request_key`); empty: a grid."""


GONE_S = 2.0
"""The driver lists a process that has ended for a moment."""


def strangers(device: Device, patience_s: float | None = None) -> list[dict[str, Any]]:
    """Other processes on the device that stay there."""
    found = device.others()
    patience = GONE_S if patience_s is None else patience_s
    until = time.monotonic() + patience
    while found and time.monotonic() < until:
        time.sleep(patience / 5)
        found = device.others()
    return found


Report = Callable[[Progress], None]


def run(
    folder: RunFolder, device: Device, settings: Settings, *, workers: Workers | None = None,
    report: Report | None = None, bursts: Iterator[grid.Burst] | None = None,
) -> Progress:  # fmt: skip
    """Run bursts until the budget is used; what `folder` has already is not run again.

    Raises:
        PlannerError: the folder belongs to another device or grid, the GPU is in use, the disk is full.
        KeyboardInterrupt: finished bursts are kept.
    """
    gpu = _open(folder, device, settings)
    own = workers or (Forking() if device.kind == "cpu" else fresh_workers())
    state = _State(folder, device, gpu, settings, own, report)
    source = bursts if bursts is not None else grid.bursts(gpu, settings.check, settings.seed)
    try:
        for number, burst in enumerate(source, start=1):
            if not state.next(number, burst):
                break
    finally:
        own.close()
    return state.progress("")


def _open(folder: RunFolder, device: Device, settings: Settings) -> Gpu:
    identity = device.identity()
    others = strangers(device)
    if others and not settings.share:
        pids = ", ".join(str(p["pid"]) for p in others[:5])
        raise InvalidInput(
            f"{device.name} is used by other processes (pid {pids}): their work would be measured too; "
            "wait for them, choose another --device, or pass --share"
        )
    gpu = device_gpu(identity)
    if not folder.exists():
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        folder.begin(
            {
                "created": created,
                "device": identity | _nominal(gpu),
                "check": settings.check,
                "budget_s": settings.budget_s,
                "job": settings.job,
                "seed": settings.seed,
            }
        )
        return gpu
    header = folder.header()
    same = all(header["device"].get(key) == identity.get(key) for key in ("kind", "name", "host", "threads"))
    if not same or bool(header.get("check")) != settings.check:
        raise InvalidInput(
            f"{folder.path} holds a run of {header['device']['name']} "
            f"({'checking' if header.get('check') else 'fitting'} grid); name another --out"
        )
    if header.get("seed") != settings.seed:
        raise InvalidInput(f"{folder.path} holds a run drawn with --seed {header.get('seed')}; name another --out")
    if header.get("job", "") != settings.job:
        raise InvalidInput(f"{folder.path} holds a run of another job or of a grid; name another --out")
    return gpu


def _nominal(gpu: Gpu) -> dict[str, Any]:
    """The data sheet's rates that the coefficients will be shares of."""
    return {
        "gpu_id": gpu.gpu_id, "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s,
        "fp32_flops_per_s": gpu.fp32_flops_per_s, "bf16_flops_per_s": gpu.bf16_flops_per_s,
    }  # fmt: skip


class _State:
    """A run in progress."""

    def __init__(
        self, folder: RunFolder, device: Device, gpu: Gpu, settings: Settings, workers: Workers, report: Report | None
    ) -> None:
        self.folder, self.device, self.gpu = folder, device, gpu
        self.settings, self.workers, self.report = settings, workers, report
        self.timed = STEPS[device.kind]
        self.began = time.monotonic()
        self.stored = folder.results()
        self.done = sum(1 for s in self.stored.values() if s["result"].get("status") in FINISHED)
        self.failed = 0
        self.started = self.passed_over = 0
        self.beside = START_S[device.kind]
        self.slowness = 1.0
        found = calibration_files.known()[0] if device.kind == "cpu" else []
        self.coefficients = calibration.select(gpu, found).coefficients

    def next(self, number: int, burst: grid.Burst) -> bool:
        """Run one burst if it is not stored yet and the budget allows it; False: stop."""
        request = burst.request(self.device.name, self.settings.threads, self.timed, WARMUP)
        earlier = self.stored.get(number)
        if earlier is not None and earlier["result"].get("status") in FINISHED:
            return True
        if self.settings.most and self.started >= self.settings.most:
            return False
        each = grid.step_seconds(burst, self.gpu, self.coefficients)
        steps = each * (WARMUP + OTHER_STEPS + timed_steps(self.timed, each * self.slowness))
        spent = time.monotonic() - self.began
        left = self.settings.budget_s - spent
        if left <= 0:
            return False
        large = steps * self.slowness > LARGEST_SHARE * self.settings.budget_s
        if self.started and large and not self.settings.job:
            self.passed_over += 1  # smaller bursts of the same kinds tell as much
            return self.passed_over < MOST_PASSED_OVER
        if self.started and self.beside + steps * self.slowness > left:
            return False
        self.started += 1
        others = strangers(self.device)
        if others and not self.settings.share:
            raise InvalidInput(
                f"another process (pid {others[0]['pid']}) came to {self.device.name}; {self.done} bursts are kept: "
                "run the same command again when it is gone, or pass --share"
            )
        limit = max(LEAST_LIMIT_S, SLACK * (self.beside + steps * self.slowness))
        result = result_of(self.workers.run(request, limit))
        if others:
            result["others"] = others
        self._learn(result, steps)
        self.folder.add(number, request, result)
        self._count(result, burst)
        return True

    def _learn(self, result: dict[str, Any], predicted_s: float) -> None:
        """Correct the guesses of a burst's time by what it took."""
        spent = list(result.get("steps_s", ()))
        timed, wall = sum(spent), float(result.get("worker_s", 0.0))
        if result.get("status") != "ok" or not timed:
            return
        steps = timed / len(spent) * (len(spent) + WARMUP + OTHER_STEPS)
        self.slowness = 0.5 * self.slowness + 0.5 * steps / predicted_s
        self.beside = 0.5 * self.beside + 0.5 * max(wall - steps, 0.0)

    def _count(self, result: dict[str, Any], burst: grid.Burst) -> None:
        if result["status"] in FINISHED:
            self.done += 1
        else:
            self.failed += 1
        if self.report is not None:
            self.report(self.progress(f"{burst.model} {result['status']}"))

    def progress(self, last: str) -> Progress:
        """Where the run stands now."""
        spent = time.monotonic() - self.began
        return Progress(
            done=self.done, failed=self.failed, spent_s=spent, budget_s=self.settings.budget_s, last=last
        )  # fmt: skip


def default_folder(device: Device, when: datetime | None = None) -> Path:
    """Where a run lies that named no folder: in the user's data folder."""
    stamp = (when or datetime.now()).strftime("%Y%m%d-%H%M%S")
    return calibration_files.user_folder().parent / "runs" / f"{device.name.replace(':', '')}-{stamp}"


__all__ = ["PlannerError", "Progress", "Settings", "default_folder", "run"]
