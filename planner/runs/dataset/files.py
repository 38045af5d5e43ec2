"""Streaming readers: JSON lines, a JSON array, CSV and parquet, record by record in little memory.

Nothing in a file is executed or fetched. A broken record is handed on as a problem with its line number, and reading
goes on after it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from planner.base.errors import InvalidInput, MissingDependency, one_line

MAX_RECORD = 64 * 2**20
"""Bytes of one record: a longer line is reported, not read into memory."""
_CHUNK = 2**20
_BLANK = " \t\r\n"


class Record(NamedTuple):
    """One record of a file: its line (row in parquet), and its value or what is wrong with it."""

    line: int
    value: Any
    problem: str = ""


Progress = Callable[[int], None]
"""Called with the bytes read since the last call."""


def kind(path: str) -> str:
    """Return jsonl, json, csv or parquet: by the file's name, and for .json by its first character.

    Raises:
        InvalidInput: no such regular file, or an unknown ending.
    """
    ending = os.path.splitext(path)[1].lower()
    known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InvalidInput(f"{one_line(path, 200)}: {error.strerror}; give a data file") from None
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{one_line(path, 200)} is not a regular file; give a .jsonl, .json, .csv or .parquet file")
    if ending not in known:
        raise InvalidInput(f"{one_line(path, 200)}: unknown ending {ending or 'none'!r}; known: {', '.join(known)}")
    if known[ending] == "json":
        with open(path, "rb") as file:
            return "json" if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" else "jsonl"
    return known[ending]


def records(path: str, progress: Progress | None = None) -> Iterator[Record]:
    """Yield the records of one file in order.

    Raises:
        PlannerError: the file cannot be read at all.
    """
    readers: dict[str, Callable[[str, Progress], Iterator[Record]]] = {
        "jsonl": _lines, "json": _array, "csv": _csv, "parquet": _parquet,
    }  # fmt: skip
    return readers[kind(path)](path, progress or (lambda _: None))


def _lines(path: str, progress: Progress) -> Iterator[Record]:
    decode = _decoder()
    with open(path, "rb") as file:
        for number, line in enumerate(_bounded_lines(file), 1):
            progress(len(line))
            if len(line) > MAX_RECORD:
                yield Record(number, None, f"longer than {MAX_RECORD // 2**20} MiB")
            elif line.isspace():
                continue
            else:
                yield _decoded(number, line if number > 1 else line.removeprefix(b"\xef\xbb\xbf"), decode)


def _bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield lines; of one that is too long only its beginning (longer than MAX_RECORD), the rest is passed over."""
    while line := file.readline(MAX_RECORD + 1):
        yield line
        while len(line) > MAX_RECORD and not line.endswith(b"\n"):
            line = file.readline(MAX_RECORD + 1)
            if not line:
                return


def _decoder() -> Callable[[bytes], Any]:
    """orjson where it is installed, else the standard library."""
    try:
        import orjson
    except ImportError:
        return lambda line: json.loads(line.decode())  # bytes would have their encoding guessed first
    loads: Callable[[bytes], Any] = orjson.loads
    return loads


