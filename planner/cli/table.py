"""`loraplan table`: what fits where, how fast and at what price, for every combination of lists."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from planner.base.outputs import whole_file
from planner.cli.asking import data_of, known
from planner.cli.data_options import data_options
from planner.cli.from_config import ShowKeys, config_options, files_of, show_keys, take_job
from planner.cli.options import Sectioned, Word, calibration_option
from planner.plan.given import Settings
from planner.plan.grid import rows_among, tables
from planner.plan.request import Cost, Request
from planner.report.table import caption_of, columns_of, kept, notes_of, warnings_of
from planner.training.options import OPTIONS
from planner.training.settings import LIBRARIES

if TYPE_CHECKING:
    from planner.importers import Job
    from planner.plan.rows import Block, Caption
    from planner.plan.table import Tabulator

STYLES = ("table", "json", "jsonl", "csv", "markdown", "latex", "html", "parquet")

_Command = TypeVar("_Command", bound=Callable[..., Any])


def lists_of_settings(command: _Command) -> _Command:
    """Add every training setting as an option that takes lists."""
    for option in reversed(OPTIONS.values()):
        flags = [part.partition("/")[0] for part in option.flags]
        command = click.option(*flags, option.key, multiple=True, metavar="LIST", help=option.help)(command)
    return command


@click.command(cls=Sectioned)
@click.argument("models", nargs=-1)
@click.option("--gpu", "gpus", multiple=True, metavar="LIST", help="Cards of the catalogue; all for every NVIDIA card.")
@click.option("--vram", multiple=True, metavar="LIST", help="Memory of cards of your own, for example 16GiB,24GiB.")
@click.option("--margin", metavar="PERCENT", default="0", help="Share of every card that must stay free.")
@click.option("--grid", metavar="FILE", help="Lists in a YAML file: model, gpu, and settings by their names.")
@config_options
@click.option("--where", multiple=True, metavar="CONDITION", help="Keep rows such as peak<24 or verdict=fits.")
@click.option("--sort", metavar="COLUMNS", help="Sort by columns, time,-usd (minus: largest first); see --top.")
@click.option(
    "--top",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Only the first rows; without it at most 200,000 rows are sorted.",
)
@click.option("--pareto", metavar="COLUMNS", help="Only rows that no other row beats, for example time,usd.")
@click.option("--pivot", nargs=2, metavar="ROW COLUMN", help="A matrix of these two, for example model gpu.")
@click.option("--show", default="peak", show_default=True, help="The column that --pivot shows.")
@click.option("--tokens", metavar="N", help="Train on this many tokens, for example 10M: hours and USD.")
@click.option("--rows", type=int, metavar="N", help="Train on this many rows.")
@click.option("--epochs", type=float, metavar="N", help="Passes over the rows (default 1).")
@click.option("--mean-tokens", type=float, metavar="N", help="Useful tokens per row, where rows are padded.")
@click.option("--price", type=float, metavar="USD", help="USD per hour, of every card.")
@calibration_option
@click.option("--format", "style", type=Word("format", STYLES), help="How to print; the suffix of -o decides too.")
@click.option("-o", "--output", metavar="FILE", help="Write to a file.")
@data_options
@lists_of_settings
def table(
    models: tuple[str, ...], gpus: tuple[str, ...], grid: str | None, output: str | None, style: str | None,
    **rest: Any,
) -> int:  # fmt: skip
    """Tabulate verdict, memory, time and cost for every combination of lists.

    A list is commas or the same option again; numbers may be ranges (1..8, 512..8192:512). --from takes a training
    config, whose settings hold where no list is given, or explicit rows: a CSV file with columns of the same names.

    \b
    Examples:
      loraplan table meta-llama/Llama-3.1-8B --gpu rtx-4090,a100-sxm4-80gb -q none,nf4
      loraplan table Qwen/Qwen2.5-7B --gpu all --tokens 10M --pareto time,usd
      loraplan table Qwen/Qwen2.5-7B microsoft/phi-2 --gpu l4,t4 --pivot model gpu
      loraplan table --grid ./plan.yaml -o ./plan.parquet
      loraplan table --from qlora.yml --gpu a10g,l4 --seq-len 1024,2048,4096
      loraplan table Qwen/Qwen2.5-7B --gpu l4,a10g --batch 1,2 --data ./train.jsonl --epochs 3

    \b
    Exit codes: 0 there are rows, 1 no row is left, 2 could not answer.
    """
    view = View(
        **{name: rest[name] for name in ("where", "sort", "top", "pareto", "pivot", "show")},
        style=chosen_style(style, output), output=output,
    )  # fmt: skip
    cost = Cost(**{name: rest[name] for name in ("tokens", "rows", "epochs", "mean_tokens", "price")})
    lists = {"model": list(models), "gpu": list(gpus), "vram": list(rest["vram"])}
    lists |= {name: list(rest[name]) for name in OPTIONS if rest[name]}
    source, job = sources_of(rest, lists)
    if isinstance(job, ShowKeys):
        return show_keys(job.job, view.style if view.style in ("json", "csv", "markdown") else "table")
    base = Request(job=job, margin=rest["margin"], calibration=rest["calibration"], data=data_of(rest), cost=cost)
    return view.print(tables(lists, base, grid=grid, rows=source, shared=known()))


def sources_of(given: dict[str, Any], lists: Mapping[str, list[Any]]) -> tuple[str | None, Job | ShowKeys | None]:
    """What the files of --from are: explicit rows (one CSV file at most), and the job of the training configs.

    Raises:
        PlannerError: configs that cannot be read, or two files of rows.
    """
    files, rows = rows_among(files_of(given))
    single = {key: lists[key][0] for key in LIBRARIES if len(lists.get(key, ())) == 1}
    return rows, take_job(files, Settings(single), given["show_keys"])


def chosen_style(style: str | None, output: str | None) -> str:
    """The format that was named, else that of the file's suffix, else a table."""
    from planner.base.errors import Contradiction, unknown
    from planner.report.grid import SUFFIXES

    if style is not None:
        if style == "parquet" and output is None:
            raise Contradiction("parquet is not printed to a terminal; give a file with -o")
        return style
    suffix = Path(output).suffix.lower() if output else ".txt"
    if suffix not in SUFFIXES:
        raise unknown("suffix", suffix, SUFFIXES, "(or name a --format)")
    return SUFFIXES[suffix]


