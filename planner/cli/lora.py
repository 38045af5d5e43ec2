"""`loraplan lora`: what a LoRA or QLoRA configuration is, and the course's labs for any model."""

from __future__ import annotations

from typing import Any

import click

from planner.cli.asking import read_data, request_of
from planner.cli.from_config import model_or_config
from planner.cli.options import Sectioned, Word, format_option, training_options
from planner.cli.terminal import echo_notes


@click.command(cls=Sectioned)
@model_or_config()
@click.option("--lab", type=Word("lab", ("5.1", "5.2", "5.3")), help="Answer a lab of the course, as JSON.")
@click.option("--data", "data_file", metavar="FILE", help="The lab's data (5.1, 5.3).")
@click.option("--with", "rival", type=Word("other planner", ("entrenar",)), help="Its answer beside ours, and why.")
@click.option("--gpu", metavar="GPU", help="The card, for --with.")
@click.option("--vram", metavar="SIZE", help="Memory of a card of your own, for --with.")
@format_option
@training_options
def lora(lab: str | None, data_file: str | None, rival: str | None, style: str, **given: Any) -> int:
    """Show what a LoRA or QLoRA configuration trains and stores, exactly, beside what other formulas say.

    \b
    Examples:
      loraplan lora meta-llama/Llama-3.1-8B --rank 16 --targets q_proj,v_proj
      loraplan lora meta-llama/Llama-2-7b-hf --double-quant --with entrenar --vram 24GB
      loraplan lora Qwen/Qwen2.5-7B --lab 5.2

    \b
    Exit codes: 0 an answer, 2 could not answer.
    """
    from planner.base.errors import Contradiction
    from planner.course import beside
    from planner.plan.request import resolve
    from planner.report.lora_report import render
    from planner.report.tables import json_text

    if lab == "5.1":
        click.echo(_lab_5_1(data_file), nl=False)
        return 0
    if data_file and lab is None:
        raise Contradiction("--data belongs to --lab 5.1 or 5.3; for a run on data use loraplan fits --data")
    if (rival is None) != (given["gpu"] is None and given["vram"] is None):
        raise Contradiction("--with needs a card (--gpu or --vram), and a card is only used by --with")
    plan = resolve(request_of(given, calibration="none"))  # only memory is printed
    if lab is not None:
        click.echo(json_text(beside.lab_5_2(plan) if lab == "5.2" else beside.lab_5_3(plan, data_file)), nl=False)
    else:
        click.echo(render(beside.lora_answer(plan), style), nl=False)
    if lab == "5.3" or (lab is None and style == "csv"):
        echo_notes(plan.warnings, err=True)
    return 0


def _lab_5_1(data_file: str | None) -> str:
    """The learner's DatasetPreparer on a file: rows, first text, split, lengths."""
    from planner.base.errors import Contradiction
    from planner.plan.data import source
    from planner.report.data_report import lab_5_1

    if data_file is None:
        raise Contradiction("lab 5.1 prepares a data set: give it with --data FILE")
    return lab_5_1(read_data(source((data_file,), "auto", None, None)))
