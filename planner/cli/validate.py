"""`loraplan validate`: predict every row of a table of measurements and print how far off the predictions are."""

from __future__ import annotations

import click

from planner.cli.options import Word, calibration_option, format_option


@click.command()
@click.argument("file", required=False)
@click.option("--source", "sources", multiple=True, metavar="NAME", help="Only rows of this source (repeatable).")
@click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Only rows with this value (repeatable).")
@click.option("--rows", is_flag=True, help="Print each compared figure too.")
@click.option(
    "--anchor", type=Word("anchor", ("none", "first")), default="none", show_default=True,
    help="Correct times by the first timed row of each card and framework (not scored then).",
)  # fmt: skip
@click.option("--include-c", is_flag=True, help="Score figures of confidence C too.")
@calibration_option
@format_option
def validate(
    file: str | None,
    sources: tuple[str, ...],
    where: tuple[str, ...],
    rows: bool,
    anchor: str,
    include_c: bool,
    calibration: str | None,
    style: str,
) -> int:
    """Compare predictions with the measurements of FILE (CSV), or with the published runs in the package.

    The columns and the sources of the shipped runs are described in data/README.md.

    Errors are signed percents of the nearer end of the published interval, negative when the prediction is too low.
    Source * is the mean over sources. A row that cannot be predicted is listed with its reason.

    \b
    Examples:
      loraplan validate --where gpu=t4
      loraplan validate measurements.csv
      loraplan validate measurements.csv --where gpu=t4 --where method=qlora --rows
      loraplan validate measurements.csv --source litgpt --format json

    \b
    Exit codes: 0 some rows were compared, 1 none could be, 2 could not answer.
    """
    from pathlib import Path

    from planner.base import data_files
    from planner.cli.terminal import progress
    from planner.facts import measurements
    from planner.plan import validation
    from planner.plan.published import PublishedRuns
    from planner.report import validation_report

    path = file if file is not None else data_files.data_path("measurements", "published.csv")
    table = measurements.select(measurements.read_measurements(Path(path)), sources, where)
    runs = PublishedRuns(calibration)
    report = validation.score(
        progress(table, "predicting"), runs.predict, include_loose=include_c,
        anchor=anchor == "first",
    )  # fmt: skip
    click.echo(validation_report.render(report, style, rows=rows), nl=False)
    return 0 if report.comparisons or any(report.verdicts.values()) else 1
