"""Worker processes: one per burst, its output in files, killed with all its children when its time is over.

`Spawning` starts a fresh interpreter per burst; a few may be started ahead, so that their imports run while another
burst does. `Forking` imports the libraries once in a server process and forks it per burst; every burst still has a
process of its own, and a burst that crashes takes nothing along. GPUs get fresh interpreters: in a forked one the host
launches kernels 1.3 to 1.8 times slower (H200 machine, SmolLM2-360M 8 layers: 84 ms a step fresh, 145 to 165 forked).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from planner.base.errors import one_line
from planner.base.records import record

TAIL = 2000
"""Characters of a failed worker's last words that are kept."""
START_S = 120.0
"""Seconds that the server may take to import the libraries."""


@record
class Ended:
    """How a worker ended."""

    code: int
    """Exit status; minus the signal that ended it."""
    timed_out: bool
    stdout: str
    stderr: str
    seconds: float


class Workers(Protocol):
    """Runs one request after the other."""

    def run(self, request: dict[str, Any], limit_s: float) -> Ended:
        """Run one request to its end or its time limit."""

    def close(self) -> None:
        """End every process that was started."""


@record
class _Waiting:
    """A process that has not been given its request."""

    process: subprocess.Popen[str]
    out: IO[str]
    err: IO[str]


class Spawning:
    """A fresh process per request: `command` reads the request from stdin."""

    def __init__(
        self, command: Sequence[str] = (sys.executable, "-m", "calibrate.measure.burst"), ahead: int = 0
    ) -> None:  # fmt: skip
        """`ahead`: processes that are started before they are needed; their command imports, then reads."""
        self.command = list(command)
        self.ahead = ahead
        self._waiting: list[_Waiting] = []
        self._running: _Waiting | None = None

    def run(self, request: dict[str, Any], limit_s: float) -> Ended:
        began = time.monotonic()
        running = self._running = self._waiting.pop(0) if self._waiting else self._start()
        while len(self._waiting) < self.ahead:
            self._waiting.append(self._start())
        timed_out = False
        try:
            with suppress(BrokenPipeError):  # it has ended already: its exit says how
                running.process.communicate(json.dumps(request), timeout=limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            self._running = None
            _end(running)
        with running.out, running.err:
            return Ended(
                code=running.process.returncode, timed_out=timed_out, stdout=_text(running.out),
                stderr=_text(running.err), seconds=time.monotonic() - began,
            )  # fmt: skip

    def _start(self) -> _Waiting:
        out = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - open until the process has ended
        err = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, start_new_session=True,
            env=_environment(),
        )  # fmt: skip
        return _Waiting(process=process, out=out, err=err)

    def close(self) -> None:
        for item in [*self._waiting, *([self._running] if self._running is not None else [])]:
            _end(item)
            item.out.close()
            item.err.close()
        self._waiting, self._running = [], None


def _end(item: _Waiting) -> None:
    """Kill a process and everything it started, if it has not ended."""
    _kill(item.process.pid)
    item.process.wait()
    if item.process.stdin is not None:
        with suppress(OSError):
            item.process.stdin.close()


def fresh_workers() -> Spawning:
    """Fresh processes for a GPU's bursts, some started ahead where there are processors to spare."""
    cores = os.cpu_count() or 1
    return Spawning(
        (sys.executable, "-m", "calibrate.measure.burst", "--ahead"), ahead=2 if cores >= 8 else int(cores >= 4)
    )


class Forking:
    """A server that has imported the libraries and forks itself per request."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._child = 0

    def run(self, request: dict[str, Any], limit_s: float) -> Ended:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="loraplan-") as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            code, timed_out = self._serve({"request": request, "out": str(out), "err": str(err)}, limit_s)
            return Ended(
                code=code, timed_out=timed_out, stdout=_contents(out), stderr=_contents(err),
                seconds=time.monotonic() - began,
            )  # fmt: skip

    def _serve(self, job: dict[str, Any], limit_s: float) -> tuple[int, bool]:
        server = self._running()
        assert server.stdin is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = self._line(START_S)
        if not answer.isdigit():
            self.close()
            return -signal.SIGKILL, answer == "timeout"
        self._child = int(answer)
        answer = self._line(limit_s)
        timed_out = answer == "timeout"
        if timed_out:
            _kill(self._child)
            answer = self._line(START_S)
        self._child = 0
        try:
            return int(answer), timed_out
        except ValueError:  # the server itself died
            self.close()
            return -signal.SIGKILL, timed_out

    def _running(self) -> subprocess.Popen[str]:
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "calibrate.measure.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, start_new_session=True,
                env=_environment(),
            )  # fmt: skip
        return self._server

    def _line(self, limit_s: float) -> str:
        """The server's next line; "timeout" if none comes, "" if the server is gone."""
        assert self._server is not None and self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], limit_s)
        return self._server.stdout.readline().strip() if ready else "timeout"

    def close(self) -> None:
        if self._child:
            _kill(self._child)
            self._child = 0
        if self._server is not None:
            _kill(self._server.pid)
            self._server.wait()
            for stream in (self._server.stdin, self._server.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            self._server = None


def _kill(pid: int) -> None:
    """End a process and everything it started (it leads a session of its own)."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """The caller's environment, with this checkout or installation importable and the hub out of reach."""
    here = str(Path(__file__).resolve().parent.parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def _contents(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def result_of(ended: Ended) -> dict[str, Any]:
    """The worker's own result, or what its end says: timeout, killed, segfault, garbage or error."""
    extra = {"exit_code": ended.code, "worker_s": ended.seconds}
    if ended.timed_out:
        return {"status": "timeout", "message": f"killed after {ended.seconds:.0f} s", **extra}
    if ended.code < 0:
        name = signal.Signals(-ended.code).name if -ended.code in set(signal.Signals) else f"signal {-ended.code}"
        crash = ended.code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGABRT)
        return {"status": "crashed" if crash else "killed", "message": name, "stderr": ended.stderr[-TAIL:], **extra}
    lines = ended.stdout.splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except (json.JSONDecodeError, RecursionError):
        found = None
    if ended.code != 0 and not isinstance(found, dict):
        last = ended.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"status": "error", "message": one_line(last[0], 300), "stderr": ended.stderr[-TAIL:], **extra}
    if not isinstance(found, dict) or "status" not in found or "protocol" not in found:
        return {"status": "garbage", "message": one_line(ended.stdout, 200), "stderr": ended.stderr[-TAIL:], **extra}
    return {**found, **extra}
