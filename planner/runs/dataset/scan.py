"""Read data files once, in little memory: rows, lengths in tokens, what is wrong where; split and write them."""

from __future__ import annotations

import json
import os
import random
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import IO, Any, Literal, NamedTuple, get_args

from planner.base.errors import InvalidInput, one_line
from planner.base.outputs import whole_file
from planner.base.records import record
from planner.runs.dataset import chat, files
from planner.runs.dataset.lengths import Lengths
from planner.runs.dataset.rows import Row, RowError, doubts, parse
from planner.runs.dataset.templates import Template, choose
from planner.runs.dataset.tokens import Counter, Estimate, Exact, folder_of

BATCH = 512
"""Texts tokenized at a time."""
KEPT = 20
"""Problems of which the line and the reason are kept; the rest is counted."""

Shape = Literal["same", "text", "messages", "prompt", "alpaca"]
WRITTEN: tuple[str, ...] = get_args(Shape)


class Problem(NamedTuple):
    """A record that was left out."""

    file: str
    line: int
    reason: str


class Doubt(NamedTuple):
    """Something odd in rows that are used: how many, and the first of them."""

    rows: int
    file: str
    line: int


class Usable(NamedTuple):
    """A row that is trained on."""

    line: int
    value: Any
    row: Row
    text: str


@record
class Source:
    """What is read, and how its rows become text and tokens."""

    paths: tuple[str, ...]
    template: str = "auto"
    tokenizer: str | None = None
    family: str = "llama2"
    """Vocabulary that the estimate stands on when there is no tokenizer."""


@record
class Scan:
    """What one pass over the files found."""

    source: Source
    lengths: Lengths
    template: Template
    shapes: tuple[tuple[str, int], ...]
    """(shape, rows), most frequent first."""
    problems: tuple[Problem, ...]
    num_problems: int
    doubts: tuple[tuple[str, Doubt], ...]
    duplicates: int
    """Rows whose text occurred before."""
    characters: int
    bytes: int
    token_label: str
    token_error: float
    example: str
    """The first row's text."""


class Reader:
    """The usable rows of the files, rendered; what is left out is collected in `problems`."""

    def __init__(self, source: Source, progress: files.Progress | None = None) -> None:
        self.source = source
        self.progress = progress
        self.chat = chat.load(folder_of(source.tokenizer)) if source.tokenizer else None
        self.template: Template | None = None
        self.problems: list[Problem] = []
        self.num_problems = 0
        self.file = ""

    def rows(self) -> Iterator[Usable]:
        """Yield every usable row; the first decides the template when it is `auto`."""
        for path in self.source.paths:
            self.file = os.path.basename(path)
            for item in files.records(path, self.progress):
                if item.problem:
                    self._problem(item.line, item.problem)
                    continue
                try:
                    row = parse(item.value)
                    if self.template is None:
                        self.template = choose(self.source.template, row.shape, self.chat)
                    text = self.template.render(row)
                    text.encode()
                except RowError as error:
                    self._problem(item.line, str(error))
                except UnicodeEncodeError:
                    self._problem(item.line, "half of a surrogate pair: not valid Unicode")
                else:
                    yield Usable(item.line, item.value, row, text)

    def _problem(self, line: int, reason: str) -> None:
        self.num_problems += 1
        if len(self.problems) < KEPT:
            self.problems.append(Problem(self.file, line, reason))


def scan(source: Source, progress: files.Progress | None = None) -> Scan:
    """Read everything once.

    Raises:
        PlannerError: a file that cannot be read, or no usable row at all.
    """
    reader = Reader(source, progress)
    tally = _Tally()
    lengths = Lengths()
    counter: Counter | None = None
    queue = _Queue(lengths)
    for item in reader.rows():
        if counter is None:
            counter = _counter(source, reader.template)
        tally.add(reader.file, item)
        queue.add(item.text, counter)
    queue.close(counter)
    if counter is None or reader.template is None:
        found = f"; first: line {reader.problems[0].line}: {reader.problems[0].reason}" if reader.problems else ""
        raise InvalidInput(f"no usable row in {one_line(', '.join(source.paths), 100)}{found}")
    return Scan(
        source=source,
        lengths=lengths,
        template=reader.template,
        shapes=tuple(sorted(tally.shapes.items(), key=lambda item: -item[1])),
        problems=tuple(reader.problems),
        num_problems=reader.num_problems,
        doubts=tuple(tally.doubts.items()),
        duplicates=tally.duplicates(),
        characters=tally.characters,
        bytes=sum(os.path.getsize(path) for path in source.paths),
        token_label=counter.label,
        token_error=counter.relative_error,
        example=tally.example,
    )


