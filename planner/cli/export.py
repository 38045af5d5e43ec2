"""`loraplan export`: the planned run as files that another program launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.asking import known, request_of
from planner.cli.data_options import data_options
from planner.cli.from_config import model_or_config
from planner.cli.options import MOST_STEPS, Number, Sectioned, Word, training_options

if TYPE_CHECKING:
    from planner.exporters.recipe import Export

TARGETS = (
    "peft", "trl", "axolotl", "llama-factory", "entrenar", "databricks-air", "databricks-cluster", "databricks-fm",
)  # fmt: skip


@click.command(cls=Sectioned)
@click.argument("target", type=Word("target", TARGETS))
@model_or_config()
@click.option(
    "--lr", "learning_rate", type=Number(0, min_open=True), default=2e-4, show_default=True, help="Peak learning rate."
)
@click.option(
    "--schedule", type=Word("schedule", ("cosine", "linear", "constant")), default="cosine", show_default=True,
    help="How the learning rate falls.",
)  # fmt: skip
@click.option("--warmup-steps", type=click.IntRange(0, MOST_STEPS), default=0, help="Steps of linear warm-up.")
@click.option("--weight-decay", type=Number(0), default=0.0, help="Weight decay.")
@click.option(
    "--epochs", type=Number(0, MOST_STEPS, min_open=True), default=3.0, show_default=True, help="Passes over the data."
)
@click.option("--max-steps", type=click.IntRange(0, MOST_STEPS), default=0, help="Stop after N optimizer steps.")
@click.option(
    "--save-steps", type=click.IntRange(0, MOST_STEPS), default=500, show_default=True, help="Checkpoint every N steps."
)
@click.option("--seed", type=int, default=42, show_default=True, help="Seed of the run.")
@click.option("--output-dir", default="output", show_default=True, help="Where the run writes.")
@click.option("--gpu", metavar="GPU", help="The card the plan is for.")
@click.option("--vram", metavar="SIZE", help="Memory of a card of your own.")
@click.option("--accelerator", metavar="TYPE", help="databricks-air: GPU_1xA10, GPU_1xH100, ...; else the smallest.")
@click.option("--num-accelerators", type=click.IntRange(1), help="databricks-air: accelerators, in whole nodes.")
@click.option(
    "--margin",
    type=Number(0, 100, max_open=True),
    default=5.0,
    show_default=True,
    help="databricks-air: percent to keep free.",
)
@click.option("--cloud", type=Word("cloud", ("aws", "azure")), default="aws", help="databricks-cluster: aws or azure.")
@click.option("--node-type", metavar="TYPE", help="databricks-cluster: the node; else the cheapest that fits.")
@click.option("--name", default="loraplan", show_default=True, help="Databricks: experiment or cluster name.")
@click.option("--register-to", metavar="NAME", help="databricks-fm: catalog.schema[.model].")
@click.option("--data-prep-cluster-id", metavar="ID", help="databricks-fm: cluster that reads a Delta table.")
@click.option("--duration", metavar="TEXT", help="databricks-fm: for example 3ep.")
@click.option(
    "--check-call", metavar="FILE", is_eager=True, expose_value=False, callback=lambda *a: _check_call(*a),
    help="databricks-fm: check the arguments in this JSON file, and stop.",
)  # fmt: skip
@click.option("--part", metavar="NAME", help="Print this file of the export instead of the first.")
@click.option("--write", "folder", metavar="FOLDER", help="Write all files of the export there.")
@data_options
@training_options
def export(target: str, part: str | None, folder: str | None, **given: Any) -> int:
    """Write a planned run as a recipe that TARGET launches; what the target cannot say is told on stderr.

    TARGET is peft, trl, axolotl, llama-factory, entrenar, databricks-air, databricks-cluster or databricks-fm.

    \b
    Examples:
      loraplan export peft Qwen/Qwen2.5-7B --gpu l4 --rank 16
      loraplan export axolotl meta-llama/Llama-3.1-8B --data ./train.jsonl --padding packed --write ./job
      loraplan export databricks-air meta-llama/Llama-3.1-8B --method lora
      loraplan export peft --from axolotl.yml

    \b
    Exit codes: 0 written, 1 written but it does not fit or would be refused, 2 could not answer.
    """
    from planner.exporters.exporting import Organised, Place, exported
    from planner.report.answer import run_words

    how = Organised(**{name: given[name] for name in Organised._fields})
    place = Place(**{name: given[name] for name in Place._fields})
    made = exported(target, request_of(given, margin=0.0), how, place, run_words, known())
    _tell(made)
    if folder:
        _write(made, folder)
    else:
        click.echo(_part(made, part), nl=False)
    return 1 if made.errors else 0


def _part(made: Export, name: str | None) -> str:
    from planner.base.errors import unknown

    texts = {artifact.name: artifact.text for artifact in made.artifacts}
    if name is None:
        return made.artifacts[0].text
    if name not in texts:
        raise unknown("part", name, texts)
    return texts[name]


def _write(made: Export, folder: str) -> None:
    import os

    from planner.base.outputs import whole_file

    os.makedirs(folder, exist_ok=True)
    for artifact in made.artifacts:
        path = os.path.join(folder, artifact.name)
        with whole_file(path, newline="\n") as file:
            file.write(artifact.text)
        click.echo(path)


def _check_call(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Check a call that is already written, and stop: it needs no model and no plan."""
    if path is None or context.resilient_parsing:
        return
    from planner.exporters import databricks_fm

    made = databricks_fm.export(_read_call(path))
    _tell(made)
    click.echo(made.artifacts[0].text, nl=False)
    context.exit(1 if made.errors else 0)


def _tell(made: Export) -> None:
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    for error in made.errors:
        click.echo(f"problem: {error}", err=True)


def _read_call(path: str) -> dict[str, Any]:
    """The arguments of a create() call in a JSON file.

    Raises:
        InvalidInput: no JSON object.
    """
    from planner.base.bounded import parse_json, read_bounded

    return parse_json(read_bounded(path, 2**20, "call"), path, "call of foundation_model.create")
