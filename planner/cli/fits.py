"""`loraplan fits`: does one fine-tuning run fit on one card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import LIBRARIES, Sectioned, format_option, training_options

if TYPE_CHECKING:  # the command's help needs none of these
    from planner.hardware import Gpu
    from planner.report.answer import Answer
    from planner.search import Change

_COLOURS = {"YES": "green", "NO": "red", "MAYBE": "yellow"}


@click.command(cls=Sectioned)
@click.argument("model")
@click.option("--gpu", metavar="GPU", help="A card of the catalogue (loraplan gpus), or local for this machine's.")
@click.option("--vram", metavar="SIZE", help="Memory of a card of your own, for example 24GiB.")
@click.option("--margin", metavar="PERCENT", default="0", help="Share of the card that must stay free.")
@click.option("--explain", is_flag=True, help="Every setting with its origin, model facts, sources, uncertainty.")
@click.option("--changes/--no-changes", default=True, help="Search for what would fit if it does not.")
@format_option
@training_options
def fits(
    model: str, gpu: str | None, vram: str | None, margin: str, explain: bool, changes: bool, style: str, **given: Any
) -> int:
    """Say whether a fine-tuning run fits on a GPU, where its memory goes and what to change if not.

    MODEL is an id of the catalogue (loraplan models), a model folder, a config.json, a .gguf file, or a hub id in the
    local Hugging Face cache.

    \b
    Examples:
      loraplan fits meta-llama/Llama-3.1-8B --gpu rtx-4090 --method qlora
      loraplan fits Qwen/Qwen2.5-7B --vram 16GiB -r 16 --seq-len 4096 --explain
      loraplan fits ./my-model --gpu a100-80gb --stack trl --format json

    \b
    Exit codes: 0 it fits (or no card was named), 1 it does not fit or is too
    close to call, 2 could not answer.
    """
    answer = _answer(model, _card(gpu, vram), _percent(margin), given, changes)._replace(explain=explain)
    _print(answer, style)
    return 0 if answer.prediction.verdict in ("fits", None) else 1


def _answer(model: str, card: Gpu | None, margin: float, given: dict[str, Any], search: bool) -> Answer:
    from planner.cli.plan import configure, load_model, parse_slices, with_stated_releases
    from planner.predict import predict
    from planner.report.answer import Answer
    from planner.stacks import parse_versions

    releases = {name: given.pop(name) for name in LIBRARIES}
    if any(releases.values()):
        given["versions"] = parse_versions({name: text for name, text in releases.items() if text})
    given["target_slices"] = parse_slices(given["target_slices"])
    if given["skip_modules"] == "none":
        given["skip_modules"] = ()
    stack = given.pop("stack")
    loaded = load_model(model)
    resolved, training = configure(loaded.spec, stack or "custom", given, card=card)
    resolved = with_stated_releases(resolved, [name for name in LIBRARIES if releases[name]])
    kept = 0
    if card is not None and margin:
        from dataclasses import replace

        kept = int(card.memory_bytes * margin / 100)
        card = replace(card, used_by_others_bytes=card.used_by_others_bytes + kept)
    notes = loaded.warnings + ((card.notes,) if card and card.notes.startswith("'") else ())
    prediction = predict(loaded.spec, training, card, warnings=notes)
    found: tuple[Change, ...] = ()
    if search and prediction.verdict not in ("fits", None):
        from planner import catalog
        from planner.search import nearest_changes

        found = nearest_changes(prediction, catalog.gpus())
    origin = "given" if stack else "loraplan default"
    return Answer(prediction, loaded.loaded, resolved, found, kept, stack_origin=origin)


def _card(gpu: str | None, vram: str | None) -> Gpu | None:
    """Return the card that was named, if one was.

    Raises:
        PlannerError: unknown names, sizes that are none, or both at once.
    """
    if gpu is not None and vram is not None:
        from planner.errors import Contradiction

        raise Contradiction("--gpu and --vram name two cards at once; give one of them")
    if vram is not None:
        from planner.hardware import Gpu
        from planner.units import gib, parse_bytes

        size = parse_bytes(vram)
        return Gpu(gpu_id="custom", name=f"a card with {gib(size)} GiB", memory_bytes=size, memory_basis="user")
    if gpu is None:
        return None
    if gpu.partition(":")[0].lower() == "local":
        from planner.cli.local_gpu import local_gpu

        return local_gpu(gpu.partition(":")[2])
    from planner import catalog

    return catalog.gpu(gpu)


def _percent(text: str) -> float:
    from planner.errors import InvalidInput, one_line

    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise InvalidInput(f"--margin is {one_line(text)!r}; write a percentage from 0 to below 100, for example 10")
    return value


def _print(answer: Answer, style: str) -> None:
    if style == "table":
        from planner.cli.terminal import echo_coloured
        from planner.report.fits_text import render

        text = render(answer)
        word = text.split(maxsplit=1)[0]
        echo_coloured(text, word, _COLOURS.get(word, ""))
        return
    from planner.report import fits_data

    click.echo(fits_data.render(answer, style), nl=False)
