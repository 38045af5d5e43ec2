"""Files that a command writes: complete under their name, or not there at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "w", newline: str | None = None) -> Iterator[IO[Any]]:
    """Open a hidden file beside `path`, `mode` "w" (UTF-8) or "wb", that takes its name when the block has ended well.

    A run that is killed leaves what was there before. What is no file (/dev/stdout, a pipe) is written directly.

    Raises:
        OSError: naming `path`.
    """
    name = os.fspath(path)
    target = os.path.realpath(name)
    encoding = None if "b" in mode else "utf-8"
    permissions = _permissions(target, name)
    if permissions is None:
        with open(name, mode, encoding=encoding, newline=newline) as file:
            yield file
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".", suffix=".tmp")
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None
    try:
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, permissions)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _permissions(target: str, name: str) -> int | None:
    """The mode bits of the file to be: those of the one it replaces, else the user's; None for what is no file.

    Raises:
        OSError: a folder, or a file that may not be written.
    """
    try:
        found = os.stat(target).st_mode
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
    if stat.S_ISDIR(found):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if not stat.S_ISREG(found):
        return None
    if not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), name)
    return stat.S_IMODE(found)
