"""What the functions return: short to print, rich in a notebook, plain as a dict, flat as a frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.base.units import GiB
from planner.plan.rows import Caption
from planner.plan.verdict import CLOSE, FITS, NO
from planner.report import frames
from planner.report.tables import json_text

if TYPE_CHECKING:
    from planner.plan.answer import Answer as Answered
    from planner.plan.checks import Linted
    from planner.plan.compared import Compared
    from planner.plan.lint import Trap
    from planner.plan.predict import Prediction


def _plain(document: Any) -> Any:
    """A document as `--format json` prints it."""
    return json.loads(json_text(document))


class Answer:
    """Whether a run fits, where memory and time go, what it costs, what would fit."""

    def __init__(self, answered: Answered) -> None:
        self._answered = answered

    @property
    def prediction(self) -> Prediction:
        """Everything that was predicted, by component and moment."""
        return self._answered.prediction

    @property
    def verdict(self) -> str | None:
        """ "fits", "too close to call" or "does not fit"; None: no card was named."""
        return self.prediction.verdict

    @property
    def fits(self) -> bool | None:
        """True or False; None where it is too close to call, or no card was named."""
        return {FITS: True, NO: False, CLOSE: None, None: None}[self.prediction.verdict]

    @property
    def peak_gib(self) -> float:
        """GiB (2**30 bytes) on the device at the peak: live tensors, the allocator's cache and the CUDA context."""
        return self.prediction.device.expected / GiB

    @property
    def interval_gib(self) -> tuple[float, float]:
        """Low and high end of `peak_gib`: an interval that holds 90 %."""
        device = self.prediction.device
        return device.low / GiB, device.high / GiB

    @property
    def capacity_gib(self) -> float | None:
        """GiB that the card has for the run; None: no card was named."""
        return self.prediction.capacity_bytes / GiB if self.prediction.gpu is not None else None

    @property
    def step_s(self) -> float | None:
        """Seconds of an optimizer step; None: the card's rates are not known."""
        return float(self.prediction.time.step_s.expected) if self.prediction.time is not None else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second; None: the card's rates are not known."""
        return float(self.prediction.time.tokens_per_s) if self.prediction.time is not None else None

    @property
    def hours(self) -> float | None:
        """Hours of the whole run; None: no amount of training was said."""
        return float(self._answered.run.hours.expected) if self._answered.run is not None else None

    @property
    def usd(self) -> float | None:
        """Price of the whole run in USD; None: no amount of training was said, or no price is known."""
        run = self._answered.run
        return float(run.usd.expected) if run is not None and run.usd is not None else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What has to be known to read the figures."""
        return (*self.prediction.warnings, *self._answered.notes)

    @property
    def changes(self) -> tuple[str, ...]:
        """What would make the run fit, the nearest first."""
        return tuple(change.text for change in self._answered.changes)

    def __repr__(self) -> str:
        from planner.report.notebook import answer_line

        return f"<{answer_line(self._answered)}>"

    def __str__(self) -> str:
        """The report that the command prints."""
        from planner.report.fits_text import render

        return render(self._answered)

    def _repr_html_(self) -> str:
        from planner.report.notebook import answer_html

        return answer_html(self._answered)

    def to_dict(self) -> dict[str, Any]:
        """The document of `loraplan fits --format json`; bytes are whole numbers."""
        from planner.report import fits_data

        found: dict[str, Any] = _plain(fits_data.document(self._answered))
        return found

    def to_frame(self) -> Any:
        """One row, with the columns of `loraplan fits --format csv`, as a pandas.DataFrame.

        Raises:
            MissingDependency: there is no pandas.
        """
        from planner.report import fits_data

        row = fits_data.row(self._answered)
        return frames.frame(list(row), [list(row.values())])


class Table:
    """Columns and rows, with what has to be known to read them; bytes, seconds and USD as in the columns' names."""

    def __init__(
        self, title: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], caption: Caption, found: Any = None
    ) -> None:
        self._title, self._caption = title, caption
        self.columns = tuple(columns)
        self.rows = tuple(rows)
        self.found = found
        """What was found, as the planner holds it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The lines below the table."""
        return self._caption.lines

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<{self._title}: {len(self.rows):,} rows of {', '.join(self.columns)}>"

    def __str__(self) -> str:
        from planner.report.grid import whole

        return whole("table", self.columns, self.rows, self._caption)

    def _repr_html_(self) -> str:
        from planner.report.grid import shown
        from planner.report.pages import html_table

        return html_table(*shown(self.columns, self.rows), self._caption)

    def to_dict(self) -> dict[str, Any]:
        """The document of `--format json`."""
        from planner.report.grid import whole

        found: dict[str, Any] = json.loads(whole("json", self.columns, self.rows, self._caption))
        return found

    def to_frame(self) -> Any:
        """The rows as a pandas.DataFrame.

        Raises:
            MissingDependency: there is no pandas.
        """
        return frames.frame(self.columns, self.rows)