def _decoded(number: int, line: bytes, decode: Callable[[bytes], Any]) -> Record:
    try:
        return Record(number, decode(line))
    except json.JSONDecodeError as error:  # orjson's error is one too
        return Record(number, None, f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError:
        return Record(number, None, "not UTF-8")
    except RecursionError:
        return Record(number, None, "nested too deeply")
    except ValueError as error:
        return Record(number, None, f"not JSON: {one_line(str(error), 60)}")


def _array(path: str, progress: Progress) -> Iterator[Record]:
    """Yield the elements of a JSON array; what follows a broken element cannot be read and is reported."""
    with open(path, encoding="utf-8-sig", errors="strict") as file:
        reader = _ArrayReader(file, progress)
        try:
            yield from reader.elements()
        except UnicodeDecodeError:
            yield Record(reader.line, None, "not UTF-8: the rest of the file cannot be read")


class _ArrayReader:
    """A JSON array read in pieces: `text` from `place` on is not parsed yet, `line` is the line of `place`."""

    def __init__(self, file: IO[str], progress: Progress) -> None:
        self.file, self.progress = file, progress
        self.text, self.place, self.line, self.ended = "", 0, 1, False

    def elements(self) -> Iterator[Record]:
        """Yield every element, then what is wrong with the rest."""
        decoder = json.JSONDecoder()
        self._fill()
        self._move(self.text.index("[") + 1)
        while (mark := self._next()) != "]":
            if not mark:
                yield Record(self.line, None, "the array is not closed")
                return
            try:
                value, end = decoder.raw_decode(self.text, self.place)
            except (json.JSONDecodeError, RecursionError) as error:
                cut_off = isinstance(error, json.JSONDecodeError) and len(self.text) - self.place < MAX_RECORD
                if self.ended or not cut_off:
                    yield Record(self.line, None, "not JSON: the rest of the array cannot be read")
                    return
                self._fill()
                continue
            if end == len(self.text) and not self.ended:  # a number may go on in the next piece
                self._fill()
                continue
            yield Record(self.line, value)
            self._move(end)

    def _next(self) -> str:
        """Pass over blanks and commas; return the character after them, empty at the end of the file."""
        while True:
            place = self.place
            while place < len(self.text) and self.text[place] in f"{_BLANK},":
                place += 1
            self._move(place)
            if place < len(self.text) or self.ended:
                return self.text[place : place + 1]
            self._fill()

    def _fill(self) -> None:
        """Read one more piece and forget what is parsed."""
        more = self.file.read(_CHUNK)
        self.progress(len(more))
        self.ended = not more
        self.text, self.place = self.text[self.place :] + more, 0

    def _move(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place


def _csv(path: str, progress: Progress) -> Iterator[Record]:
    import csv

    before = csv.field_size_limit(MAX_RECORD)  # a limit of the whole process: put back at the end
    try:
        yield from _csv_rows(path, progress)
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: str, progress: Progress) -> Iterator[Record]:
    import csv

    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(_counted(file, progress), strict=True)
        names: list[str] = []
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(reader.line_num, None, f"not CSV: {one_line(str(error), 60)}")
                continue
            if not names:
                names = cells
            elif len(cells) != len(names):
                if cells:
                    yield Record(reader.line_num, None, f"{len(cells)} cells, the header has {len(names)}")
            else:
                yield Record(reader.line_num, _cells(names, cells))


def _cells(names: list[str], cells: list[str]) -> dict[str, Any]:
    """A CSV row as a record; conversations are JSON inside a cell."""
    row: dict[str, Any] = dict(zip(names, cells, strict=True))
    for key in ("messages", "conversations"):
        if key in row:
            try:
                row[key] = json.loads(row[key])
            except (ValueError, RecursionError):
                row[key] = None
    return row


def _counted(file: IO[str], progress: Progress) -> Iterator[str]:
    for line in file:
        progress(len(line))
        yield line


def _parquet(path: str, progress: Progress) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependency(
            "parquet needs pyarrow (pip install 'loraplan[data]'); or convert the file to JSON lines"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        total, size, number = max(file.metadata.num_rows, 1), os.path.getsize(path), 0
        for batch in file.iter_batches(batch_size=1024):
            for value in _parquet_rows(batch):
                number += 1
                yield Record(number, value, "" if value is not None else "not UTF-8")
            progress(size * len(batch) // total)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{one_line(path, 200)} is not readable parquet: {one_line(str(error), 100)}") from None


def _parquet_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch without their nulls; None for one whose text is not UTF-8, which spoils its whole batch."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            yield None
            return
        for number in range(len(batch)):
            yield from _parquet_rows(batch.slice(number, 1))
        return
    for row in rows:
        yield {key: value for key, value in row.items() if value is not None}
