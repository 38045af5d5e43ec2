"""loraplan: does a LoRA or QLoRA fine-tuning run fit on this GPU, how fast is it, what does it cost, what to change.

>>> import loraplan
>>> answer = loraplan.fits("meta-llama/Llama-3.1-8B", "rtx-4090", r=16, per_device_train_batch_size=2)
>>> answer.verdict
'fits'

Functions: `fits`, `table`, `largest`, `pick`, `compare`, `lint`, `report`. Errors are `LoraPlanError`s, each with one
line that says what was wrong, what is allowed and what to do. Nothing is loaded before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplan.api import compare as compare
    from loraplan.api import fits as fits
    from loraplan.api import largest as largest
    from loraplan.api import lint as lint
    from loraplan.api import pick as pick
    from loraplan.api import report as report
    from loraplan.api import table as table
    from loraplan.results import Answer as Answer
    from loraplan.results import Comparison as Comparison
    from loraplan.results import Lint as Lint
    from loraplan.results import Report as Report
    from loraplan.results import Table as Table
    from planner import __version__ as __version__
    from planner.base.errors import Contradiction as Contradiction
    from planner.base.errors import InvalidInput as InvalidInput
    from planner.base.errors import MissingDependency as MissingDependency
    from planner.base.errors import NotPlanned as NotPlanned
    from planner.base.errors import PlannerError as LoraPlanError
    from planner.base.errors import UnknownName as UnknownName

_HOMES = {
    **dict.fromkeys(("fits", "table", "largest", "pick", "compare", "lint", "report"), ("loraplan.api", "")),
    **dict.fromkeys(("Answer", "Table", "Comparison", "Lint", "Report"), ("loraplan.results", "")),
    **dict.fromkeys(
        ("Contradiction", "InvalidInput", "MissingDependency", "NotPlanned", "UnknownName"), ("planner.base.errors", "")
    ),
    "LoraPlanError": ("planner.base.errors", "PlannerError"),
    "__version__": ("planner", ""),
}
"""Name -> the module that holds it, and its name there where that is another."""

__all__ = [
    "Answer", "Comparison", "Contradiction", "InvalidInput", "Lint", "LoraPlanError", "MissingDependency", "NotPlanned",
    "Report", "Table", "UnknownName", "__version__", "compare", "fits", "largest", "lint", "pick", "report", "table",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a name when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraplan' has no attribute {name!r}")
    from importlib import import_module

    module, other = _HOMES[name]
    found = getattr(import_module(module), other or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