# --- what is printed ----------------------------------------------------------------------------------------------


class View(NamedTuple):
    """Which rows and columns are shown, how, and where."""

    where: tuple[str, ...]
    sort: str | None
    top: int | None
    pareto: str | None
    pivot: tuple[str, str] | None
    show: str
    style: str
    output: str | None

    def print(self, made: Sequence[Tabulator]) -> int:
        """Evaluate, select, write; return the exit code."""
        from planner.base.errors import InvalidInput, one_line
        from planner.plan import rows as plan_rows
        from planner.report import grid as report

        columns = columns_of([one.wanted for one in made], made[0].run.budget)
        conditions = [plan_rows.condition(text, columns) for text in self.where]
        made_blocks = _with_progress(made)
        first = next(made_blocks, None)
        if first is None:  # nothing has an answer: say why instead of an empty table
            raise InvalidInput(next((reason for one in made for reason in one.problems.reasons), "no rows"))
        blocks = (plan_rows.select(b, conditions) for b in itertools.chain([first], made_blocks))
        reorders = self.sort or self.top or self.pareto or self.pivot
        if self.style in report.STREAMED and not reorders:
            count = self._stream(blocks, columns, caption_of(made, final=False))
            self._tell_notes(made)
        else:
            rows = kept((row for block in blocks for row in block.rows(columns)), columns, self)
            count = len(rows)
            caption = caption_of(made, final=True)
            if self.pivot:
                down, across, show = (plan_rows.column_of(word, columns) for word in (*self.pivot, self.show))
                headings, turned = plan_rows.pivot(rows, columns, down, across, show)
                _, verdicts = plan_rows.pivot(rows, columns, down, across, "verdict")
                self._write_matrix(headings, turned, verdicts, caption, show)
            else:
                self._write(columns, rows, caption)
            if self.style in report.STREAMED:
                self._tell_notes(made)
        problems: dict[str, int] = {}
        for one in made:
            for reason, number in one.problems.reasons.items():
                problems[reason] = problems.get(reason, 0) + number
        for reason, number in problems.items():
            click.echo(f"left out {number:,}: {one_line(reason, 300)}", err=True)
        return 0 if count else 1

    def _tell_notes(self, made: Sequence[Tabulator]) -> None:
        """Say on stderr what formats of mere rows have no place for."""
        from planner.base.errors import one_line

        for line in warnings_of(notes_of(made), sum(one.evaluated for one in made)):
            click.echo(one_line(line, 1000), err=True)

    def _stream(self, blocks: Iterator[Block], columns: Sequence[str], caption: Caption) -> int:
        from planner.report import grid as report

        if self.output is None:
            return report.write_streamed(self.style, sys.stdout, columns, blocks, caption)
        if self.style == "parquet":
            with whole_file(self.output, "wb") as binary:
                return report.write_streamed(self.style, binary, columns, blocks, caption)
        with whole_file(self.output, newline="") as file:
            return report.write_streamed(self.style, file, columns, blocks, caption)

    def _write_matrix(
        self, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], verdicts: Sequence[tuple[Any, ...]],
        caption: Caption, show: str,
    ) -> None:  # fmt: skip
        """Write a pivot; where people read it, figures in every column but the first, marked by their verdict."""
        from planner.plan import rows as plan_rows
        from planner.report import grid as report

        if self.style not in report.STREAMED and self.style != "json":
            kind = plan_rows.SHOWN.get(show, plan_rows.Shown(show))
            present = {verdict for row in verdicts for verdict in row[1:]}
            used = [] if show == "verdict" else [word for word in report.MARKS if word in present]
            legend = ", ".join(f"{report.MARKS[word]} {word}" for word in used)
            rows = [
                (row[0], *(report.marked(value, kind, word) for value, word in zip(row[1:], words[1:], strict=True)))
                for row, words in zip(rows, verdicts, strict=True)
            ]
            caption = caption._replace(lines=(kind.heading + (f" ({legend})" if legend else ""), *caption.lines))
        self._write(columns, rows, caption)

    def _write(self, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], caption: Caption) -> None:
        from planner.plan import rows as plan_rows
        from planner.report import grid as report

        if self.style in report.STREAMED:
            arrays = {name: [row[n] for row in rows] for n, name in enumerate(columns)}
            self._stream(iter([plan_rows.Block({}, arrays, len(rows))]), columns, caption)
            return
        width = 0
        if self.output is None and self.style == "table":
            from planner.cli.terminal import table_width

            width = table_width()
        text = report.whole(self.style, columns, rows, caption, width)
        if self.output is None:
            click.echo(text, nl=False)
        else:
            with whole_file(self.output) as file:
                file.write(text)


def _with_progress(made: Sequence[Tabulator]) -> Iterator[Block]:
    """The blocks of all tables, with a bar on stderr when that is a terminal."""
    import os

    total = sum(one.wanted.rows for one in made)
    blocks = (block for one in made for block in one.blocks())
    if not sys.stderr.isatty() or os.environ.get("CI") or total < 1000:
        yield from blocks
        return
    with click.progressbar(length=total, label="rows", file=sys.stderr) as bar:
        for block in blocks:
            yield block
            bar.update(block.size)
