"""The data options that planning commands share: `data_options` adds them, `take` takes them out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.cli.options import Word

if TYPE_CHECKING:
    from planner.plan.request import Data, Known

DATA = ("data_files", "template", "tokenizer", "padding")
"""Parameters that `data_options` adds."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def data_options(command: _Command) -> _Command:
    """Add `--data FILE` (repeatable) and how its rows become tokens and batches."""
    for decorator in reversed((
        click.option("--data", "data_files", multiple=True, metavar="FILE",
                     help="Training data: its lengths decide memory, time and cost (repeatable)."),
        click.option("--template", metavar="NAME", default=None, help="How rows become text (loraplan data --help)."),
        click.option("--tokenizer", metavar="PATH", default=None, help="Local tokenizer; else lengths are estimated."),
        click.option("--padding", type=Word("padding", ("max", "longest", "grouped", "packed")), default=None,
                     help="How rows meet in a batch (default longest): max, longest, grouped or packed."),
    )):  # fmt: skip
        command = decorator(command)
    return command


def take(given: dict[str, Any]) -> Data | None:
    """Take the data options out of what a command was given; None where no data was named.

    Raises:
        Contradiction: an option that needs --data.
    """
    wanted = {name: given.pop(name) for name in DATA}
    if wanted["data_files"]:
        from planner.plan.request import Data

        return Data(tuple(wanted.pop("data_files")), **wanted)
    for name in DATA[1:]:
        if wanted[name] is not None:
            from planner.base.errors import Contradiction

            raise Contradiction(f"--{name} says how rows of --data are read; give --data too, or drop it")
    return None


def known() -> Known:
    """What the requests of one command share; data are read with a progress bar on a terminal."""
    from planner.plan.data import read
    from planner.plan.request import Known

    return Known(read)
