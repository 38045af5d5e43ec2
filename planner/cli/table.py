"""`loraplan table`: what fits where, how fast and at what price, for every combination of lists."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.cli.asking import data_of, known
from planner.cli.data_options import data_options
from planner.cli.from_config import ShowKeys, config_options, files_of, show_keys, take_job
from planner.cli.options import Sectioned, Word, calibration_option
from planner.cli.terminal import table_width
from planner.plan.given import Settings
from planner.plan.grid import rows_among, tables
from planner.plan.request import Cost, Request
from planner.report.table_view import View, chosen_style
from planner.training.options import OPTIONS
from planner.training.settings import LIBRARIES

if TYPE_CHECKING:
    from planner.importers import Job
    from planner.plan.rows import Block
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
    made = tables(lists, base, grid=grid, rows=source, shared=known())
    count = view.write(made, _with_progress(made), sys.stdout, lambda line: click.echo(line, err=True), table_width())
    return 0 if count else 1


def sources_of(given: dict[str, Any], lists: Mapping[str, list[Any]]) -> tuple[str | None, Job | ShowKeys | None]:
    """What the files of --from are: explicit rows (one CSV file at most), and the job of the training configs.

    Raises:
        PlannerError: configs that cannot be read, or two files of rows.
    """
    files, rows = rows_among(files_of(given))
    single = {key: lists[key][0] for key in LIBRARIES if len(lists.get(key, ())) == 1}
    return rows, take_job(files, Settings(single), given["show_keys"])


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
