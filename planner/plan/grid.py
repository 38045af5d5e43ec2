"""Grids in files: lists in YAML, explicit rows in CSV."""

from __future__ import annotations

import csv
import io
import itertools

from planner.base.bounded import read_bounded
from planner.base.errors import Contradiction, InvalidInput, MissingDependency, PlannerError, one_line
from planner.base.records import replace
from planner.plan.jobs import Files, is_config
from planner.plan.request import Known, Request
from planner.plan.table import Lists, Tabulator, tabulator
from planner.plan.values import key_of

MAX_FILE_BYTES = 1 << 20

MOST_LISTED = 100_000


def read_grid(path: str) -> dict[str, list[object]]:
    """Read lists from a YAML file: settings under their names or the names of their options.

    Raises:
        PlannerError: it is not such a file.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency("--grid needs PyYAML; pip install 'loraplan[tables]'") from error
    text = _bounded(path)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.events.AliasEvent):  # few bytes can stand for many
                raise InvalidInput(f"{one_line(path)!r}: aliases (*name) are not read; write the values out")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{one_line(path)!r} is no YAML: {one_line(str(error), 200)}") from None
    if not isinstance(data, dict):
        raise InvalidInput(f"{one_line(path)!r} must map names to lists, for example gpu: [rtx-4090, l4]")
    return {key_of(name): value if isinstance(value, list) else [value] for name, value in data.items()}


def _bounded(path: str) -> str:
    return read_bounded(path, MAX_FILE_BYTES * 16, "table of rows or lists").decode("utf-8-sig", "replace")


def explicit(path: str, lists: Lists, base: Request, shared: Known | None = None) -> list[Tabulator]:
    """One small table per row of a CSV file; what a row leaves open the options say, then the job.

    Raises:
        PlannerError: an unknown column or value, with its line.
    """
    try:
        reader = csv.DictReader(io.StringIO(_bounded(path), newline=""), strict=True)
        keys = {name: key_of(name) for name in reader.fieldnames or ()}
        listed = list(itertools.islice(reader, MOST_LISTED))
    except csv.Error as error:
        raise InvalidInput(f"{one_line(path)!r} is no CSV file: {one_line(str(error))}") from None
    if len(listed) >= MOST_LISTED:
        raise InvalidInput(f"{one_line(path)!r} has {MOST_LISTED:,} rows or more; split it")
    shared = shared or Known()
    base = replace(base, job=shared.job(base.job, base.settings))
    made = []
    for number, row in enumerate(listed, start=2):
        given = {keys[name]: [text] for name, text in row.items() if name in keys and text}
        try:
            one = tabulator({**{k: v for k, v in lists.items() if v}, **given}, base, shared)
        except PlannerError as error:
            raise type(error)(f"{one_line(path, 60)} line {number}: {error}") from None
        one.exact = True
        made.append(one)
    if not made:
        raise InvalidInput(f"{one_line(path)!r} has no rows")
    return made


def tables(
    lists: Lists, base: Request, *, grid: str | None = None, rows: str | None = None, shared: Known | None = None
) -> list[Tabulator]:
    """What is to be tabulated, of lists, a file of lists (what is listed beside it holds) or a file of rows.

    Raises:
        PlannerError: unknown names or values, or a file that is none.
    """
    if grid is not None:
        lists = {**read_grid(grid), **{name: values for name, values in lists.items() if values}}
    return explicit(rows, lists, base, shared) if rows is not None else [tabulator(lists, base, shared)]


def rows_among(files: Files) -> tuple[Files, str | None]:
    """The training configs among files, and the one that holds rows.

    Raises:
        Contradiction: two files of rows.
    """
    configs = tuple(name for name in files.paths if is_config(name, several=True))
    rows = [name for name in files.paths if name not in configs]
    if len(rows) > 1:
        raise Contradiction("--from names two files of rows; put the rows into one")
    return files._replace(paths=configs), rows[0] if rows else None
