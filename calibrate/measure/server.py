"""The server that measuring processes are forked from: it answers jobs, one child each."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any


def serve() -> None:
    """Import the libraries, then fork one child per line of stdin: answer with its pid, then with its exit code."""
    import bitsandbytes
    import peft
    import transformers

    from calibrate.measure import burst

    loaded = (bitsandbytes, peft, transformers)
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
        burst.answer(job["request"])
    except BaseException as error:  # noqa: BLE001 - the last thing this process does is to say why it failed
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        return 1
    return 0


if __name__ == "__main__":
    serve()
