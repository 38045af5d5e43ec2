"""`loraplan models` and `loraplan gpus`: list, filter and show what the catalogue knows, with its sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import format_option

if TYPE_CHECKING:
    from planner.device.hardware import Gpu


class ListByDefault(click.Group):
    """A group whose `list` command may be left out: `models llama` is `models list llama`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `list` in front unless a command or help is asked for."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


_LONG = ("sources", "warnings", "layer_kinds")
"""Facts whose items stand on lines of their own."""


def _print_rows(style: str, what: str, headers: list[str], rows: list[list[Any]], keys: list[str]) -> int:
    """Print a list; JSON and CSV use the keys and full values, tables the headers."""
    from planner.report import tables

    if style == "json":
        items = [dict(zip(keys, row, strict=True)) for row in rows]
        click.echo(tables.json_text({"schema_version": 1, what: items}), nl=False)
    elif style == "table" and not rows:
        click.echo(f"no {what} match")
    else:
        click.echo(tables.table(style, keys if style == "csv" else headers, rows), nl=False)
    return 0


def _print_facts(style: str, what: str, facts: dict[str, Any]) -> int:
    """Print the facts about one thing, one a line."""
    from planner.base import units
    from planner.report import tables

    if style == "json":
        click.echo(tables.json_text({"schema_version": 1, what: facts}), nl=False)
        return 0
    rows = []
    for key, value in facts.items():
        values = value if isinstance(value, list) else [value]
        if style != "csv" and key not in _LONG:
            values = [", ".join(map(str, value))] if isinstance(value, list) else values
        rows += [(key if place == 0 or style == "csv" else "", item) for place, item in enumerate(values)]
    if style == "table":
        width = max(len(key) for key in facts) + 2
        lines = [tables.wrapped(f"{key:<{width}}{units.plain(item)}", 100, " " * width) for key, item in rows]
        click.echo("\n".join(lines))
    else:
        click.echo(tables.table(style, ("fact", "value"), rows), nl=False)
    return 0


# --- models -------------------------------------------------------------------------------------------------------


@click.group(cls=ListByDefault)
def models() -> None:
    """List the models of the catalogue, or show one with its sources.

    \b
    Examples:
      loraplan models
      loraplan models llama --format csv
      loraplan models show meta-llama/Llama-3.1-8B
      loraplan models show ./my-model
    """


@models.command("list")
@click.argument("words", metavar="[FILTER]", default="")
@click.option("--family", metavar="MODEL_TYPE", help="Only this model_type.")
@format_option
def list_models(words: str, family: str | None, style: str) -> int:
    """List models whose id or model_type contains FILTER.

    \b
    Example:
      loraplan models list qwen --format markdown
    """
    from planner.base.errors import unknown
    from planner.facts import catalog
    from planner.model.families import text_part

    rows: list[list[Any]] = []
    families = set()
    for model_id in catalog.model_ids():
        record = catalog.model_record(model_id)
        if record is None:
            continue
        kind = str(text_part(record.config)["model_type"])
        families.add(kind)
        if words.lower() in f"{model_id} {kind}".lower() and family in (None, kind):
            rows.append([model_id, kind, record.counted_parameters, record.confidence])
    if family is not None and family not in families:
        raise unknown("model_type", family, sorted(families))
    keys = ["id", "model_type", "parameters", "confidence"]
    return _print_rows(style, "models", keys, rows, keys)


@models.command("show")
@click.argument("model")
@format_option
def show_model(model: str, style: str) -> int:
    """Show what MODEL (an id, a folder, a config.json or a .gguf file) is made of and where that is from.

    \b
    Example:
      loraplan models show Qwen/Qwen2.5-7B --format json
    """
    from planner.plan.models import load_model, model_facts

    return _print_facts(style, "model", model_facts(load_model(model)))


# --- GPUs ---------------------------------------------------------------------------------------------------------


@click.group(cls=ListByDefault)
def gpus() -> None:
    """List the GPUs of the catalogue, or show one with its sources.

    \b
    Examples:
      loraplan gpus
      loraplan gpus ada --min-memory 40GiB
      loraplan gpus show a100-80gb
    """


