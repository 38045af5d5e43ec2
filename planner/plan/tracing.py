"""Ask `calibrate.oracle.worker` for a trace: a process of its own, with a time limit, a progress line and a cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

import planner
from planner.base.errors import Contradiction, InvalidInput, PlannerError, UnknownName, one_line, require
from planner.plan import trace_cache

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")

_START = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module('calibrate.oracle.worker', run_name='__main__')"
)
"""The folder that holds this package stands where Python would look in the current folder, which is a stranger's."""

_PROGRESS = "progress: "


class TraceFailed(PlannerError):
    """The trace gave no answer: the libraries refuse the run, the process died, or time was up."""


def ask(request: Mapping[str, Any], *, limit_s: float, cached: bool = True) -> dict[str, Any]:
    """Return the worker's answer to one request, from the cache if it has been asked before.

    Raises:
        MissingDependency: a library that the trace runs is not installed.
        PlannerError: no answer; the message says why.
    """
    require("tracing", "trace", *LIBRARIES)
    key = trace_cache.key(request, LIBRARIES)
    known = trace_cache.read(key) if cached else None
    if known is not None:
        return known
    answer = _spawn(request, limit_s)
    if cached:
        trace_cache.write(key, answer)
    return answer


def _spawn(request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
    root = str(Path(planner.__file__).resolve().parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", _START, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=_environment(),
        start_new_session=True,
    )
    assert process.stderr is not None
    tail: deque[str] = deque(maxlen=20)
    state = ["starting"]
    reader = threading.Thread(target=_follow, args=(process.stderr, tail, state), daemon=True)
    reader.start()
    try:
        with _progress(state):
            output, _ = _communicate(process, json.dumps(request), limit_s)
    except subprocess.TimeoutExpired:
        raise TraceFailed(
            f"the trace did not finish within {limit_s:g} s ({state[0]}); raise --time-limit, or trace fewer layers"
        ) from None
    finally:
        _kill(process)
    reader.join(timeout=5)
    return _read(output, process.returncode, tail)


def _environment() -> dict[str, str]:
    """No GPU, no network, no chatter: the trace needs none of them."""
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "TOKENIZERS_PARALLELISM": "false", "PYTHONIOENCODING": "utf-8"}


def _communicate(process: subprocess.Popen[str], text: str, limit_s: float) -> tuple[str, None]:
    """Write the request and read the answer; stderr has its own reader."""
    assert process.stdin is not None and process.stdout is not None
    output: list[str] = []
    stdout = process.stdout
    reading = threading.Thread(target=lambda: output.append(stdout.read()), daemon=True)
    reading.start()
    try:
        process.stdin.write(text)
        process.stdin.close()
    except OSError:
        pass  # it died before reading: its exit code tells
    end = time.monotonic() + limit_s
    process.wait(timeout=limit_s)
    reading.join(timeout=max(1.0, end - time.monotonic()))
    return "".join(output), None


def _follow(stream: IO[str], tail: deque[str], state: list[str]) -> None:
    for line in stream:
        if line.startswith(_PROGRESS):
            state[0] = one_line(line.removeprefix(_PROGRESS).strip(), 60)
        elif line.strip():
            tail.append(line.strip())


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _read(output: str, code: int, tail: deque[str]) -> dict[str, Any]:
    """Take the one line apart.

    Raises:
        PlannerError: the worker's own error, or none of what was agreed.
    """
    said = f"; it said: {one_line(tail[-1], 200)}" if tail else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals.__members__.values() else str(-code)
        raise TraceFailed(f"the trace process was ended by {name}{said}; please report the configuration")
    try:
        answer = json.loads(output)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not ({"summary", "error"} & answer.keys()):
        found = f"wrote {one_line(output.strip(), 60)!r}" if output.strip() else "wrote nothing"
        raise TraceFailed(f"the trace process gave no answer (exit code {code}, {found}){said}")
    error = answer.get("error")
    if error is None:
        return answer
    kinds: dict[str, type[PlannerError]] = {k.__name__: k for k in (Contradiction, InvalidInput, UnknownName)}
    raise kinds.get(str(error.get("type")), TraceFailed)(one_line(str(error.get("message", "")), 600))


@contextmanager
def _progress(state: list[str]) -> Iterator[None]:
    """A line on stderr with what is being done and since when, on a terminal only; it is gone afterwards."""
    if not sys.stderr.isatty() or os.environ.get("CI"):
        yield
        return
    done = threading.Event()
    started = time.monotonic()

    def show() -> None:
        while not done.wait(0.5):
            text = f"trace: {state[0]}, {time.monotonic() - started:.0f} s"
            click.echo(f"\r\x1b[K{text[:78]}", nl=False, err=True, color=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        click.echo("\r\x1b[K", nl=False, err=True, color=True)
