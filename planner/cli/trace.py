"""`loraplan trace`: one training step of the real libraries under fake tensors, without a GPU and without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from planner.cli.asking import known, request_of
from planner.cli.from_config import model_or_config
from planner.cli.options import Sectioned, format_option, trace_options, training_options


@click.command(cls=Sectioned)
@model_or_config()
@click.option("--gpu", metavar="GPU", help="The card whose kernels are imitated (loraplan gpus); default an A100's.")
@click.option(
    "--layers",
    metavar="auto|full|N",
    default="auto",
    show_default=True,
    help="Trace a few layers and extrapolate, trace every layer, or cut the model to N layers.",
)
@click.option("--compare", is_flag=True, help="Put the ledger of loraplan's own program beside the trace's.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the timeline as .png or .svg.")
@click.option("--explain", is_flag=True, help="The CUDA rules that were applied, each with its source; all settings.")
@format_option
@trace_options
@training_options
def trace(
    layers: str, compare: bool, plot: Path | None, explain: bool, style: str, time_limit: float, use_cache: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Run one training step of the installed libraries under fake tensors and show where its memory goes.

    transformers, bitsandbytes, PEFT and the optimizer run as they are; only the tensors have no data, and CUDA's own
    kernels are imitated by named rules (--explain). Needs pip install 'loraplan[trace]', no GPU and no weights.

    \b
    Examples:
      loraplan trace openai-community/gpt2 --gpu rtx-4090 --compare
      loraplan trace ./my-model --gpu rtx-4090 --method qlora --compare
      loraplan trace ./my-model --layers full --plot step.svg

    \b
    Exit codes: 0 traced, 2 could not answer.
    """
    from planner.plan.request import Tracing, resolve
    from planner.plan.traced_answer import traced_step
    from planner.report.trace_view import view_of

    if plot is not None:
        _check_plot(plot)
    plan = resolve(request_of(given, tracing=Tracing(time_limit, use_cache)), known())
    view = view_of(plan, traced_step(plan, layers, compare=compare), explain=explain)
    _print(view, style)
    if plot is not None:
        _write_plot(view, plot)
    return 0


# --- output --------------------------------------------------------------------------------------------------------


def _print(view: Any, style: str) -> None:
    if style == "table":
        from planner.report.trace_text import render

        click.echo(render(view), nl=False)
        return
    from planner.report import trace_data

    click.echo(trace_data.render(view, style), nl=False)


def _check_plot(path: Path) -> None:
    """Refuse a picture that cannot be made before the trace is run."""
    import importlib.util

    from planner.base.errors import InvalidInput, MissingDependency, one_line

    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidInput(f"--plot {one_line(str(path))!r}: write a name that ends in .png or .svg")
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"--plot {one_line(str(path))!r}: there is no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("--plot needs matplotlib; install it with pip install 'loraplan[plots]'")


def _write_plot(view: Any, path: Path) -> None:
    from planner.base.outputs import whole_file
    from planner.report.trace_plot import draw

    with whole_file(path, "wb") as file:
        file.write(draw(view, path.suffix.lower().removeprefix(".")))
