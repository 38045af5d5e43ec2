"""A model as it is planned: its config read, what it is made of, and what to tell of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.base.errors import UnknownFamily, one_line
from planner.base.records import NamedTuple, replace
from planner.facts import sources
from planner.facts.sources import LoadedConfig
from planner.model import families
from planner.model.spec import ModelSpec


class LoadedModel(NamedTuple):
    """A model with where its facts come from, and what to tell the user about it."""

    spec: ModelSpec
    loaded: LoadedConfig
    warnings: tuple[str, ...]


def load_config(source: str | Mapping[str, Any], *, offline: bool = False) -> LoadedConfig:
    """Read the config of the model that `source` names, or take the config that it is.

    Raises:
        PlannerError: no such model, an unreadable file, or no config of a model.
    """
    return sources.load_config(source, offline=offline) if isinstance(source, str) else sources.given_config(source)


def load_model(source: str | Mapping[str, Any], *, offline: bool = False) -> LoadedModel:
    """Read the model that `source` names and build what it is made of.

    Raises:
        PlannerError: no such model, an unreadable file, or a family that is not known.
    """
    return read_model(load_config(source, offline=offline))


def read_model(loaded: LoadedConfig, *, derive: bool = True) -> LoadedModel:
    """Build what the model of a config is made of; `derive`: from its transformers class if no family describes it.

    Raises:
        PlannerError: a family that is not known, or an impossible value.
    """
    try:
        spec = families.build_spec(loaded.config, model_id=loaded.model_id)
    except UnknownFamily as error:
        if not derive:
            raise
        spec = _from_class(loaded, error)
    warnings = [*loaded.warnings, *spec.notes]
    if loaded.exact_parameters:
        spec = replace(spec, exact_parameters=loaded.exact_parameters)
        if spec.num_parameters != loaded.exact_parameters:
            warnings.append(
                f"the weight files hold {loaded.exact_parameters:,} parameters, the config implies "
                f"{spec.num_parameters:,}; the config's shapes are used"
            )
    if spec.stored_quantization:
        warnings.append(
            f"the published checkpoint is stored as {one_line(spec.stored_quantization, 20)}: "
            "planned as if loaded from 16-bit weights"
        )
    return LoadedModel(spec, loaded, tuple(dict.fromkeys(warnings)))


def _from_class(loaded: LoadedConfig, error: UnknownFamily) -> ModelSpec:
    """Read a model outside the registry from transformers' class; without transformers, the error stands."""
    try:
        from calibrate.model.meta_spec import spec_from_class
    except (ImportError, OSError):  # OSError: a torch whose libraries do not load
        raise error from None
    return spec_from_class(loaded.config, model_id=loaded.model_id)


def model_facts(found: LoadedModel) -> dict[str, Any]:
    """What is known of a model, by the names that `models show` prints."""
    from planner.model import lora
    from planner.step.modules.mixers import MIXERS

    spec, loaded = found.spec, found.loaded
    first = next(iter(spec.attentions()), None)
    defaults = lora.PEFT_DEFAULT_TARGETS.get(spec.model_type)
    kinds = [
        f"{count} x {MIXERS[layer.mixer.kind].label}"
        + (f", window {layer.attention.sliding_window}" if layer.attention and layer.attention.sliding_window else "")
        + (f", {layer.experts.num_experts} experts, {layer.experts.top_k} chosen" if layer.experts else "")
        for layer, count in spec.distinct_layers()
    ]
    facts: dict[str, Any] = {
        "id": spec.model_id,
        "model_type": spec.model_type,
        "parameters": spec.num_parameters,
        "parameters_in_files": spec.exact_parameters or None,
        "stored_dtype": spec.stored_dtype or None,
        "stored_quantization": spec.stored_quantization or None,
        "layers": spec.num_layers,
        "layer_kinds": kinds,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "attention_heads": first and first.num_heads,
        "key_value_heads": first and first.num_kv_heads,
        "head_dim": first and first.head_dim,
        "max_position_embeddings": spec.max_position_embeddings or None,
        "tied_head": spec.tied,
        "modules": lora.module_names(spec),
        "peft_default_targets": list(defaults) if defaults else None,
        "read_from": loaded.origin,
    }
    record = loaded.record
    if record is not None:
        facts |= {
            "source": record.source,
            "confidence": record.confidence,
            "counted": record.counted_how,
            "published_parameters": record.published_parameters,
            "published_source": record.published_source or None,
            "difference": record.difference or None,
            "note": record.note or None,
        }
    facts["warnings"] = list(found.warnings)
    return {key: value for key, value in facts.items() if value not in (None, [])}
