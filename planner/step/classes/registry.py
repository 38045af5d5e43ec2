"""The one place where a model's type, or a framework with modules of its own, is looked up: it gives its habits."""

from __future__ import annotations

from importlib import import_module

from planner.base.records import Rows
from planner.step.habits import COMMON, Habits
from planner.training.own_modules import OWN_MODULES

FILES: dict[str, str] = {
    "apertus": "apertus",
    "baichuan": "remote",
    "bloom": "bloom",
    "chatglm": "remote",
    "codegen": "gptj",
    "cohere": "cohere",
    "cohere2": "cohere",
    "ernie4_5": "ernie",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
    "glm": "glm",
    "glm4": "glm",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt2",
    "gpt_neo": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "gptj": "gptj",
    "granite": "granite",
    "granitemoe": "granite",
    "helium": "glm",
    "internlm2": "remote",
    "llama": "llama",
    "llama4_text": "llama",
    "mimo": "remote",
    "mistral": "mistral",
    "mixtral": "mistral",
    "mpt": "mpt",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo",
    "olmo3": "olmo",
    "olmoe": "olmo",
    "opt": "opt",
    "phi": "phi",
    "phi3": "phi",
    "phimoe": "phi",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen2",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""model_type -> the file of this folder that holds its habits; every other class does what most do."""


OWN: Rows[str] = Rows("file of own modules", [name for name in OWN_MODULES if name != "none"], [("litgpt", "litgpt")])
"""Framework with modules of its own -> the file of this folder whose `habits` takes the place of a class's."""


def habits_of(model_type: str, own_modules: str = "none") -> Habits:
    """The habits of a class of transformers, or of a framework's own modules where they take its place."""
    file = FILES.get(model_type)
    found: Habits = COMMON if file is None else import_module(f"planner.step.classes.{file}").HABITS[model_type]
    if own_modules == "none":
        return found
    own: Habits = import_module(f"planner.step.classes.{OWN[own_modules]}").habits(found)
    return own
