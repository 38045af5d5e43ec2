"""`loraplan validate`: predict every row of a table of measurements and print how far off the predictions are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import Word, calibration_option, format_option

if TYPE_CHECKING:
    from planner.plan.predict import Prediction
    from planner.plan.published_rows import RowLengths
    from planner.runs.dataset.orders import Orders
    from planner.training.spec import TrainingSpec


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
    from planner.report import validation_report

    path = file if file is not None else data_files.data_path("measurements", "published.csv")
    table = measurements.select(measurements.read_measurements(Path(path)), sources, where)
    glue = _Glue(calibration)
    report = validation.score(
        progress(table, "predicting"), glue.predict, include_loose=include_c,
        anchor=anchor == "first",
    )  # fmt: skip
    click.echo(validation_report.render(report, style, rows=rows), nl=False)
    return 0 if report.comparisons or any(report.verdicts.values()) else 1


def _orders(lengths: RowLengths | None, training: TrainingSpec) -> Orders | None:
    """Orders in which rows of a source's lengths may come, cut to the run's."""
    if lengths is None:
        return None
    from planner.runs.dataset.batches import Batching
    from planner.runs.dataset.orders import drawn, orders

    how = Batching(batch=training.micro_batch_size, limit=training.seq_len, padding="longest")
    rows = drawn(lengths.mean, lengths.deviation, lengths.shortest).clipped(how.limit)
    return orders(rows, how)


class _Glue:
    """What turns a row's options into a prediction; models and cards are read once."""

    def __init__(self, calibration: str | None = None) -> None:
        from planner.plan.request import Known

        self.calibration = calibration
        self.known = Known(offline=True)
        self.cards: dict[str, Any] = {}

    def predict(self, options: dict[str, Any], model_id: str, gpu_id: str | None) -> Prediction:
        """Predict one row.

        Raises:
            PlannerError: the row's model, card or settings are not known.
        """
        from planner.plan.request import Request, resolve

        given = dict(options)
        stack = given.pop("stack")
        lengths: RowLengths | None = given.pop("row_lengths", None)
        card = self._card(gpu_id) if gpu_id else None
        request = Request(model_id, given, stack, card, calibration=self.calibration, lenient=True)
        plan = resolve(request, self.known)
        return plan.predict(_orders(lengths, plan.training))

    def _card(self, gpu_id: str) -> Any:
        """Return the card; None when the catalogue lacks it (its rows are still scored for memory)."""
        from planner.base.errors import UnknownName
        from planner.facts import catalog

        if gpu_id not in self.cards:
            try:
                self.cards[gpu_id] = catalog.gpu(gpu_id)
            except UnknownName:
                self.cards[gpu_id] = None
        return self.cards[gpu_id]
