"""From config.json to ModelSpec: the registry of families by model_type."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from planner.base.config_values import mapping, text
from planner.base.errors import UnknownFamily, UnknownName, one_line
from planner.base.records import replace
from planner.model.spec import ModelSpec

_MODULES: dict[str, str] = {
    "apertus": "ungated",
    "arcee": "ungated",
    "baichuan": "remote",
    "bloom": "classic",
    "chatglm": "glm",
    "codegen": "gpt",
    "cohere": "cohere",
    "cohere2": "cohere",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "ernie4_5": "llama_like",
    "exaone4": "post_norm",
    "falcon": "classic",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "glm": "glm",
    "glm4": "glm",
    "glm4_moe": "moe",
    "gpt2": "gpt",
    "gpt_bigcode": "gpt",
    "gpt_neo": "gpt",
    "gpt_neox": "gpt",
    "gpt_oss": "moe",
    "gptj": "gpt",
    "granite": "llama_like",
    "granitemoe": "moe",
    "helium": "llama_like",
    "internlm2": "remote",
    "llama": "llama_like",
    "llama4_text": "moe",
    "mimo": "remote",
    "ministral3": "llama_like",
    "mistral": "llama_like",
    "mixtral": "moe",
    "mpt": "classic",
    "nemotron": "ungated",
    "olmo": "post_norm",
    "olmo2": "post_norm",
    "olmo3": "post_norm",
    "olmoe": "moe",
    "opt": "classic",
    "phi": "phi",
    "phi3": "phi",
    "phimoe": "moe",
    "qwen": "remote",
    "qwen2": "llama_like",
    "qwen2_moe": "moe",
    "qwen3": "llama_like",
    "qwen3_moe": "moe",
    "seed_oss": "llama_like",
    "smollm3": "llama_like",
    "stablelm": "classic",
    "starcoder2": "ungated",
}
"""model_type -> module of this package; the family's function there has the model_type's name."""

_ENCODER_DECODERS = ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "m2m_100", "longt5", "led", "marian")

_SAME_AS = {
    "gemma3": "gemma3_text",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""model_type -> the family its language model is built like."""

_SHARED_KEYS = ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings")

_TEXT_ONLY = "only the language model is planned: the vision or audio tower's weights and activations come on top"


def known_families() -> list[str]:
    """Return every model_type that `build_spec` understands, sorted."""
    return sorted({*_MODULES, *_SAME_AS})


def text_part(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the language model's config: the nested text_config of a multimodal one, with the outer facts it lacks."""
    nested = mapping(config, "text_config", default={})
    if not nested:
        return config
    # the stored dtype and quantization are written once, outside; the text part may leave its own type out
    outer = {key: config[key] for key in _SHARED_KEYS if key in config}
    return {**outer, "model_type": f"{text(config, 'model_type')}_text", **nested}


def build_spec(config: Mapping[str, object], *, model_id: str) -> ModelSpec:
    """Return what the model of this config.json is made of.

    Raises:
        UnknownName: a model_type that no family here covers.
        InvalidInput: a key that is missing or holds an impossible value.
    """
    part = text_part(config)
    model_type = text(part, "model_type")
    if model_type in _ENCODER_DECODERS or part.get("is_encoder_decoder") is True:
        raise UnknownName(
            f"model_type {one_line(model_type)!r} is an encoder-decoder model, which is not planned yet; "
            "only decoder-only language models are; choose one of them"
        )
    name = _SAME_AS.get(model_type, model_type)
    if name not in _MODULES:
        raise _unknown_family(model_type)
    family = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    spec: ModelSpec = family(part, model_id)
    multimodal = part is not config or "vision_config" in config
    return replace(spec, notes=(*spec.notes, _TEXT_ONLY)) if multimodal else spec


def _unknown_family(model_type: str) -> UnknownFamily:
    """Build the error for a model_type outside the registry: close names first, then all of them."""
    import difflib  # only needed on the error path

    close = difflib.get_close_matches(model_type[:200], known_families(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return UnknownFamily(
        f"unknown model_type {one_line(model_type)!r}; {hint}With pip install 'loraplan[trace]' its structure is read "
        f"from the class of transformers, if it has one. Known families: {one_line(', '.join(known_families()), 700)}"
    )
