"""Worker processes: one per burst, its output in files, killed with all its children when its time is over.

`Spawning` starts a fresh interpreter per burst. `Forking` imports the libraries once in a server process and forks it
per burst, which saves the seconds of the imports; every burst still has a process of its own, and a burst that crashes
takes nothing along. A CUDA context does not survive a fork: the server of a GPU imports only what makes none, and a
child that finds one all the same starts a fresh interpreter.
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
from typing import Any, Protocol

from planner.errors import one_line
from planner.records import record

TAIL = 2000
"""Characters of a failed worker's last words that are kept."""
NO_CONTEXT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Lets torch.cuda.is_available() ask NVML, which leaves the process able to fork (torch/cuda/__init__.py)."""
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


class Spawning:
    """A fresh process per request: `command` reads the request from stdin."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "calibrate.burst")) -> None:
        self.command = list(command)
        self._process: subprocess.Popen[str] | None = None

    def run(self, request: dict[str, Any], limit_s: float) -> Ended:
        began = time.monotonic()
        with (
            tempfile.TemporaryFile("w+", errors="replace") as out,
            tempfile.TemporaryFile("w+", errors="replace") as err,
        ):
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, start_new_session=True,
                env=_environment(),
            )  # fmt: skip
            self._process = process
            timed_out = False
            try:
                process.communicate(json.dumps(request), timeout=limit_s)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                self.close()
            return Ended(
                code=process.returncode, timed_out=timed_out, stdout=_text(out), stderr=_text(err),
                seconds=time.monotonic() - began,
            )  # fmt: skip

    def close(self) -> None:
        if self._process is not None:
            _kill(self._process.pid)
            self._process.wait()
            self._process = None


class Forking:
    """A server that has imported the libraries and forks itself per request, for bursts on a device of one kind."""

    def __init__(self, kind: str = "cpu") -> None:
        self.kind = kind
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
                [sys.executable, "-m", "calibrate.workers", self.kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, start_new_session=True,
                env=_environment() | (NO_CONTEXT if self.kind == "cuda" else {}),
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
    here = str(Path(__file__).resolve().parent.parent)
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


# --- the server ----------------------------------------------------------------------------------------------------


def preload(kind: str) -> tuple[Any, ...]:
    """Import what takes seconds; for a GPU without bitsandbytes, which asks CUDA for its capability when imported.

    PEFT imports bitsandbytes. What both need is imported here, so that a child has a fraction of a second left to do.
    """
    if kind == "cpu":
        import bitsandbytes
        import peft
        import transformers

        return bitsandbytes, peft, transformers
    import accelerate
    import scipy.stats
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.profiler
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto
    import transformers.quantizers.auto

    return accelerate, scipy, torch, transformers


def serve(kind: str = "cpu") -> None:
    """Import the libraries, then fork one child per line of stdin: answer with its pid, then with its exit code."""
    loaded = preload(kind)
    from calibrate import burst

    assert loaded
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(burst, job))
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(burst: Any, job: dict[str, Any]) -> int:
    """A forked process: its own group and files, then one burst."""
    with suppress(PermissionError):
        os.setpgid(0, 0)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY | os.O_CREAT),
        (2, job["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    try:
        if _has_context():
            _exec_burst(job["request"])
        burst.answer(job["request"])
    except BaseException as error:  # noqa: BLE001 - the last thing this process does is to say why it failed
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        return 1
    return 0


def _has_context() -> bool:
    """Whether the server had spoken to CUDA before the fork, so that this process cannot."""
    import torch

    return bool(torch.cuda._is_in_bad_fork())


def _exec_burst(request: dict[str, Any]) -> None:
    """Become a fresh interpreter that runs the burst."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        json.dump(request, file)
        file.seek(0)
        os.dup2(file.fileno(), 0)
        os.execv(sys.executable, [sys.executable, "-m", "calibrate.burst"])


if __name__ == "__main__":
    serve(*sys.argv[1:2])
