"""What torch's CUDA allocator did in a real training run, recorded, and the same run replayed without a GPU.

    python -m calibrate.measure.history record --out FILE [--budget S]     a few runs on cuda:0 (a process each)
    python -m calibrate.measure.history compare FILE ...                  replay and program against what was recorded

A recording holds every request and release of loading and of three steps, every segment taken from the driver or given
back with its address, and the counters torch itself kept. Bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrate.measure.recorder import MOST_EVENTS, STEPS
from planner.base.errors import InvalidInput, PlannerError
from planner.base.records import record
from planner.memory.allocator import CachingAllocator, Settings, parse_settings
from planner.memory.allocator import replay as planned

KIND, VERSION = "loraplan-history", 1
LIMIT_S = 60.0
"""Of one run."""
MOST_BYTES = 64 << 20
"""Of a recording, unpacked."""
MOST_SIZE = 1 << 50
"""Bytes of one request or segment."""


@record
class Recorded:
    """One run.

    `events` lists requests (their bytes) and releases (-1 - the number of the request) in order; `segments` holds
    (events before it, bytes, address), negative bytes where a segment was given back; `marks` the events before a
    phase began.
    """

    request: Mapping[str, Any]
    events: Sequence[int]
    segments: Sequence[Sequence[int]]
    marks: Sequence[Sequence[Any]]
    counters: Mapping[str, int]
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    allocator: str = ""
    """PYTORCH_ALLOC_CONF of the run."""

    @property
    def settings(self) -> Settings:
        """The allocator's options."""
        return parse_settings(self.allocator)


# --- recording -----------------------------------------------------------------------------------------------------


