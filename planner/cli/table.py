"""`loraplan table`: what fits where, how fast and at what price, for every combination of lists."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from planner.base.outputs import whole_file
from planner.cli.data_options import data_options, take
from planner.cli.from_config import ShowKeys, config_options, show_keys, take_job, take_reading
from planner.cli.options import Sectioned, Word, calibration_option
from planner.plan.jobs import is_config
from planner.plan.table import explicit, read_grid, tabulator
from planner.training.options import OPTIONS

if TYPE_CHECKING:
    from planner.importers import Job
    from planner.plan.rows import Block, Caption
    from planner.plan.table import Tabulator, Wanted

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
        **{name: rest.pop(name) for name in ("where", "sort", "top", "pareto", "pivot", "show")},
        style=chosen_style(style, output), output=output,
    )  # fmt: skip
    costs = {name: rest.pop(name) for name in ("tokens", "rows", "epochs", "mean_tokens", "price", "margin")}
    costs["calibration"] = rest.pop("calibration")
    costs["data"] = take(rest)
    source, job = sources_of(take_reading(rest), rest)
    if isinstance(job, ShowKeys):
        return show_keys(job.job, view.style if view.style in ("json", "csv", "markdown") else "table")
    lists = {
        "model": list(models),
        "gpu": list(gpus),
        "vram": list(rest.pop("vram")),
        **{k: list(v) for k, v in rest.items() if v},
    }
    if grid is not None:
        lists = {**read_grid(grid), **{k: v for k, v in lists.items() if v}}
    if job is not None and job.model and not lists["model"]:
        lists["model"] = [job.model]
    made = explicit(source, lists, costs, job) if source is not None else [tabulator(lists, costs, job)]
    return view.print(made)


def sources_of(reading: dict[str, Any], lists: Mapping[str, Sequence[Any]]) -> tuple[str | None, Job | ShowKeys | None]:
    """What the files of --from are: explicit rows (one CSV file at most), and the job of the training configs.

    Raises:
        PlannerError: configs that cannot be read, or two files of rows.
    """
    from planner.base.errors import Contradiction

    configs = tuple(name for name in reading["configs"] if is_config(name, several=True))
    rows = [name for name in reading["configs"] if name not in configs]
    if len(rows) > 1:
        raise Contradiction("--from names two files of rows; put the rows into one")
    single = {key: values[0] for key, values in lists.items() if len(values) == 1}
    return (rows[0] if rows else None), take_job({**reading, "configs": configs}, single)


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
            rows = self._rows((row for block in blocks for row in block.rows(columns)), columns)
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

    def _rows(self, rows: Iterator[tuple[Any, ...]], columns: Sequence[str]) -> list[tuple[Any, ...]]:
        from planner.base.errors import InvalidInput
        from planner.plan import rows as plan_rows
        from planner.report import grid as report

        found: Any = rows
        if self.pareto:
            found = plan_rows.pareto(
                found, [columns.index(plan_rows.column_of(w, columns)) for w in self.pareto.split(",")]
            )
        if self.sort:
            keys = [w.strip() for w in self.sort.split(",")]
            numbers = [(columns.index(plan_rows.column_of(w.lstrip("-"), columns)), w.startswith("-")) for w in keys]
            return plan_rows.kept_sorted(found, numbers, self.top or 0)
        held: list[tuple[Any, ...]] = []
        for row in found:
            if self.top and len(held) >= self.top:
                break
            if len(held) >= report.MOST_SHOWN:
                raise InvalidInput(
                    f"more than {report.MOST_SHOWN:,} rows; use csv, jsonl or parquet, or narrow with --where or --top"
                )
            held.append(row)
        return held

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


def columns_of(wanted: Sequence[Wanted], budget: bool) -> list[str]:
    """Columns of a table: model, card, the settings that were given, the numbers, the results."""
    from planner.plan.rows import RESULTS
    from planner.plan.sweep import NUMBERS

    settings = dict.fromkeys(key for one in wanted for key in one.values if key not in NUMBERS)
    results = [name for name in RESULTS if budget or name not in ("hours", "usd")]
    return ["model", "gpu", *settings, *NUMBERS, *results]


def caption_of(made: Sequence[Tabulator], *, final: bool) -> Caption:
    """Version, calibration, prices and their days, and the settings that all rows share."""
    from planner import __version__
    from planner.plan.money import ESTIMATED
    from planner.plan.rows import Caption
    from planner.report.answer import value_words
    from planner.timing.coefficients import time_words

    prices = [price for one in made for price in one.run.prices.values() if price is not None]
    days = sorted({price.date for price in prices if price.date})
    shared = dict(made[0].shared)
    for one in made[1:]:
        shared = {key: value for key, value in shared.items() if one.shared.get(key) == value}
    chosen = {name: item for one in made for name, item in one.run.chosen.items()}
    lines = [f"loraplan {__version__}; {made[0].basis}; {time_words(chosen)}"]
    if made[0].run.margin:
        lines.append(f"{made[0].run.margin:g} % of every card is kept free (--margin)")
    if final and any(scan.token_error for one in made for scan in one.known.scans.values()):
        lines.append(ESTIMATED)
    if made[0].run.budget and days:
        lines.append(f"prices on demand, read {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else ""))
    if final and shared:
        order = ("stack", "method", "quantization", "gradient_checkpointing", "attention", "loss", "optimizer",
                 "target_modules", "base_dtype", "autocast")  # fmt: skip
        words = [f"{key} {value_words(shared[key])}" for key in order if key in shared]
        lines.append(f"all rows: {'; '.join(words)}")
    data: dict[str, Any] = {
        "version": __version__, "basis": made[0].basis, "prices_read": days,
        "calibrated": sorted(name for name, item in chosen.items() if item.calibration and not item.borrowed),
        "borrowed": {n: i.calibration.label for n, i in sorted(chosen.items()) if i.calibration and i.borrowed},
        "shared": {key: value_words(value) for key, value in shared.items()},
    }  # fmt: skip
    if final:
        notes = notes_of(made)
        data["warnings"] = [{"text": text, "rows": rows} for text, rows in notes.items()]
        lines += warnings_of(notes, sum(one.evaluated for one in made))
    return Caption(tuple(lines), data)


def notes_of(made: Sequence[Tabulator]) -> dict[str, int]:
    """Distinct notes of the plans of all rows, with the number of rows that each concerns."""
    found: dict[str, int] = {}
    for one in made:
        for note, rows in one.notes.items():
            found[note] = found.get(note, 0) + rows
    return found


def warnings_of(notes: Mapping[str, int], rows: int) -> list[str]:
    """The notes as lines, with how many of the rows they concern."""
    return [f"warning{f' ({n:,} of {rows:,} rows)' if n < rows else ''}: {note}" for note, n in notes.items()]


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
