"""`loraplan data`: what is in training files, how long its rows are, and what batching makes of them."""

from __future__ import annotations

import sys

import click

from planner.cli.asking import read_data
from planner.cli.options import Word, format_option
from planner.cli.terminal import echo_notes


@click.command()
@click.argument("paths", metavar="FILE...", nargs=-1, required=True)
@click.option("--template", default="auto", show_default=True, help="alpaca-seed, alpaca-stanford, chatml, ...")
@click.option("--tokenizer", metavar="PATH", help="A local tokenizer's folder or tokenizer.json; else an estimate.")
@click.option("--model", metavar="MODEL", help="Estimate for this model's vocabulary, when there is no tokenizer.")
@click.option(
    "--seq-len", "limit", type=click.IntRange(1, 2**27), default=2048, show_default=True, help="Rows are cut here."
)
@click.option("--batch", type=click.IntRange(1, 2**20), default=8, show_default=True, help="Rows per micro batch.")
@click.option("--split", metavar="SHARE", type=float, help="Share of the rows to train on, for example 0.9.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of the split.")
@click.option("--in-order", is_flag=True, help="Split in the order of the files instead of drawing.")
@click.option("--write", "folder", metavar="FOLDER", help="Write train.jsonl and validation.jsonl there.")
@click.option(
    "--as", "shape", type=Word("shape", ("same", "text", "messages", "prompt", "alpaca")), default="same",
    show_default=True, help="Shape of the written rows.",
)  # fmt: skip
@click.option("--show", is_flag=True, help="Print the first row as the template renders it, and nothing else.")
@click.option("--plot", metavar="FILE", help="Draw the length histogram (.png, .svg or .pdf).")
@format_option
def data(
    paths: tuple[str, ...], template: str, tokenizer: str | None, model: str | None, limit: int, batch: int,
    split: float | None, seed: int, in_order: bool, folder: str | None, shape: str, show: bool, plot: str | None,
    style: str,
) -> int:  # fmt: skip
    """Read training data, say how long its rows are in tokens and how much padding costs.

    FILE is JSON lines, a JSON array, CSV or parquet; rows in Alpaca, OpenAI messages, ShareGPT, prompt and response,
    or plain text. A broken line is named and left out. Nothing is executed or fetched.

    \b
    Examples:
      loraplan data ./train.jsonl
      loraplan data ./train.jsonl --tokenizer ./my-model --seq-len 1024 --batch 4
      loraplan data ./train.jsonl --split 0.9 --write ./split --as messages --format json

    \b
    Exit codes: 0 every row is usable, 1 some rows were left out, 2 could not answer.
    """
    from planner.base.errors import InvalidInput
    from planner.plan.data import model_notes, source
    from planner.report.data_report import DataAnswer, render
    from planner.runs.dataset import scan as scanning

    if split is not None and not 0 < split <= 1:
        raise InvalidInput(f"--split is {split}; write the share of rows to train on, above 0 and at most 1")
    if folder and split is None:
        split = 1.0
    found = read_data(source(paths, template, tokenizer, model))
    if show:
        click.echo(_for_terminal(found.example) if sys.stdout.isatty() else found.example, nl=False)
        return 1 if found.num_problems else 0
    answer = DataAnswer(found, limit, batch, warnings=model_notes(model))
    if split is not None:
        plan = scanning.Split(split, None if in_order else seed)
        rows = plan.train_rows(len(found.lengths))
        answer = answer._replace(split=(rows, len(found.lengths) - rows), seed=plan.seed)
        if folder:
            written = scanning.write(found, plan, folder, shape)  # type: ignore[arg-type]
            answer = answer._replace(written=written, folder=folder)
    if plot:
        from planner.report import data_plots

        data_plots.lengths(found, limit, plot)
    click.echo(render(answer, style), nl=False)
    if style == "csv":
        echo_notes(answer.warnings, err=True)
    return 1 if found.num_problems else 0


def _for_terminal(text: str) -> str:
    """The text with what would drive a terminal escaped; a pipe gets it byte for byte."""
    from planner.base.errors import one_line

    return "\n".join(one_line(line, len(line) * 10) for line in text.split("\n"))
