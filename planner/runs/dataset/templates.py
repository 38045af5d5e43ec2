"""Templates: from a row to the text a model is trained on, byte for byte.

Texts end where the template ends; the end-of-sequence token that trainers add is counted with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from planner.base.errors import Contradiction, unknown
from planner.runs.dataset.rows import Row, RowError

if TYPE_CHECKING:
    from planner.runs.dataset.chat import ChatTemplate

Render = Callable[[Row], str]


class Template(NamedTuple):
    """A template by name: how it renders a row and where its definition comes from."""

    name: str
    render: Render
    source: str
    special_tokens: bool = False
    """The text already holds the tokenizer's special tokens: none are added when it is tokenized."""


_STANFORD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_STANFORD_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def _single(row: Row, template: str) -> tuple[str, str, str]:
    if not row.instruction:
        raise RowError(f"template {template} takes one instruction and one answer; this row is a conversation or text")
    return row.instruction, row.input, row.output


def alpaca_seed(row: Row) -> str:
    """Headed blocks, no preamble; no Input block when there is no input."""
    instruction, given, answer = _single(row, "alpaca-seed")
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n{answer}"


def alpaca_stanford(row: Row) -> str:
    """With the preamble; the answer follows the colon of Response directly, as in the original's training code."""
    instruction, given, answer = _single(row, "alpaca-stanford")
    if given:
        return f"{_STANFORD_INPUT}### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:{answer}"
    return f"{_STANFORD_NO_INPUT}### Instruction:\n{instruction}\n\n### Response:{answer}"


def chat_seed(row: Row) -> str:
    """<|user|> and <|assistant|> lines without an end marker; the course calls it ChatML, which it is not."""
    if row.turns and not row.instruction:
        return "\n".join(f"<|{turn.role}|>\n{turn.content}" for turn in row.turns)
    instruction, given, answer = _single(row, "chat-seed")
    middle = f"\n{given}" if given else ""
    return f"<|user|>\n{instruction}{middle}\n<|assistant|>\n{answer}"


def chatml(row: Row) -> str:
    """<|im_start|>role, newline, content, <|im_end|>, newline, for every turn."""
    if not row.turns:
        raise RowError("template chatml takes a conversation; this row is text")
    return "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in row.turns)


def plain(row: Row) -> str:
    """The text itself; prompt and answer one after the other."""
    if row.shape == "text":
        return row.text
    if row.instruction and row.shape == "prompt":
        return row.instruction + row.output
    raise RowError("template plain takes text, or prompt and response; name another template")


BUILT_IN: dict[str, Template] = {
    t.name: t
    for t in (
        Template("alpaca-seed", alpaca_seed, "DB-mlops-genai fine-tuning/src/main.rs format_alpaca"),
        Template("alpaca-stanford", alpaca_stanford, "tatsu-lab/stanford_alpaca train.py PROMPT_DICT"),
        Template("chat-seed", chat_seed, "DB-mlops-genai fine-tuning/src/main.rs format_chat"),
        Template("chatml", chatml, "axolotl 0.19.0 utils/chat_templates/templates/chatml.jinja"),
        Template("plain", plain, "trl 1.16.0: prompt and completion are concatenated"),
    )
}
NAMES = ("auto", *BUILT_IN, "model")


def choose(name: str, shape: str, chat: ChatTemplate | None) -> Template:
    """Return the template of that name; `auto` decides by the shape of the data and what the tokenizer has.

    Raises:
        PlannerError: unknown, or `model` without a tokenizer that has a chat template.
    """
    if name == "auto":
        conversation = "model" if chat else "chatml"
        name = {"alpaca": "alpaca-seed", "text": "plain", "prompt": "plain"}.get(shape, conversation)
    if name == "model":
        if chat is None:
            raise Contradiction(
                "template model is the tokenizer's own chat template: give --tokenizer a folder that has one "
                "(chat_template.jinja, or chat_template in tokenizer_config.json), or choose chatml"
            )
        return Template("model", chat.render, chat.source, special_tokens=True)
    if name not in BUILT_IN:
        raise unknown("template", name, NAMES)
    return BUILT_IN[name]
