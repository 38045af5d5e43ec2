"""Training data of a plan: read, measured, applied."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.runs.dataset.scan import Scan, Source


def read(what: Source) -> Scan:
    """Scan the files, with a progress bar on a terminal."""
    import os

    from planner.cli.terminal import byte_progress
    from planner.runs.dataset.files import kind
    from planner.runs.dataset.scan import scan

    for path in what.paths:
        kind(path)  # refuses what cannot be read before the bar appears
    with byte_progress(sum(os.path.getsize(path) for path in what.paths), "reading") as advance:
        return scan(what, advance)
