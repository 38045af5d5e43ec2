"""Runs survive what bursts can do: no memory, signals, hangs, nonsense, a full disk, neighbours, Ctrl-C."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibrate.fit import measurements
from calibrate.fit.measurements import RunFolder
from calibrate.measure import harness
from calibrate.measure.harness import Settings
from calibrate.measure.workers import Ended, Spawning, result_of
from planner.base.errors import InvalidInput
from tests.helpers.calibration_samples import CPU_FACTS, cpu_bursts

SETTINGS = Settings(device="cpu", budget_s=60.0)

WORKER = r"""
import json, os, signal, sys, time
request = json.loads(sys.stdin.read())
what = os.environ["FAULT"].split(",")[request["number"]]
good = {"protocol": 1, "status": "ok", "message": "", "steps_s": [0.01] * 5, "versions": {"torch": "2.13.0"}}
if what == "oom":
    good.update(status="oom", message="CUDA out of memory. Tried to allocate 2.00 GiB", steps_s=[])
elif what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "segv":
    os.kill(os.getpid(), signal.SIGSEGV)
elif what == "hang":
    print("about to hang", file=sys.stderr, flush=True)
    child = os.fork()
    time.sleep(600)
elif what == "garbage":
    print("Segmentation of {the} thought")
    sys.exit(0)
elif what == "list":
    print("[1, 2]")
    sys.exit(0)
elif what == "raise":
    raise ValueError("no such model")
print("chatter of a library")
print(json.dumps(good))
"""


class Numbered(Spawning):
    """Tells the stub how many requests came before; a short limit instead of the harness's."""

    def __init__(self, limit_s: float | None = None) -> None:
        super().__init__([sys.executable, "-c", WORKER])
        self.started = 0
        self.limit_s = limit_s

    def run(self, request: dict[str, Any], limit_s: float) -> Ended:
        self.started += 1
        return super().run({**request, "number": self.started - 1}, self.limit_s or limit_s)


class FakeDevice:
    """A device with the neighbours that it is told."""

    name, kind = "cpu", "cpu"

    def __init__(self, others: Iterator[list[dict[str, Any]]] | None = None) -> None:
        self.notes: list[str] = []
        self._others = others

    def identity(self) -> dict[str, Any]:
        return dict(CPU_FACTS)

    def state(self) -> dict[str, Any]:
        return {}

    def others(self) -> list[dict[str, Any]]:
        return next(self._others) if self._others is not None else []

    def synchronize(self) -> None: ...

    def reset_peak(self) -> None: ...

    def peak(self) -> dict[str, int]:
        return {}

    def used_bytes(self) -> int | None:
        return None

    def capacity_bytes(self) -> int:
        return 2**34


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLAN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(harness, "GONE_S", 0.0)


def go(
    folder: RunFolder, faults: list[str], monkeypatch: pytest.MonkeyPatch, *, device: FakeDevice | None = None,
    limit_s: float | None = None, settings: Settings = SETTINGS, number: int | None = None,
) -> list[str]:  # fmt: skip
    """Run stub bursts; return the statuses stored."""
    monkeypatch.setenv("FAULT", ",".join(faults))
    bursts = cpu_bursts(number or len(faults))
    harness.run(folder, device or FakeDevice(), settings, workers=Numbered(limit_s), bursts=iter(bursts))
    return [item["result"]["status"] for item in folder.results().values()]


def test_faults_are_results_and_do_not_touch_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    faults = ["oom", "kill", "segv", "garbage", "list", "raise", "ok"]
    assert go(folder, faults, monkeypatch) == ["oom", "killed", "crashed", "garbage", "garbage", "error", "ok"]
    results = [item["result"] for item in folder.results().values()]
    assert "Tried to allocate" in results[0]["message"]
    assert results[1]["message"] == "SIGKILL"
    assert results[2]["message"] == "SIGSEGV"
    assert results[5]["message"] == "ValueError: no such model"
    run = folder.read()
    assert [m.ok for m in run.measurements] == [False] * 6 + [True]
    assert run.versions == {"torch": "2.13.0"}


def test_a_hanging_burst_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    assert go(RunFolder(tmp_path), ["hang", "ok"], monkeypatch, limit_s=1.5) == ["timeout", "ok"]
    assert time.monotonic() - began < 20
    ours = [p for p in Path("/proc").glob("[0-9]*/environ") if _mentions(p, b"FAULT=hang,ok")]
    assert [p for p in ours if p.parent.name != str(os.getpid())] == []