@gpus.command("list")
@click.argument("words", metavar="[FILTER]", default="")
@click.option("--min-memory", metavar="SIZE", help="At least this much, for example 40GiB.")
@click.option("--vendor", metavar="NAME", help="NVIDIA, AMD or Intel.")
@format_option
def list_gpus(words: str, min_memory: str | None, vendor: str | None, style: str) -> int:
    """List GPUs whose id, name or architecture contains FILTER.

    \b
    Example:
      loraplan gpus list --min-memory 40GiB --vendor nvidia
    """
    from planner.base.errors import unknown
    from planner.base.units import parse_bytes
    from planner.facts import catalog

    least = parse_bytes(min_memory) if min_memory is not None else 0
    cards = catalog.gpus()
    vendors = sorted({card.vendor for card in cards})
    if vendor is not None and vendor.lower() not in {name.lower() for name in vendors}:
        raise unknown("vendor", vendor, vendors)
    chosen = [
        card
        for card in cards
        if words.lower() in f"{card.gpu_id} {card.name} {card.architecture}".lower()
        and card.memory_bytes >= least
        and (vendor or card.vendor).lower() == card.vendor.lower()
    ]
    if style == "json":
        from planner.report import tables

        click.echo(tables.json_text({"schema_version": 1, "gpus": [_gpu_facts(card) for card in chosen]}), nl=False)
        return 0
    full = style == "csv"
    rows: list[list[Any]] = [
        [
            card.gpu_id,
            card.name,
            card.architecture,
            card.memory_bytes if full else card.memory_bytes / 2**30,
            card.memory_basis,
            ".".join(map(str, card.compute_capability)) if card.compute_capability else None,
            round(card.bandwidth_bytes_per_s / 1e9) or None,
            round(card.bf16_flops_per_s / 1e12) or None,
        ]
        for card in chosen
    ]
    keys = ["id", "name", "architecture", "memory_bytes", "memory_basis", "compute_capability", "bandwidth_gb_per_s"]
    headers = ["id", "name", "architecture", "GiB", "basis", "CC", "GB/s", "bf16 TFLOPS"]
    return _print_rows(style, "gpus", headers, rows, [*keys, "bf16_tflops"])


@gpus.command("show")
@click.argument("gpu")
@format_option
def show_gpu(gpu: str, style: str) -> int:
    """Show one GPU (an id, an alias or a driver name, or local) and where its figures are from.

    \b
    Example:
      loraplan gpus show 4090
    """
    if gpu.partition(":")[0].lower() == "local":
        from planner.facts.local_gpu import local_gpu

        return _print_facts(style, "gpu", _gpu_facts(local_gpu(gpu.partition(":")[2])))
    from planner.facts import catalog

    return _print_facts(style, "gpu", _gpu_facts(catalog.gpu(gpu)))


def _gpu_facts(card: Gpu) -> dict[str, Any]:
    facts = {
        "id": card.gpu_id,
        "name": card.name,
        "vendor": card.vendor,
        "architecture": card.architecture,
        "memory_bytes": card.memory_bytes,
        "memory_gib": round(card.memory_bytes / 2**30, 2),
        "memory_basis": card.memory_basis,
        "used_by_others_bytes": card.used_by_others_bytes or None,
        "compute_capability": ".".join(map(str, card.compute_capability)) if card.compute_capability else None,
        "bandwidth_gb_per_s": card.bandwidth_bytes_per_s / 1e9 or None,
        "fp32_tflops": card.fp32_flops_per_s / 1e12 or None,
        "tf32_tflops": card.tf32_flops_per_s / 1e12 or None,
        "fp16_tflops": card.fp16_flops_per_s / 1e12 or None,
        "bf16_tflops": card.bf16_flops_per_s / 1e12 or None,
        "bf16_native": card.bf16_native,
        "sm_count": card.sm_count or None,
        "l2_mib": card.l2_bytes / 2**20 or None,
        "tdp_w": card.tdp_w or None,
        "sources": list(card.sources),
        "notes": card.notes or None,
    }
    return {key: value for key, value in facts.items() if value is not None}
