"""What a terminal gets and a pipe does not: colour and a progress line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import click


def wants_colour() -> bool:
    """Return whether stdout takes colour: a terminal, no NO_COLOR, no dumb terminal."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and sys.stdout.isatty()


def table_width() -> int:
    """Columns that a table on stdout may take: COLUMNS, else the terminal's, else 100 where there is none."""
    import shutil  # loads compression libraries

    return shutil.get_terminal_size((100, 24)).columns


def echo_coloured(text: str, word: str, colour: str) -> None:
    """Print text whose first word is coloured where colour is wanted."""
    if colour and wants_colour():
        text = click.style(word, fg=colour, bold=True) + text[len(word) :]
        click.echo(text, nl=False, color=True)
    else:
        click.echo(text, nl=False, color=False)


def echo_notes(notes: Iterable[str], *, err: bool = False) -> None:
    """Print what a plan's user must see, a paragraph each; `err`: beside a format that has no place for notes."""
    from planner.base.errors import one_line
    from planner.report.tables import wrapped

    for note in notes:
        text = f"warning: {one_line(note, 1000)}"
        click.echo(text if err else wrapped(text, indent="  "), err=err)


def tell_unanswered(errors: Iterable[str]) -> None:
    """Say on stderr how many of the files had no answer: the reasons stand in the output."""
    files = list(errors)
    failed = sum(map(bool, files))
    if failed:
        click.echo(f"error: {failed} of {len(files)} files could not be answered; the output says why", err=True)


def is_live() -> bool:
    """Return whether stderr is a terminal that a line can be rewritten on."""
    return sys.stderr.isatty() and not os.environ.get("CI")


def progress(items: Iterable[Any], label: str) -> Iterator[Any]:
    """Yield the items, with a bar on stderr when that is a terminal."""
    if not is_live():
        yield from items
        return
    length = len(items) if isinstance(items, Sized) else None
    with click.progressbar(items, length=length, label=label, file=sys.stderr) as bar:
        yield from bar


@contextmanager
def byte_progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes done since its last call; a bar on stderr when that is a terminal."""
    if not sys.stderr.isatty() or os.environ.get("CI"):
        yield lambda _: None
        return
    waiting = 0
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:

        def advance(nbytes: int) -> None:
            nonlocal waiting
            waiting += nbytes
            if waiting > 2**20:  # drawing every line would take longer than reading it
                bar.update(waiting)
                waiting = 0

        yield advance
        bar.update(waiting)
