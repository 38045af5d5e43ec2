"""Options that commands share: the output format, and every training setting as a flag."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.training import kinds
from planner.training.options import OPTIONS, Option
from planner.training.settings import LIBRARIES

FORMATS = ("table", "json", "csv", "markdown")

_Command = TypeVar("_Command", bound=Callable[..., Any])


if TYPE_CHECKING:  # before click 8.2 Choice takes no type
    _Choice = click.Choice[str]
else:
    _Choice = click.Choice


class Word(_Choice):
    """One of a few words, with the names other tools give them; an unknown one names close matches."""

    def __init__(self, what: str, words: tuple[str, ...], aliases: Mapping[str, str] | None = None) -> None:
        super().__init__(words)
        self.what, self.choice = what, kinds.Choice(words=words, aliases=aliases or {})

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the known word.

        Raises:
            UnknownName: naming the value and what is allowed.
        """
        return self.choice.word(self.what, value)


class Number(click.FloatRange):
    """A finite number within bounds; click lets nan pass every bound, and inf every open one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail naming the value and the bounds."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


MOST_STEPS = 2**40
"""Above every number of optimizer steps, and exact as a float."""


def format_option_of(formats: tuple[str, ...]) -> Callable[[_Command], _Command]:
    """Return the decorator that adds `--format` with these words (parameter `style`)."""
    return click.option(
        "--format", "style", type=Word("format", formats), default="table", show_default=True, help="How to print."
    )


def format_option(command: _Command) -> _Command:
    """Add `--format` to a command (parameter `style`)."""
    return format_option_of(FORMATS)(command)


def calibration_option(command: _Command) -> _Command:
    """Add `--calibration` (parameter `calibration`)."""
    return click.option(
        "--calibration", metavar="FILE|none",
        help="Coefficients of the times: a calibration (file or id), or none; by default the newest of the card.",
    )(command)  # fmt: skip


def cost_options(command: _Command) -> _Command:
    """Add what a whole run is: how much is trained, and what an hour costs."""
    for flag, kind, metavar, text in reversed((
        ("--tokens", str, "N", "Train on this many tokens, for example 10M: hours and USD."),
        ("--rows", int, "N", "Train on this many rows."),
        ("--epochs", float, "N", "Passes over the rows (default 1)."),
        ("--mean-tokens", float, "N", "Useful tokens per row, where rows are padded to the length."),
        ("--price", float, "USD", "USD per hour; otherwise the cheapest machine of the instance table."),
        ("--dbu-table", str, "FILE", "Databricks units per hour of each node type (JSON), added to machine prices."),
        ("--dbu-rate", float, "USD", "USD per Databricks unit."),
    )):  # fmt: skip
        command = click.option(flag, type=kind, metavar=metavar, default=None, help=text)(command)
    return command


def trace_options(command: _Command) -> _Command:
    """Add the options of commands that may run a trace (parameters `time_limit` and `use_cache`)."""
    limit = click.option(
        "--time-limit", type=click.FloatRange(1, 86400), default=600.0, show_default=True, metavar="SECONDS",
        help="Give up a trace after this long.",
    )  # fmt: skip
    cache = click.option(
        "--cache/--no-cache", "use_cache", default=True, help="Reuse a trace of the same run and library releases."
    )
    return limit(cache(command))


def click_type(option: Option) -> Any:
    """What click is to make of an option's text; None: it is a yes/no option."""
    if isinstance(option.kind, kinds.Choice):
        return Word(option.words, option.kind.words, option.kind.aliases)
    if isinstance(option.kind, kinds.YesNo):
        return None
    return int if isinstance(option.kind, kinds.Whole) else float if isinstance(option.kind, kinds.Number) else str


def training_options(command: _Command) -> _Command:
    """Add every training setting to a command; a parameter is None where the user did not give it."""
    for option in reversed(OPTIONS.values()):
        kind = click_type(option)
        extra: dict[str, Any] = {} if kind is None else {"type": kind}
        if option.key in LIBRARIES:
            extra["metavar"] = "VERSION"
        command = click.option(*option.flags, option.key, default=None, help=option.help, **extra)(command)
    return command


def help_option(command: click.Command, ctx: click.Context) -> click.Option:
    """`-h`, as click makes it but for the translation of its help: gettext reads the locale's files to find none."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    return click.Option(
        command.get_help_option_names(ctx), is_flag=True, is_eager=True, expose_value=False, callback=show,
        help="Show this message and exit.",
    )  # fmt: skip


class Sectioned(click.Command):
    """A command whose help lists its options in the sections of `OPTIONS`, the rest first."""

    _own_help: click.Option | None = None

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option that prints the help, the same one every time."""
        if self._own_help is None:
            self._own_help = help_option(self, ctx)
        return self._own_help

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section."""
        place = {option.key: option.section for option in OPTIONS.values()}
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], **{title: [] for title in place.values()}}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections[place.get(param.name or "", "Options")].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
