"""What a user said, what config files say and what the framework does unasked, put together: every setting settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from planner.base.errors import Contradiction, UnknownName, one_line
from planner.base.records import replace
from planner.device.hardware import Gpu
from planner.model import lora
from planner.model.spec import ModelSpec
from planner.plan.notes import lacks_bf16
from planner.plan.settled import NOTHING, Settled, settle, without_idle
from planner.training import stacks
from planner.training.options import flag_of
from planner.training.settings import LIBRARIES, SETTINGS, Resolved, Setting
from planner.training.spec import LoraSpec, TrainingSpec

if TYPE_CHECKING:  # a run without a config reads none
    from planner.importers import Job


def infer_method(given: Mapping[str, object]) -> str:
    """Return the method given, else the one that the quantization implies; qlora by default."""
    if given.get("method"):
        return str(given["method"])
    return "lora" if given.get("quantization") == "none" else "qlora"


def configure(
    model: ModelSpec | None,
    stack: str,
    user: Mapping[str, object],
    job: Job | None = None,
    *,
    lenient: bool = False,
    card: Gpu | None = None,
) -> tuple[Resolved, TrainingSpec]:
    """Resolve what the user said with the config files' and the framework's defaults, for this model.

    `user` has keys of `planner.training.stacks`, as `Settings.options` gives them; what the files of `job` say yields
    to it.

    `lenient` accepts settings that the run has no use for: tables fill columns that do not apply. On a `card` without
    bf16 the defaults become fp16. Of a model that no family describes (None) module names are not checked here.

    Raises:
        PlannerError: unknown values, settings that exclude each other or that the model does not have.
    """
    settled = settle(job, user, stack, model)
    resolved = _resolved(stack, settled, user)
    if not lenient:
        _refuse_idle(resolved, user)
    if settled is not NOTHING:
        settled = without_idle(settled, resolved)
        resolved = _resolved(stack, settled, user)
    hard = {**settled.stated, **user}
    if model is not None and resolved["method"] != "full" and "target_modules" not in hard:
        resolved = _with_known_targets(model, resolved, {**settled.unasked, **hard})
    if card is not None and lacks_bf16(card):
        resolved = _in_fp16(resolved, hard, card)
    training = stacks.to_training_spec(resolved)
    if model is None:
        return resolved, training
    if training.lora is not None:
        lora.saved_module_parameters(model, training.lora)  # refuses a module that the model does not have
    if user.get("skip_modules"):
        _check_skipped(model, training.quantization.skip_modules)
    return resolved, training


def _resolved(stack: str, settled: Settled, user: Mapping[str, object]) -> Resolved:
    """Resolve the options of user, files and frameworks, and say where each came from."""
    merged = {**settled.unasked, **settled.stated, **user}
    method = infer_method(merged)
    resolved = stacks.resolve(stack, method=method, given=merged)
    settings = dict(resolved.settings)
    for key, origin in settled.origins.items():
        if key not in user and key in merged:
            settings[key] = settings[key]._replace(origin=origin)
    if "method" not in merged:
        implied = "--quantization none" if merged.get("quantization") == "none" else ""
        settings["method"] = Setting(method, f"implied by {implied}" if implied else "loraplan default")
    return replace(resolved, settings=settings)


def with_stated_releases(resolved: Resolved, stated: Sequence[str]) -> Resolved:
    """Say which releases the user gave, and that the others are of the same time (planner.training.releases)."""
    if not 0 < len(stated) < len(LIBRARIES):
        return resolved
    origin = f"given: {', '.join(stated)}; the others as they were then"
    found = Setting(resolved["versions"], origin)
    return replace(resolved, settings={**resolved.settings, "versions": found})


_DTYPE_KEYS = ("base_dtype", "autocast", "compute_dtype", "adapter_dtype")


def _in_fp16(resolved: Resolved, given: Mapping[str, object], card: Gpu) -> Resolved:
    """Replace bf16 defaults by fp16; what the user gave stays (and is warned about)."""
    settings = dict(resolved.settings)
    for key in _DTYPE_KEYS:
        if given.get(key) is None and settings[key].value == "bf16":
            settings[key] = Setting("fp16", f"{one_line(card.name, 40)} has no bf16 ({settings[key].origin} says bf16)")
    return replace(resolved, settings=settings)


def _refuse_idle(resolved: Resolved, given: Mapping[str, object]) -> None:
    """Refuse a given setting that the run has no use for: its user expects something else to be planned."""
    for key, value in given.items():
        why = None if value is None or value is False else SETTINGS[key].why_idle(resolved)
        if why is not None:
            raise Contradiction(f"{flag_of(key)} has no effect: {why}")


def _with_known_targets(model: ModelSpec, resolved: Resolved, given: Mapping[str, object]) -> Resolved:
    """Replace a framework's default targets that this model does not have; the origin says so."""
    spec = stacks.to_training_spec(resolved).lora
    if spec is None or _has_targets(model, spec):
        return resolved
    missing = ", ".join(spec.target_modules)
    peft = lora.PEFT_DEFAULT_TARGETS.get(model.model_type)
    for targets, name in ((peft, f"PEFT's default for {model.model_type}"), ((lora.ALL_LINEAR,), "loraplan default")):
        if targets is None or not _has_targets(model, replace(spec, target_modules=targets, target_slices=())):
            continue
        found = stacks.resolve(resolved.stack, method=resolved["method"], given={**given, "target_modules": targets})
        origin = f"{name}: {model.model_type} has no {missing} ({resolved.settings['target_modules'].origin})"
        changed = {"target_modules": Setting(targets, origin), "target_slices": found.settings["target_slices"]}
        return replace(resolved, settings={**resolved.settings, **changed})
    return resolved


def _has_targets(model: ModelSpec, spec: LoraSpec) -> bool:
    try:
        lora.resolve_targets(model, spec)
    except UnknownName:
        return False
    return True


def _check_skipped(model: ModelSpec, skipped: tuple[str, ...]) -> None:
    """Refuse a module to skip that no module of the model is."""
    known = {linear.name for layer, _ in model.distinct_layers() for linear in layer.linears}
    known |= {linear.name for linear in (*model.embedding_projections, model.head)}
    for name in skipped:
        if name != "lm_head" and not any(path == name or path.endswith(f".{name}") for path in known):
            raise UnknownName(
                f"--skip-modules {one_line(name)!r} is no module of {one_line(model.model_id)}; "
                f"its modules are {', '.join(lora.module_names(model))}"
            )
