"""The card of a request: from a name, a size in memory, or a card at hand, with what must stay free of it."""

from __future__ import annotations

from collections.abc import Sequence

from planner.device.hardware import Gpu


def card_of(gpu: str | Gpu | None, vram: str | None = None) -> Gpu | None:
    """Return the card that was named, if one was.

    Args:
        gpu: an id or name of the catalogue, "local" or "local:N" for this machine's, "cpu", or a card.
        vram: memory of a card of the user's own, for example "24GiB".

    Raises:
        PlannerError: unknown names, sizes that are none, or both at once.
    """
    if gpu is not None and vram is not None:
        from planner.base.errors import Contradiction

        raise Contradiction("--gpu and --vram name two cards at once; give one of them")
    if vram is not None:
        from planner.base.units import gib, parse_bytes

        size = parse_bytes(vram)
        return Gpu(gpu_id="custom", name=f"a card with {gib(size)} GiB", memory_bytes=size, memory_basis="user")
    if gpu is None or isinstance(gpu, Gpu):
        return gpu
    if gpu.partition(":")[0].lower() == "local":
        from planner.facts.local_gpu import local_gpu

        return local_gpu(gpu.partition(":")[2])
    if gpu.lower() == "cpu":
        from planner.device import processor

        return processor.as_gpu(processor.facts())
    from planner.facts import catalog

    return catalog.gpu(gpu)


def with_margin(card: Gpu | None, percent: float) -> tuple[Gpu | None, int]:
    """The card with a share of its memory taken, and that share in bytes."""
    if card is None or not percent:
        return card, 0
    from planner.base.records import replace

    kept = int(card.memory_bytes * percent / 100)
    return replace(card, used_by_others_bytes=card.used_by_others_bytes + kept), kept


def percent_of(share: str | float) -> float:
    """Return a share given in percent: 10, "10" or "10%".

    Raises:
        InvalidInput: not a number from 0 to below 100.
    """
    try:
        value = float(share.strip().removesuffix("%") if isinstance(share, str) else share)
    except (ValueError, TypeError):
        value = -1.0
    if not 0 <= value < 100:
        from planner.base.errors import InvalidInput, one_line

        text = f"--margin is {one_line(share)!r}"
        raise InvalidInput(f"{text}; write a percentage from 0 to below 100, for example 10")
    return value


def cards_of(names: Sequence[str]) -> tuple[Gpu, ...]:
    """Return the cards of the catalogue that were named; "all" is every NVIDIA card.

    Raises:
        PlannerError: an unknown card, or none.
    """
    from planner.base.errors import InvalidInput
    from planner.facts import catalog

    if not names:
        raise InvalidInput("no GPU; name cards with --gpu rtx-4090,a100-80gb, or --gpu all")
    found: list[Gpu] = []
    for name in names:
        found += [g for g in catalog.gpus() if g.vendor == "NVIDIA"] if name == "all" else [catalog.gpu(name)]
    return tuple({card.gpu_id: card for card in found}.values())


def card_with(size: str) -> Gpu:
    """A card of the user's own with this much memory, under a name of its own."""
    from planner.base.records import replace
    from planner.base.units import gib

    card = card_of(None, size)
    assert card is not None
    return replace(card, gpu_id=f"{gib(card.memory_bytes)} GiB")
