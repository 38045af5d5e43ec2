"""A job read from configs against what the user typed and what the model has: the options that remain, with origins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from planner.base.errors import Contradiction, InvalidInput, one_line
from planner.base.records import NamedTuple
from planner.model import lora
from planner.model.spec import ModelSpec
from planner.training import settings, stacks

if TYPE_CHECKING:
    from planner.importers import Job

_METHOD_KEYS = frozenset({"method", "quantization", *settings.keys_of("quantization")})
_FUSED_QKV = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "W_pack")
_QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_FUSED_PARTS = {
    "gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj", "fc1", "dense_h_to_4h", "c_fc"),
    "down_proj": ("fc2", "dense_4h_to_h", "c_proj"), "o_proj": ("dense", "out_proj", "c_proj"),
}  # fmt: skip
"""Module names of frameworks that split what transformers fuses or names otherwise (torchtune, litgpt)."""

MAX_PATTERN = 500
MAX_REPEATS = 3
"""Unbounded repetitions in a pattern of target modules: more could take forever to match."""


class Settled(NamedTuple):
    """Options of a job after the user's own: stated ones, framework defaults, and every origin."""

    stated: dict[str, Any]
    unasked: dict[str, Any]
    origins: dict[str, str]


NOTHING = Settled({}, {}, {})


def settle(job: Job | None, user: Mapping[str, object], stack: str, model: ModelSpec | None) -> Settled:
    """Return what the job still decides beside the options that the user typed.

    Raises:
        PlannerError: target modules that cannot be translated.
    """
    if job is None:
        return NOTHING
    dropped = _overruled(user)
    stated = {key: v.value for key, v in job.given.items() if key not in dropped}
    unasked = {key: v.value for key, v in job.defaults.items() if key not in dropped and stack == job.stack}
    origins = {key: v.origin for key, v in job.values.items()}
    if model is not None:
        stated, origins = _with_targets(stated, origins, model, stack)
        unasked, origins = _with_targets(unasked, origins, model, stack)
    return Settled(stated, unasked, origins)


def _overruled(user: Mapping[str, object]) -> set[str]:
    """Return the keys that what the user typed makes void."""
    dropped = set(user)
    if "method" in user or "quantization" in user:
        dropped |= _METHOD_KEYS
        if user.get("method") == "qlora" and "quantization" not in user:
            dropped -= _METHOD_KEYS - {"method"}
    if user.get("method") == "dora":
        dropped.add("use_dora")
    return dropped


def without_idle(settled: Settled, resolved: settings.Resolved) -> Settled:
    """Drop what the run has no use for: a file may state a rank and train without an adapter."""
    return Settled(
        {key: value for key, value in settled.stated.items() if resolved.applies(key)},
        {key: value for key, value in settled.unasked.items() if resolved.applies(key)},
        settled.origins,
    )


# --- target modules -----------------------------------------------------------------------------------------------


def _with_targets(
    values: Mapping[str, Any], origins: Mapping[str, str], model: ModelSpec, stack: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and origins with target modules by names that the model has, as PEFT or the framework would match them."""
    values, origins = dict(values), dict(origins)
    targets = values.get("target_modules")
    if not targets:
        return values, origins
    from planner.importers.values import is_pattern  # a run without --from reads no importer

    found: list[str] = []
    for target in targets:
        found += matching(model, target) if is_pattern(target) else [target]
    known = set(_suffixes(model))
    present = [name for name in found if name in lora.KEYWORDS or name in known]
    absent = [name for name in found if name not in present]
    if absent and stacks.STACKS[stack].splits_fused:
        fused, slices = _fused(absent, known)
        present += fused  # a name without a counterpart stays: the model's own check names it
        if slices:
            values["target_slices"] = slices
            origins["target_slices"] = origins["target_modules"]
    elif absent and present:
        note = one_line(", ".join(absent), 80)
        origins["target_modules"] += f" (not in this model, and PEFT passes over them: {note})"
    if present:
        values["target_modules"] = tuple(dict.fromkeys(present))
    return values, origins


def _suffixes(model: ModelSpec) -> Iterator[str]:
    """Yield every name under which PEFT finds a module: its path and each tail of it."""
    for path in lora.module_names(model):
        parts = path.split(".")
        for start in range(len(parts)):
            yield ".".join(parts[start:])
    for layer, _ in model.distinct_layers():
        for linear in layer.linears:
            yield linear.name
            yield linear.name.rpartition(".")[2]


def _fused(absent: Iterable[str], known: set[str]) -> tuple[list[str], tuple[int, ...]]:
    """Return the model's own modules for names that another framework splits, and the parts of a fused projection."""
    names: list[str] = []
    slices: set[int] = set()
    for name in absent:
        if name in _QKV:
            fused = next((candidate for candidate in _FUSED_QKV if candidate in known), None)
            slices |= {_QKV[name]} if fused else set()
        else:
            fused = next((candidate for candidate in _FUSED_PARTS.get(name, ()) if candidate in known), None)
        names.append(fused or name)
    return names, tuple(sorted(slices)) if len(slices) < len(_QKV) else ()


def matching(model: ModelSpec, pattern: str) -> list[str]:
    """Return the modules of a layer that a regular expression of PEFT's target_modules matches in full.

    Raises:
        InvalidInput: a pattern that could take forever, or matches nothing here.
        Contradiction: one that adapts only some of the layers.
    """
    repeats = len(re.findall(r"[*+]|\{\d*,\}", pattern))
    nested = re.search(r"[)\]][*+?{][^()]*\)[*+{]|[*+]\)[*+{]", pattern)
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or nested:
        raise InvalidInput(f"target_modules {one_line(pattern, 60)!r} is too wild a pattern; name modules (--targets)")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise InvalidInput(f"target_modules {one_line(pattern, 60)!r} is no regular expression; correct it") from None
    last = model.num_layers - 1
    found = [_matched(model, compiled, number) for number in dict.fromkeys((0, last // 2, last))]
    if not all(names == found[0] for names in found):
        raise Contradiction(f"target_modules {one_line(pattern, 60)!r} adapts some layers only, which is not planned")
    if not found[0]:
        raise InvalidInput(
            f"target_modules {one_line(pattern, 60)!r} matches no module of {one_line(model.model_id)}; "
            "name modules (--targets)"
        )
    return found[0]


def _matched(model: ModelSpec, pattern: re.Pattern[str], number: int) -> list[str]:
    names = {linear.name for layer, _ in model.distinct_layers() for linear in layer.linears}
    roots = ("model.layers", "model.language_model.layers", "language_model.model.layers", "transformer.h")
    return sorted(n for n in names if any(pattern.fullmatch(f"{root}.{number}.{n}") for root in roots))
