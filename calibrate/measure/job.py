"""The job of a training config as the bursts of a run that holds no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from calibrate.fit.measurements import device_gpu, request_key
from calibrate.measure.burst import refuse
from calibrate.measure.device import Device
from calibrate.measure.grid import Burst, exactly, peak_bytes
from calibrate.measure.harness import Settings
from planner.base.errors import InvalidInput
from planner.base.records import replace
from planner.base.units import gib
from planner.importers import Job
from planner.plan.request import Request, resolve


def one_job(
    job: Job, opened: Device, settings: Settings, tell: Callable[[tuple[str, ...]], None]
) -> tuple[Iterator[Burst], Settings]:
    """The bursts of one job, and the settings of a run that holds no other; `tell` is told the notes of its plan.

    Raises:
        PlannerError: the job names no model, cannot be run as a burst, or is not predicted to fit the device.
    """
    if job.model is None:
        raise InvalidInput("no config names the model to measure; add its key")
    gpu = device_gpu(opened.identity())
    plan = resolve(Request(model=job.model, job=job, gpu=gpu, calibration="none"))
    tell(plan.warnings)
    training, config = plan.training, plan.config.config
    refuse(training)
    burst = next(exactly(job.model, config, training))
    need = peak_bytes(burst, gpu)
    if need > gpu.free_bytes:
        raise InvalidInput(f"the job needs {gib(need)} GiB and {gpu.name} has {gib(gpu.free_bytes)}: not measured")
    key = request_key(burst.request(opened.name, settings.threads, 0, 0))
    return exactly(job.model, config, training), replace(settings, job=key)
