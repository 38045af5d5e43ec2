"""What was typed as a request: the one place where click's parameters become a `Request`, and what its calls share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from planner.plan.given import NAMES, Settings
from planner.plan.request import Cost, Data, Known, Request
from planner.plan.words import COST

if TYPE_CHECKING:
    from planner.runs.dataset.scan import Scan, Source

DATA = ("data_files", "template", "tokenizer", "padding")
"""Parameters that `data_options` adds."""


def request_of(given: Mapping[str, Any], **more: Any) -> Request:
    """The request that a command's parameters make; `more`: fields that the command names otherwise.

    Raises:
        PlannerError: a setting or data option that cannot be as it was said.
    """
    said: dict[str, Any] = {
        "model": given.get("model"),
        "settings": settings_of(given),
        "job": given.get("job"),
        "gpu": given.get("gpu"),
        "vram": given.get("vram"),
        "margin": given.get("margin", 0.0),
        "calibration": given.get("calibration"),
        "data": data_of(given),
        "cost": Cost(**{name: given[name] for name in COST}) if "dbu_rate" in given else Cost(),
    }
    return Request(**{**said, **more})


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The training settings among a command's parameters."""
    return Settings({name: given[name] for name in NAMES if name in given})


def data_of(given: Mapping[str, Any]) -> Data | None:
    """The data options among a command's parameters; None where no data was named.

    Raises:
        Contradiction: an option that needs --data.
    """
    if given.get("data_files"):
        return Data(tuple(given["data_files"]), *(given[name] for name in DATA[1:]))
    for name in DATA[1:]:
        if "data_files" in given and given[name] is not None:
            from planner.base.errors import Contradiction

            raise Contradiction(f"--{name} says how rows of --data are read; give --data too, or drop it")
    return None


def known() -> Known:
    """What the requests of one command share; data are read with a bar on a terminal, configs told on stderr."""
    return Known(read_data, tell=lambda line: click.echo(line, err=True))


def read_data(what: Source) -> Scan:
    """Scan training data, with a bar on a terminal."""
    from planner.cli.terminal import byte_progress
    from planner.plan.data import read

    return read(what, lambda nbytes: byte_progress(nbytes, "reading"))
