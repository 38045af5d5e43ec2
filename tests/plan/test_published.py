"""Errors against published runs, pinned in both directions: the oracle that no formula of this package wrote.

`tests/facts/accuracy.csv` holds what `loraplan validate --format csv` printed when the figures were last reviewed. A
change of 0.02 points in any of them fails here: `make readme` writes the file anew, and its diff is to be explained.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from planner.base import data_files
from planner.facts import measurements
from planner.plan import validation
from planner.plan.published import PublishedRuns
from planner.report import validation_report

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = Path(data_files.data_path("measurements", "published.csv"))
PINNED = ROOT / "tests" / "facts" / "accuracy.csv"
TOLERANCE = 0.02
"""Points of a per cent."""
FIGURES = ("mean_abs_pct", "median_abs_pct", "worst_under_pct", "worst_over_pct")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> validation.Report:
    """Every published row, predicted with the shipped calibrations only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLAN_DATA", str(tmp_path_factory.mktemp("data")))
        return validation.score(measurements.read_measurements(ROWS), PublishedRuns().predict)


def pinned() -> dict[tuple[str, str], dict[str, str]]:
    with PINNED.open(encoding="utf-8", newline="") as file:
        return {(row["source"].lstrip("'"), row["quantity"]): row for row in csv.DictReader(file)}


def test_the_rows_are_published_ones_with_sources() -> None:
    rows = measurements.read_measurements(ROWS)
    described = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert len(rows) == 406
    assert not [source for source in {row["source"] for row in rows} if f"**{source}**" not in described]
    for row in rows:
        for column, allowed in measurements.ENUMERATIONS.items():
            assert row[column] in ("", *allowed), (row["id"], column)


@pytest.mark.slow
def test_errors_by_source_and_quantity_are_what_they_were(report: validation.Report) -> None:
    then, now = pinned(), {(group["source"], group["quantity"]): group for group in report.groups()}
    assert set(now) == set(then)
    moved = [
        f"{' '.join(key)}: {name} was {float(then[key][name]):.3f}, is {group[name]:.3f}"
        for key, group in now.items()
        for name in FIGURES
        if abs(group[name] - float(then[key][name])) > TOLERANCE
    ]
    moved += [
        f"{' '.join(key)}: {name} was {then[key][name]}, is {group[name]}"
        for key, group in now.items()
        for name in ("n", "coverage")
        if abs(group[name] - float(then[key][name])) > 1e-4
    ]
    assert not moved, "run make readme and explain:\n" + "\n".join(moved)


@pytest.mark.slow
def test_the_page_about_accuracy_is_what_validate_prints(report: validation.Report) -> None:
    where = importlib.util.spec_from_file_location("ci_readme", ROOT / ".ci" / "readme.py")
    assert where is not None
    assert where.loader is not None
    readme: Any = importlib.util.module_from_spec(where)
    where.loader.exec_module(readme)
    page = readme.accuracy_page(validation_report.render(report, "markdown", rows=False))
    assert readme.ACCURACY.read_text(encoding="utf-8") == page, "run: make readme"


@pytest.mark.slow
def test_the_verdict_that_is_printed_is_scored(report: validation.Report) -> None:
    assert report.judged() == {"right": 257, "wrong": 1, "undecided": 5}
    assert (report.verdicts["oom_wrong"], report.verdicts["ok_wrong"]) == (1, 0)
