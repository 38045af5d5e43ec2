"""`loraplan report`: one HTML file with tables and figures of some configurations; the figures as files too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli.compare import compared_of
from planner.cli.from_config import ShowKeys, config_options, show_keys
from planner.cli.options import Sectioned, calibration_option, training_options

if TYPE_CHECKING:
    from planner.report.figures import Picture


@click.command(cls=Sectioned)
@click.argument("configurations", nargs=-1)
@config_options
@click.option("--model", metavar="MODEL", help="The model of every configuration that names none.")
@click.option("--gpu", metavar="GPU", help="The card of every configuration that names none.")
@click.option("-o", "--output", metavar="FILE", default="report.html", show_default=True, help="The HTML file.")
@click.option("--figures", metavar="FOLDER", help="Write every figure as PNG and SVG too.")
@click.option("--title", default="LoRA fine-tuning plan", help="The heading.")
@calibration_option
@training_options
def report(configurations: tuple[str, ...], output: str, figures: str | None, title: str, **given: Any) -> int:
    """Write one HTML file that needs no network: tables, memory and time figures, assumptions, sources.

    CONFIGURATIONS are KEY=VALUE words or training configs as in compare; without one the options describe the run.

    \b
    Examples:
      loraplan report --model Qwen/Qwen2.5-7B --gpu a100-80gb -o ./plan.html
      loraplan report --model Qwen/Qwen2.5-7B --gpu l4 "method=qlora" "method=lora" -o ./plan.html
      loraplan report --from qlora.yml --gpu a10g -o ./plan.html

    \b
    Exit codes: 0 written, 2 could not answer.
    """
    from planner.base.errors import InvalidInput, require
    from planner.base.outputs import whole_file
    from planner.plan.compared import MOST
    from planner.report.figures import drawn
    from planner.report.html_report import page

    if len(configurations) > MOST:
        raise InvalidInput(f"{len(configurations)} configurations; a report takes at most {MOST}")
    items = compared_of(configurations or ("",), given)
    if isinstance(items, ShowKeys):
        return show_keys(items.job, "table")
    require("a report", "tables,plots", "numpy", "matplotlib")
    made = drawn(items)
    with whole_file(output) as file:
        file.write(page(items, made, title))
    click.echo(f"wrote {output}", err=True)
    if figures is not None:
        _write_figures(Path(figures), made)
    return 0


def _write_figures(folder: Path, made: list[Picture]) -> None:
    from planner.base.outputs import whole_file

    folder.mkdir(parents=True, exist_ok=True)
    for picture in made:
        for style in ("png", "svg"):
            with whole_file(folder / f"{picture.name}.{style}", "wb") as file:
                file.write(picture.data(style))
    click.echo(f"wrote {2 * len(made)} figures to {folder}", err=True)