def _mentions(path: Path, text: bytes) -> bool:
    try:
        return text in path.read_bytes()
    except OSError:
        return False


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    assert go(folder, ["ok", "kill", "oom"], monkeypatch) == ["ok", "killed", "oom"]
    before = {p.name: p.read_bytes() for p in folder.bursts.iterdir()}
    # Finished ones (1 and 3) are not run again, the killed one is, then come the new ones.
    assert go(folder, ["ok", "raise"], monkeypatch, number=4) == ["ok", "ok", "oom", "error"]
    after = {p.name: p.read_bytes() for p in folder.bursts.iterdir()}
    changed = [name for name in before if before[name] != after[name]]
    assert [name[:4] for name in changed] == ["0002"]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("FAULT", "ok,ok,ok")

    class Interrupted(Numbered):
        closed = False

        def run(self, request: dict[str, Any], limit_s: float) -> Ended:
            if self.started == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().run(request, limit_s)

        def close(self) -> None:
            self.closed = True
            super().close()

    workers = Interrupted()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            harness.run(folder, FakeDevice(), SETTINGS, workers=workers, bursts=iter(cpu_bursts(3)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert workers.closed
    assert len(folder.results()) == 2
    assert go(folder, ["ok"], monkeypatch, number=3) == ["ok"] * 3


def test_a_full_disk_stops_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    real, written = os.fsync, []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 3:  # the header, one burst, then no space
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInput, match=r"No space left on device.*free space"):
        go(folder, ["ok"] * 3, monkeypatch)
    assert len(folder.results()) == 1
    assert not [p for p in folder.bursts.iterdir() if p.suffix != ".json" or p.name.startswith(".")]
    monkeypatch.setattr(os, "fsync", real)
    assert go(folder, ["ok"] * 2, monkeypatch, number=3) == ["ok"] * 3


def test_unfinished_files_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    go(folder, ["ok"], monkeypatch)
    (folder.bursts / ".0002-abc.json.tmp").write_text('{"number": 2, "requ')
    assert len(folder.results()) == 1
    (folder.bursts / "0002-abc.json").write_text('{"number": 2, "requ')
    with pytest.raises(InvalidInput, match=r"not (valid )?JSON"):
        folder.results()


def test_neighbours_are_refused_unless_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def neighbours(*counts: int) -> FakeDevice:
        return FakeDevice(iter([[{"pid": 4242, "bytes": 1}] * n for n in counts]))

    with pytest.raises(InvalidInput, match=r"pid 4242.*--share"):
        go(RunFolder(tmp_path / "a"), ["ok"], monkeypatch, device=neighbours(1, 1))
    assert not (tmp_path / "a").exists()
    with pytest.raises(InvalidInput, match=r"4242.*came to cpu; 1 bursts are kept"):
        go(RunFolder(tmp_path / "b"), ["ok", "ok"], monkeypatch, device=neighbours(0, 0, 1, 1))
    shared = replace(SETTINGS, share=True)
    folder = RunFolder(tmp_path / "c")
    assert go(folder, ["ok"], monkeypatch, device=neighbours(1, 1, 1), settings=shared) == ["ok"]
    (item,) = folder.read().measurements
    assert item.disturbed


def test_a_process_that_ended_may_be_listed_for_a_moment() -> None:
    device = FakeDevice(iter([[{"pid": 1}], [{"pid": 1}], []]))
    assert harness.strangers(device, patience_s=5.0) == []


def test_a_folder_of_another_device_or_grid_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(RunFolder(tmp_path), ["ok"], monkeypatch)
    with pytest.raises(InvalidInput, match="fitting grid"):
        go(RunFolder(tmp_path), ["ok"], monkeypatch, settings=replace(SETTINGS, check=True))
    header = json.loads((tmp_path / "run.json").read_text())
    header["device"]["name"] = "another"
    (tmp_path / "run.json").write_text(json.dumps(header))
    with pytest.raises(InvalidInput, match="holds a run of another"):
        go(RunFolder(tmp_path), ["ok"], monkeypatch)


def test_processes_are_started_ahead_and_none_is_left() -> None:
    code = "import os, sys, json; r = json.load(sys.stdin); print(json.dumps({'n': r['n'], 'pid': os.getpid()}))"
    workers = Spawning([sys.executable, "-c", code], ahead=2)
    first = workers.run({"n": 1}, 60.0)
    waiting = [item.process.pid for item in workers._waiting]
    assert len(waiting) == 2
    second = json.loads(workers.run({"n": 2}, 60.0).stdout)
    assert json.loads(first.stdout)["n"] == 1
    assert second == {"n": 2, "pid": waiting[0]}
    left = [item.process for item in workers._waiting]
    workers.close()
    assert all(process.poll() is not None for process in left)
    assert workers._waiting == []


def test_a_process_that_died_while_it_waited_is_a_result() -> None:
    workers = Spawning([sys.executable, "-c", "import sys; sys.exit(7)"], ahead=1)
    workers.run({}, 60.0)
    workers._waiting[0].process.wait()
    ended = workers.run({}, 60.0)
    assert (ended.code, ended.timed_out) == (7, False)
    assert result_of(ended)["status"] == "error"
    workers.close()


def test_the_budget_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(SETTINGS, budget_s=1.0)
    monkeypatch.setenv("FAULT", ",".join(["ok"] * 50))
    done = harness.run(RunFolder(tmp_path), FakeDevice(), short, workers=Numbered(), bursts=iter(cpu_bursts(40)))
    assert 1 <= done.done < 40


def test_a_burst_that_would_eat_the_budget_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {cpu_bursts(3)[1].training.seq_len}
    monkeypatch.setattr(
        harness.grid, "step_seconds", lambda burst, *_: 5.0 if burst.training.seq_len in large else 0.01
    )
    folder = RunFolder(tmp_path / "run")
    assert go(folder, ["ok"] * 3, monkeypatch) == ["ok"] * 2
    assert list(folder.results()) == [1, 3]
    endless = itertools.chain(cpu_bursts(1), itertools.repeat(cpu_bursts(2)[1]))
    run = harness.run(RunFolder(tmp_path / "b"), FakeDevice(), SETTINGS, workers=Numbered(), bursts=endless)
    assert run.done == 1


def test_a_newer_file_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(RunFolder(tmp_path / "run"), ["ok"], monkeypatch)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(InvalidInput, match=r"version 99.*upgrade loraplan"):
        RunFolder(tmp_path / "run").read()


def test_an_older_file_is_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(RunFolder(tmp_path), ["ok"], monkeypatch)
    path = tmp_path / "run.json"
    old = json.loads(path.read_text())
    old["version"], old["dev"] = -1, old.pop("device")
    path.write_text(json.dumps(old))
    steps = {
        -1: lambda d: {**{k: v for k, v in d.items() if k != "dev"}, "machine": d["dev"], "version": 0},
        0: lambda d: {**{k: v for k, v in d.items() if k != "machine"}, "device": d["machine"], "version": 1},
    }
    monkeypatch.setattr(measurements, "RUN_MIGRATIONS", steps)
    assert RunFolder(tmp_path).read().device["name"] == CPU_FACTS["name"]


def test_an_exported_run_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(RunFolder(tmp_path / "run"), ["ok", "oom"], monkeypatch)
    runs = measurements.read_runs([tmp_path / "run"])
    measurements.write_json(tmp_path / "all.json", measurements.to_document(runs))
    (again,) = measurements.read_runs([tmp_path / "all.json"])
    assert again.measurements == runs[0].measurements
    assert again.device == runs[0].device
    with pytest.raises(InvalidInput, match="holds no run"):
        measurements.read_runs([tmp_path])
    with pytest.raises(InvalidInput, match="does not exist"):
        measurements.read_runs([tmp_path / "none.json"])


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended(code=0, timed_out=False, stdout="", stderr="", seconds=1.0), "garbage"),
        (Ended(code=0, timed_out=False, stdout='{"status": "ok"}', stderr="", seconds=1.0), "garbage"),
        (Ended(code=3, timed_out=False, stdout="", stderr="a\nlast words", seconds=1.0), "error"),
        (Ended(code=-6, timed_out=False, stdout="", stderr="terminate called", seconds=1.0), "crashed"),
        (Ended(code=-15, timed_out=False, stdout="", stderr="", seconds=1.0), "killed"),
        (Ended(code=-9, timed_out=True, stdout="", stderr="", seconds=9.0), "timeout"),
    ],
)
def test_every_end_has_a_status(ended: Ended, status: str) -> None:
    assert result_of(ended)["status"] == status