def _counter(source: Source, template: Template | None) -> Counter:
    if source.tokenizer is None:
        return Estimate(source.family)
    return Exact(source.tokenizer, adds_special=not (template and template.special_tokens))


class _Tally:
    """Counts over the usable rows."""

    def __init__(self) -> None:
        self.shapes: dict[str, int] = {}
        self.doubts: dict[str, Doubt] = {}
        self.hashes = array("q")
        self.characters = 0
        self.example = ""

    def add(self, file: str, item: Usable) -> None:
        """Count one row."""
        self.shapes[item.row.shape] = self.shapes.get(item.row.shape, 0) + 1
        self.characters += len(item.text)
        self.hashes.append(hash(item.text))
        self.example = self.example or item.text
        for reason in doubts(item.row):
            seen = self.doubts.get(reason, Doubt(0, file, item.line))
            self.doubts[reason] = seen._replace(rows=seen.rows + 1)

    def duplicates(self) -> int:
        """Rows whose 64-bit hash occurred before; the hashes are dropped."""
        ordered = sorted(self.hashes)
        self.hashes = array("q")
        return sum(a == b for a, b in pairwise(ordered))


class _Queue:
    """Texts on their way to the counter: one batch is tokenized in the background while the next is read."""

    def __init__(self, lengths: Lengths) -> None:
        self.lengths = lengths
        self.texts: list[str] = []
        self.pending: Any = None
        self.pool: Any = None

    def add(self, text: str, counter: Counter) -> None:
        """Take one text; count when a batch is full."""
        self.texts.append(text)
        if len(self.texts) == BATCH:
            self._flush(counter)

    def _flush(self, counter: Counter) -> None:
        texts, self.texts = self.texts, []
        if counter.relative_error:  # an estimate is arithmetic: nothing to do beside it
            self.lengths.values.extend(counter.count(texts))
            return
        if self.pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self.pool = ThreadPoolExecutor(1)
        self._collect()
        self.pending = self.pool.submit(counter.count, texts)

    def _collect(self) -> None:
        if self.pending is not None:
            self.lengths.values.extend(self.pending.result())
            self.pending = None

    def close(self, counter: Counter | None) -> None:
        """Count what is left."""
        if counter is not None and self.texts:
            self._flush(counter)
        self._collect()
        if self.pool is not None:
            self.pool.shutdown()


# --- splitting and writing ------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How rows are divided: the first floor(n * share) of them, or as many drawn with a seed."""

    share: float
    seed: int | None
    """None: in the order of the file, as the course does."""

    def train_rows(self, rows: int) -> int:
        """floor(rows * share)."""
        return int(rows * self.share + 1e-9)

    def membership(self, rows: int) -> Iterator[bool]:
        """Yield for every row whether it is a training row (selection sampling: one pass, no list)."""
        left = self.train_rows(rows)
        rng = random.Random(self.seed)
        for number in range(rows):
            chosen = number < self.train_rows(rows) if self.seed is None else rng.random() * (rows - number) < left
            left -= chosen
            yield chosen


def write(found: Scan, split: Split, folder: str, shape: Shape) -> dict[str, int]:
    """Write train.jsonl and validation.jsonl to `folder`, rows in the order of the files; returns the rows in each.

    Raises:
        PlannerError: a row that the wanted shape cannot hold.
    """
    os.makedirs(folder, exist_ok=True)
    reader = Reader(found.source)
    names = ("train.jsonl", "validation.jsonl")
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if os.path.exists(path) and any(os.path.samefile(path, given) for given in found.source.paths):
            raise InvalidInput(f"{one_line(path, 200)} is an input; write to another folder")
    written = dict.fromkeys(names, 0)
    with whole_file(paths[0]) as train, whole_file(paths[1]) as validation:
        for item, trains in zip(reader.rows(), split.membership(len(found.lengths)), strict=False):
            file: IO[str] = train if trains else validation
            file.write(json.dumps(_shaped(item, shape, reader.file), ensure_ascii=False) + "\n")
            written[names[0] if trains else names[1]] += 1
    return written


def _shaped(item: Usable, shape: Shape, file: str) -> Any:
    row = item.row
    if shape == "same":
        return item.value
    if shape == "text":
        return {"text": item.text}
    if shape == "messages" and row.turns:
        return {"messages": [turn._asdict() for turn in row.turns]}
    if shape == "prompt" and row.instruction:
        question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
        return {"prompt": question, "response": row.output}
    if shape == "alpaca" and row.instruction:
        return {"instruction": row.instruction, "input": row.input, "output": row.output}
    raise InvalidInput(
        f"{one_line(file, 60)} line {item.line}: a row of shape {row.shape} with {len(row.turns)} turns cannot be "
        f"written as {shape}; choose {', '.join(w for w in WRITTEN if w != shape)}"
    )
