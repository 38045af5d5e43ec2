"""`loraplan lora`: what a LoRA or QLoRA configuration is, and the course's labs for any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.from_config import model_or_config
from planner.cli.options import Sectioned, Word, format_option, training_options
from planner.cli.terminal import echo_notes

if TYPE_CHECKING:
    from planner.model.spec import ModelSpec
    from planner.training.spec import TrainingSpec


@click.command(cls=Sectioned)
@model_or_config()
@click.option("--lab", type=Word("lab", ("5.1", "5.2", "5.3")), help="Answer a lab of the course, as JSON.")
@click.option("--data", "data_file", metavar="FILE", help="The lab's data (5.1, 5.3).")
@click.option("--with", "rival", type=Word("other planner", ("entrenar",)), help="Its answer beside ours, and why.")
@click.option("--gpu", metavar="GPU", help="The card, for --with.")
@click.option("--vram", metavar="SIZE", help="Memory of a card of your own, for --with.")
@format_option
@training_options
def lora(
    model: str, lab: str | None, data_file: str | None, rival: str | None, gpu: str | None, vram: str | None,
    style: str, **given: Any,
) -> int:  # fmt: skip
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
    from planner.cli.rival import entrenar
    from planner.course import labs
    from planner.model import adapter
    from planner.plan.answering import card_of
    from planner.plan.request import Request, resolve
    from planner.report.lora_report import LoraAnswer, render

    if lab == "5.1":
        click.echo(_lab_5_1(data_file), nl=False)
        return 0
    if data_file and lab is None:
        raise Contradiction("--data belongs to --lab 5.1 or 5.3; for a run on data use loraplan fits --data")
    card = card_of(gpu, vram)
    if (rival is None) != (card is None):
        raise Contradiction("--with needs a card (--gpu or --vram), and a card is only used by --with")
    plan = resolve(Request(model, given, card=card, calibration="none"))  # only memory is printed
    spec, training = plan.spec, plan.training
    if training.lora is None:
        raise Contradiction("method full has no adapter; choose --method lora or qlora")
    facts = adapter.facts(spec, training)
    if lab is not None:
        if lab == "5.2":
            answer = {**labs.lab_5_2(spec, training, facts), "warnings": list(plan.warnings)}
        else:  # a config file of the course, with the keys that it has
            answer = _lab_5_3(spec, training, model, data_file)
            echo_notes(plan.warnings, err=True)
        click.echo(_json(answer), nl=False)
        return 0
    beside = entrenar(spec, training, card) if card else None
    compared = labs.compare(spec, training, facts)
    click.echo(render(LoraAnswer(spec.model_id, training, facts, compared, beside, plan.warnings), style), nl=False)
    if style == "csv":
        echo_notes(plan.warnings, err=True)
    return 0


def _json(value: Any) -> str:
    from planner.report.tables import json_text

    return json_text(value)


def _lab_5_1(data_file: str | None) -> str:
    """The learner's DatasetPreparer on a file: rows, first text, split, lengths."""
    from planner.base.errors import Contradiction
    from planner.cli.data import source
    from planner.course import labs
    from planner.plan.data import read
    from planner.report.data_report import DataAnswer, statistics

    if data_file is None:
        raise Contradiction("lab 5.1 prepares a data set: give it with --data FILE")
    found = read(source((data_file,), "auto", None, None))
    answer = {
        **labs.lab_5_1(len(found.lengths)),
        "template": found.template.name,
        "first": found.example,
        "tokens": {"counted": found.token_label, **statistics(DataAnswer(found, 512, 4))},
        "left_out": found.num_problems,
    }
    return _json(answer)


def _lab_5_3(spec: ModelSpec, training: TrainingSpec, model: str, data_file: str | None) -> dict[str, Any]:
    from planner.course import labs

    job = labs.Job(model_name=model, dataset_path=data_file or "train.jsonl")
    return labs.lab_5_3(spec, training, job)