class Comparison:
    """Configurations side by side, the difference explained by component."""

    def __init__(self, items: Sequence[Compared]) -> None:
        self.items = tuple(items)
        """Each configuration with its prediction and settings."""

    @property
    def differences(self) -> tuple[str, ...]:
        """What each configuration needs more or less than the first, in sentences."""
        from planner.report.comparison import sentences

        return tuple(sentences(self.items))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Distinct warnings with the configurations that each concerns."""
        from planner.report.comparison import warnings

        return tuple(warnings(self.items))

    def __repr__(self) -> str:
        each = (f"{i.label} {i.prediction.device.expected / GiB:.2f} GiB {i.prediction.verdict}" for i in self.items)
        return f"<comparison: {'; '.join(each)}>"

    def __str__(self) -> str:
        from planner.report.comparison import render

        return render(self.items, "table")

    def _repr_html_(self) -> str:
        from planner.report.html_report import comparison_table

        return comparison_table(self.items)

    def to_dict(self) -> dict[str, Any]:
        """The document of `loraplan compare --format json`."""
        from planner.report.comparison import document

        found: dict[str, Any] = _plain(document(self.items))
        return found

    def to_frame(self) -> Any:
        """A row for every component, a column for every configuration, as a pandas.DataFrame.

        Raises:
            MissingDependency: there is no pandas.
        """
        from planner.report.comparison import rows

        columns = ("section", "name", *(item.label for item in self.items), "differs")
        return frames.frame(columns, rows(self.items))


class Lint:
    """The traps of configs: settings that cost memory or time, or fail, without anybody having meant them."""

    def __init__(self, found: Sequence[Linted]) -> None:
        self.found = tuple(found)
        """One entry per file."""

    @property
    def traps(self) -> tuple[Trap, ...]:
        """Every trap, the dearest of each file first."""
        return tuple(trap for item in self.found for trap in item.traps)

    @property
    def errors(self) -> tuple[str, ...]:
        """Why files have no answer."""
        return tuple(f"{item.file}: {item.error}" for item in self.found if item.error)

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(trap.name for trap in self.traps)) or "none"
        return f"<traps in {len(self.found)} configs: {names}>"

    def __str__(self) -> str:
        from planner.report.lint_view import render

        return render(self.found, "table")

    def _repr_html_(self) -> str:
        from planner.report.lint_view import COLUMNS, rows
        from planner.report.pages import html_table

        return html_table(COLUMNS, rows(self.found), Caption(self.errors, {}))

    def to_dict(self) -> dict[str, Any]:
        """The document of `loraplan lint --format json`."""
        from planner.report.lint_view import render

        found: dict[str, Any] = json.loads(render(self.found, "json"))
        return found

    def to_frame(self) -> Any:
        """A row for every trap, as a pandas.DataFrame.

        Raises:
            MissingDependency: there is no pandas.
        """
        from planner.report.lint_view import COLUMNS, rows

        return frames.frame(COLUMNS, rows(self.found))


class Report:
    """One HTML page that loads nothing and runs nothing."""

    def __init__(self, page: str, title: str) -> None:
        self.html, self.title = page, title

    def __repr__(self) -> str:
        return f"<report {self.title!r}: {len(self.html):,} characters of HTML>"

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str) -> None:
        """Write the page.

        Raises:
            OSError: it cannot be written there.
        """
        from planner.base.outputs import whole_file

        with whole_file(path) as file:
            file.write(self.html)