def write(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write recordings as one compressed file."""
    from planner.base.outputs import whole_file

    document = {"kind": KIND, "version": VERSION, "runs": list(runs)}
    with whole_file(path, "wb") as file:
        file.write(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0))


def read(path: Path) -> list[Recorded]:
    """Read a file of recordings.

    Raises:
        InvalidInput: it is none, larger than `MOST_BYTES`, or contradicts itself.
    """
    try:
        with gzip.open(path) as file:
            text = file.read(MOST_BYTES + 1)
        document = json.loads(text) if len(text) <= MOST_BYTES else None
        if document is None or document["kind"] != KIND or document["version"] != VERSION:
            raise InvalidInput(f"{path} is not a recording of version {VERSION}, or larger than 64 MiB")
        runs = [Recorded(**run) for run in document["runs"]]
        for run in runs:
            _check(run)
    except InvalidInput:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise InvalidInput(f"{path} cannot be read as a recording: {type(error).__name__}") from None
    return runs


def _check(run: Recorded) -> None:
    """Refuse what no allocator did.

    Raises:
        ValueError, TypeError: saying no more, the caller names the file.
    """
    alive: set[int] = set()
    number = 0
    for event in run.events:
        if not isinstance(event, int) or not -MOST_EVENTS <= event <= MOST_SIZE:
            raise ValueError
        if event < 0:
            alive.remove(-1 - event)
        else:
            alive.add(number)
            number += 1
    for place, size, address in run.segments:
        if not (0 <= place <= len(run.events) and abs(size) <= MOST_SIZE and isinstance(address, int) and address >= 0):
            raise ValueError
    if not all(isinstance(run.counters[name], int) and run.counters[name] > 0 for name in ("allocated", "reserved")):
        raise ValueError
    for name, place in run.marks:
        if not isinstance(name, str) or not isinstance(place, int):
            raise TypeError
    if not all(isinstance(part, Mapping) for part in (run.request, run.versions, run.device)):
        raise TypeError
    parse_settings(run.allocator)


# --- replaying -----------------------------------------------------------------------------------------------------


@record
class Replayed:
    """A recording's own requests through planner.memory.allocator."""

    reserved: int
    allocated: int
    peak_reserved: int
    peak_allocated: int
    segments_equal: int
    """Segments taken at the same request and of the same size, from the first on."""
    segments: int


class _AtRecordedAddresses(CachingAllocator):
    """Puts segments where the driver put them, not where the simulation thinks they would lie."""

    def __init__(self, run: Recorded) -> None:
        super().__init__(run.settings)
        self.segments: dict[tuple[int, int], int] = {(place, size): at for place, size, at in run.segments}
        self.event = 0

    def _segment_address(self, wanted: int) -> int:
        known = self.segments.get((self.event, wanted))
        return super()._segment_address(wanted) if known is None else known


def replay(run: Recorded, recorded_addresses: bool = False) -> Replayed:
    """Replay what was requested and compare, segment by segment, what was taken from the driver.

    `recorded_addresses`: segments lie where they really lay, so that only PyTorch's own rules are compared.
    """
    allocator = _AtRecordedAddresses(run) if recorded_addresses else CachingAllocator(run.settings)
    taken: list[tuple[int, int]] = []
    blocks: list[Any] = []
    for place, event in enumerate(run.events):
        before = allocator.reserved
        if isinstance(allocator, _AtRecordedAddresses):
            allocator.event = place
        if event >= 0:
            blocks.append(allocator.malloc(event))
        else:
            allocator.free(blocks[-1 - event])
        if allocator.reserved != before:
            taken.append((place, allocator.reserved - before))
    real = by_request(run)
    equal = next((i for i, (a, b) in enumerate(zip(taken, real, strict=False)) if a != b), min(len(taken), len(real)))
    return Replayed(
        reserved=allocator.reserved, allocated=allocator.allocated, peak_reserved=allocator.peak_reserved,
        peak_allocated=allocator.peak_allocated, segments_equal=equal, segments=len(real),
    )  # fmt: skip


def by_request(run: Recorded) -> list[tuple[int, int]]:
    """(event, bytes) that each request took from the driver; torch notes a segment before the request it serves."""
    found: dict[int, int] = {}
    for place, size, _ in run.segments:
        found[place] = found.get(place, 0) + size
    return sorted(found.items())


def peak_reserved(run: Recorded) -> int:
    """Most that the recorded run held of the driver."""
    reserved = highest = 0
    for _, size, _ in run.segments:
        reserved += size
        highest = max(highest, reserved)
    return highest


def predicted(run: Recorded) -> tuple[int, int]:
    """Allocated and reserved memory that the program tells for the recorded configuration."""
    from calibrate.fit.measurements import Measurement, device_gpu
    from planner.memory import sequence
    from planner.model import families
    from planner.plan.predict import STEPS, predict
    from planner.step import program
    from planner.step.architecture import architecture

    item = Measurement(request=run.request, result={"versions": run.versions}, device=run.device)
    spec, gpu = families.build_spec(item.config, model_id=item.model), device_gpu(run.device)
    told = predict(spec, item.training, gpu)
    if not run.allocator:
        return told.allocated.expected, told.reserved.expected
    record = program.run(spec, item.training, architecture(gpu, item.training)).record
    again = planned(sequence.expand(record, STEPS), run.settings)
    return again.peak_allocated, again.peak_reserved


# --- command line --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m calibrate.measure.history", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--budget", type=float, default=60.0, help="seconds")
    comparing = commands.add_parser("compare")
    comparing.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    try:
        return _record_all(given.out, given.budget) if given.command == "record" else _compare_all(given.files)
    except PlannerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _compare_all(files: Sequence[Path]) -> int:
    titles = "model", "method", "layers", "allocated", "program", "reserved", "replay", "program", "segments equal"
    print(f"| {' | '.join(titles)} | at their addresses |\n{'|---' * 10}|")
    for path in files:
        for run in read(path):
            print(_row(run))
    return 0


def _record_all(out: Path, budget_s: float) -> int:
    from calibrate.fit.measurements import device_gpu
    from calibrate.measure import grid
    from calibrate.measure.device import open_device
    from calibrate.measure.workers import fresh_workers, result_of

    device = open_device("cuda:0")
    gpu = device_gpu(device.identity())
    workers, runs, began = fresh_workers(), [], time.monotonic()
    try:
        for burst, conf in grid.histories(gpu):
            if time.monotonic() - began > budget_s:
                print(f"passed over: {burst.model}", file=sys.stderr)
                continue
            request = {**burst.request(device.name, 1, STEPS, 0), "history": True, "allocator": conf}
            found = result_of(workers.run(request, LIMIT_S))
            if found["status"] != "ok":
                print(f"failed: {burst.model}: {found['status']} {found.get('message')}", file=sys.stderr)
                continue
            about = {"request": request, "versions": found["versions"], "device": device.identity()}
            runs.append({**found["history"], **about, "allocator": conf})
            write(runs, out)
            print(f"{burst.model}: {len(runs[-1]['events'])} events, {found['worker_s']:.1f} s", file=sys.stderr)
    finally:
        workers.close()
    return 0 if runs else 3


def _row(run: Recorded) -> str:
    from calibrate.fit.measurements import Measurement

    training = (item := Measurement(request=run.request, result={"versions": run.versions}, device=run.device)).training
    told, again, exact = predicted(run), replay(run), replay(run, recorded_addresses=True)
    allocated, reserved = run.counters["allocated"], run.counters["reserved"]
    return (
        f"| {item.model} | {training.method} {training.quantization.kind} {training.micro_batch_size}x"
        f"{training.seq_len} | {run.request.get('layers')} | {allocated} "
        f"| {100 * (told[0] / allocated - 1):+.3f} % | {reserved} "
        f"| {100 * (again.peak_reserved / peak_reserved(run) - 1):+.3f} % "
        f"| {100 * (told[1] / reserved - 1):+.3f} % "
        f"| {again.segments_equal} of {again.segments} | {exact.segments_equal} |"
    )


if __name__ == "__main__":
    sys.exit(main())
