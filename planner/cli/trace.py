"""`loraplan trace`: one training step of the real libraries under fake tensors, without a GPU and without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli.from_config import model_or_config
from planner.cli.options import Sectioned, format_option, trace_options, training_options

if TYPE_CHECKING:  # the command's help needs none of these
    from planner.device.cuda_rules import Architecture
    from planner.device.hardware import Gpu
    from planner.facts.sources import LoadedConfig
    from planner.memory.walk import MemoryBreakdown
    from planner.model.spec import ModelSpec
    from planner.report.answer import Answer
    from planner.stacks import Resolved
    from planner.traced import Traced
    from planner.training import TrainingSpec


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
    model: str,
    gpu: str | None,
    layers: str,
    compare: bool,
    plot: Path | None,
    explain: bool,
    style: str,
    time_limit: float,
    use_cache: bool,
    **given: Any,
) -> int:
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
    from planner.cli.fits import card_of
    from planner.predict import architecture
    from planner.report.trace_view import TraceView
    from planner.request import training_settings

    if plot is not None:
        _check_plot(plot)
    stack = training_settings(given)
    card = card_of(gpu, None)
    loaded, spec, notes, resolved, training = _prepare(model, stack, given, card)
    arch = architecture(card, training)
    config, spec = _cut(loaded.config, spec, _layers(layers))
    program = _program(spec, training, arch) if compare else None
    traced = _run(config, loaded.model_id, training, arch, _layers(layers), time_limit, use_cache)
    notes = (*notes, *traced.notes, *_other_releases(given, traced))
    view = TraceView(traced, training, card, arch, loaded, resolved, stack, program, notes, explain)
    _print(view, style)
    if plot is not None:
        _write_plot(view, plot)
    return 0


def traced_answer(
    model: str, card: Gpu | None, stack: str | None, given: dict[str, Any], limit_s: float, cached: bool, kept: int
) -> Answer:
    """Answer `loraplan fits --via trace`: every layer is traced, because the allocator is replayed.

    Raises:
        PlannerError: no answer.
    """
    from planner.predict import architecture
    from planner.report.answer import Answer
    from planner.request import stack_origin
    from planner.traced import predict_traced

    loaded, spec, notes, resolved, training = _prepare(model, stack, given, card)
    arch = architecture(card, training)
    traced = _run(loaded.config, loaded.model_id, training, arch, "full", limit_s, cached, events=True)
    notes += _other_releases(given, traced)
    prediction = predict_traced(traced, training, card, model=spec, warnings=notes)
    return Answer(prediction, loaded, resolved, (), kept, stack_origin=stack_origin(given, stack))


def _prepare(
    model: str, stack: str | None, given: dict[str, Any], card: Gpu | None
) -> tuple[LoadedConfig, ModelSpec | None, tuple[str, ...], Resolved, TrainingSpec]:
    """Read the model's config, the family's structure if one is registered, and the settings."""
    from planner.base.errors import UnknownName
    from planner.facts import sources
    from planner.request import configure, notes_of, read_model

    loaded = sources.load_config(model)
    spec, notes = None, loaded.warnings
    try:
        known = read_model(loaded, derive=False)
    except UnknownName:  # not a family of the registry: transformers may know it
        pass
    else:
        spec, notes = known.spec, known.warnings
    resolved, training = configure(spec, stack or "custom", given, card=card)
    return loaded, spec, notes_of(given, notes, card), resolved, training


def _layers(text: str) -> str | int:
    from planner.base.errors import InvalidInput, one_line

    word = text.strip().lower()
    if word in ("auto", "full"):
        return word
    if word.isascii() and word.isdigit() and 0 < int(word) < 10_000:
        return int(word)
    raise InvalidInput(f"--layers is {one_line(text)!r}; write auto, full or a number of layers from 1")


def _cut(config: Any, spec: ModelSpec | None, layers: str | int) -> tuple[Any, ModelSpec | None]:
    """Cut the program's model to as many layers as the trace runs."""
    from planner.base.errors import InvalidInput

    if not isinstance(layers, int) or spec is None:
        return config, spec
    if layers > spec.num_layers:
        raise InvalidInput(f"--layers is {layers}; the model has {spec.num_layers}")
    return config, spec.first_layers(layers)


def _program(spec: ModelSpec | None, training: TrainingSpec, arch: Architecture) -> MemoryBreakdown:
    """What loraplan's own program says, with the rule of a dispatch mode: gradients are added out of place."""
    from planner.base.errors import UnknownName
    from planner.memory import walk
    from planner.step import program

    if spec is None:
        raise UnknownName("--compare: loraplan's program does not know this family; drop --compare")
    return walk.breakdown(program.run(spec, training, arch, full_depth=True, accumulates_in_place=False).record)


def _run(
    config: Any, model_id: str, training: TrainingSpec, arch: Architecture, layers: str | int, limit_s: float,
    cached: bool, events: bool = False,
) -> Traced:  # fmt: skip
    from planner import traced
    from planner.cli import tracing

    asked = traced.request(config, training, arch, layers, events=events)
    return traced.read(tracing.ask(asked, limit_s=limit_s, cached=cached), model_id)


def _other_releases(given: dict[str, Any], traced: Traced) -> tuple[str, ...]:
    """Say so where the releases asked for are not the installed ones, which are what is traced."""
    from planner.training import Versions

    asked, usual = given.get("versions") or Versions(), Versions()
    installed = {name: release.split("+")[0] for name, release in traced.versions}
    notes = []
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        release = ".".join(map(str, getattr(asked, name)))
        if getattr(asked, name) != getattr(usual, name) and not f"{installed.get(name)}.".startswith(f"{release}."):
            notes.append(f"the trace ran {name} {installed.get(name)}, which is installed, not {release}")
    return tuple(notes)


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
