"""The data options that planning commands share; `planner.cli.asking` reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from planner.cli.options import Word

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
