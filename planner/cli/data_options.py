"""The data options that planning commands share: `data_options` adds them, `apply` lets the data set the lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.cli.options import Word

if TYPE_CHECKING:
    from planner.datarun import DataRun
    from planner.dataset.scan import Scan, Source
    from planner.model import ModelSpec

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


def take(given: dict[str, Any]) -> dict[str, Any]:
    """Take the data options out of what a command was given.

    Raises:
        Contradiction: an option that needs --data.
    """
    wanted = {name: given.pop(name) for name in DATA}
    if not wanted["data_files"]:
        for name in DATA[1:]:
            if wanted[name] is not None:
                from planner.errors import Contradiction

                raise Contradiction(f"--{name} says how rows of --data are read; give --data too, or drop it")
    return wanted


def apply(
    wanted: dict[str, Any], model: ModelSpec, stack: str, given: dict[str, Any], scans: dict[Source, Scan] | None = None
) -> DataRun | None:
    """Read the data and set `seq_len` (and the padding mask) in `given` to what its longest batch needs.

    `given` holds keys of `planner.stacks`; its seq_len, or the stack's own, is where rows are cut. Returns None when
    no data was named. `scans` keeps what was read, for callers that ask several times.

    Raises:
        PlannerError: data that cannot be read, or a setting that is none.
    """
    if not wanted["data_files"]:
        return None
    from planner.cli.data import read
    from planner.cli.plan import configure
    from planner.datarun import needs_mask, on_data
    from planner.dataset.scan import Source
    from planner.dataset.templates import NAMES
    from planner.dataset.tokens import family_of
    from planner.errors import unknown

    template = wanted["template"] or "auto"
    if template not in NAMES:
        raise unknown("template", template, NAMES)
    _, training = configure(model, stack, given, lenient=True)
    what = Source(
        paths=tuple(wanted["data_files"]), template=template, tokenizer=wanted["tokenizer"],
        family=family_of(model.model_type, model.vocab_size),
    )  # fmt: skip
    known = scans if scans is not None else {}
    if what not in known:
        known[what] = read(what)
    run = on_data(known[what], training.micro_batch_size, training.seq_len, wanted["padding"] or "longest")
    given["seq_len"] = run.longest
    if given.get("padded") is None and needs_mask(run):
        given["padded"] = True
    return run
