"""Deliberately wrong formulas, and whether a test of fact notices: python -m benchmarks.mutants [--only NAME] [--list].

`mutants.csv` names one wrong formula a row: name, file, old text, new text, kind, and the test files that are to notice
("killed by"). Each is written into a copy of the tree, its own tests run, and where those pass the wider set runs. The
tests of README and docs are left out on purpose: `make readme` rewrites those figures from the code under test.

  python -m benchmarks.mutants                     # all rows: about ten minutes on two cores
  python -m benchmarks.mutants --only allocator    # rows whose name, kind or file has this text
  python -m benchmarks.mutants --own               # each with its own tests only
  python -m benchmarks.mutants --list              # rows by kind
  python -m benchmarks.mutants --check             # only whether every old text is found exactly once

A row whose old text is not found exactly once is refused: the formula has moved, so the row moves with it. Exit status:
0 where every mutant was killed, 1 where one survived, 2 where a row or the tree itself is wrong.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_name("mutants.csv")
COLUMNS = ("name", "file", "old", "new", "kind", "killed by")
COPIED = ("planner", "calibrate", "benchmarks", "tests", "data", "docs", ".ci", "README.md", "CHANGELOG.md",
          "pyproject.toml", "setup.cfg")  # fmt: skip
WIDER = ("step", "memory", "timing", "plan", "sweep", "training", "device", "facts", "model", "runs")
"""Folders of tests that run where a mutant's own tests pass; README and docs are not among them."""
CHOSEN = "not slow and not oracle"
"""Tests that run, of a mutant's own and of the wider set."""


@dataclass(frozen=True)
class Mutant:
    """One wrong formula."""

    name: str
    file: str
    old: str
    new: str
    kind: str
    killers: tuple[str, ...]
    """Test files, or single tests, that notice it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    by: str
    """The first test that failed; empty: it survived."""
    expected: bool
    """Whether that was one of its own tests."""
    seconds: float


class WrongRow(Exception):
    """A row that cannot be applied, or a tree whose tests fail before anything is changed."""


def read(path: Path = FILE) -> tuple[Mutant, ...]:
    """The rows of the table.

    Raises:
        WrongRow: other columns, a name that is there twice, or nothing changed.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise WrongRow(f"{path.name}: the columns are {reader.fieldnames}; must be {', '.join(COLUMNS)}")
        rows = tuple(
            Mutant(row["name"], row["file"], row["old"], row["new"], row["kind"], tuple(row["killed by"].split()))
            for row in reader
        )
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            raise WrongRow(f"{row.name}: there are two rows of this name")
        if row.old == row.new or not row.killers:
            raise WrongRow(f"{row.name}: nothing changes, or no test is named")
    return rows


def applied(mutant: Mutant, root: Path = ROOT) -> str:
    """The mutated text of its file.

    Raises:
        WrongRow: the old text is not there exactly once.
    """
    path = root / mutant.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = text.count(mutant.old)
    if found != 1:
        raise WrongRow(f"{mutant.name}: its old text is {found} times in {mutant.file}; must be there exactly once")
    return text.replace(mutant.old, mutant.new)


class Copy:
    """A copy of the tree in which one mutant after the other is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=ignored)
            else:
                shutil.copy2(source, folder / name)
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        # modules that did not change are not compiled anew; what says so is their text, as times are too coarse
        compiling = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "planner"]
        subprocess.run(compiling, cwd=folder, check=True, env=self.environment)

    def pytest(self, paths: Sequence[str]) -> str:
        """The first test that fails; empty: none does."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
        command += ["-m", CHOSEN]
        ran = subprocess.run(
            [*command, *paths], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        if ran.returncode == 0:
            return ""
        failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].split(" - ")[0].partition(" ")[2] if failed else f"pytest ended with {ran.returncode}"

    def outcome(self, mutant: Mutant, wider: bool) -> Outcome:
        """Apply a mutant, run its tests, where they pass the wider set if asked for, and take it back."""
        path, text, began = self.folder / mutant.file, applied(mutant, self.folder), time.monotonic()
        before = path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        try:
            by = self.pytest(mutant.killers)
            expected = bool(by)
            if not by and wider:
                by = self.pytest([f"tests/{name}" for name in WIDER])
        finally:
            path.write_text(before, encoding="utf-8")
        return Outcome(mutant, by, expected, time.monotonic() - began)


def outcomes(mutants: Sequence[Mutant], jobs: int, wider: bool) -> Iterator[Outcome]:
    """Try the mutants, in their order, in so many copies of the tree.

    Raises:
        WrongRow: a test that is named fails before anything is changed.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        made = [Copy(Path(folder) / str(number)) for number in range(jobs)]
        broken = made[0].pytest(sorted({killer for mutant in mutants for killer in mutant.killers}))
        if broken:
            raise WrongRow(f"{broken}: fails before anything is changed")
        for copy in made:
            copies.put(copy)

        def tried(mutant: Mutant) -> Outcome:
            copy = copies.get()
            try:
                return copy.outcome(mutant, wider)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(tried, mutants)


def table(found: Sequence[Outcome]) -> str:
    """Killed and all, by kind."""
    kinds = sorted({item.mutant.kind for item in found})
    width = max(map(len, (*kinds, "all")))
    lines = []
    for kind in (*kinds, "all"):
        some = [item for item in found if kind in (item.mutant.kind, "all")]
        killed = sum(bool(item.by) for item in some)
        own = sum(item.expected for item in some)
        lines.append(f"{kind:<{width}}  {killed:>3} of {len(some):>3} killed, {own:>3} by their own tests")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows whose name, kind or file has")
    parser.add_argument("--own", action="store_true", help="leave out the wider set of tests")
    parser.add_argument("--list", action="store_true", help="print the rows, try none")
    parser.add_argument("--check", action="store_true", help="only look whether every row can be applied")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="copies tried at a time")
    given = parser.parse_args(arguments)
    try:
        rows = [
            row for row in read()
            if not given.only or any(word in part for word in given.only for part in (row.name, row.kind, row.file))
        ]  # fmt: skip
        for row in rows:
            applied(row)
        if given.list:
            print("\n".join(f"{row.kind:<14} {row.file:<36} {row.name}" for row in sorted(rows, key=lambda r: r.kind)))
        if given.list or given.check or not rows:
            print(f"{len(rows)} mutants, every old text is found once")
            return 0
        found = []
        for item in outcomes(rows, max(1, min(given.jobs, len(rows))), not given.own):
            found.append(item)
            verdict = f"killed by {item.by}" if item.by else "SURVIVED"
            aside = "" if item.expected or not item.by else " (not by its own tests)"
            print(f"{item.mutant.name}: {verdict}{aside}, {item.seconds:.1f} s", flush=True)
    except WrongRow as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found))
    return 0 if all(item.by for item in found) else 1


if __name__ == "__main__":
    sys.exit(main())
