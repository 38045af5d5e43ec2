"""One training row in the five shapes that fine-tuning data comes in, and what is wrong with a row.

Shapes: Alpaca (instruction, input, output or response), messages (OpenAI), ShareGPT (conversations), prompt with
response or completion, plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from planner.base.errors import one_line

SHAPES = ("alpaca", "messages", "sharegpt", "prompt", "text")
ROLES = ("system", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip
_MESSAGE_ROLES = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class Row(NamedTuple):
    """One training example; what its shape does not have is empty."""

    shape: str
    turns: tuple[Turn, ...] = ()
    instruction: str = ""
    input: str = ""
    output: str = ""
    text: str = ""


class RowError(Exception):
    """A row that cannot be used; the message says why."""


def parse(value: Any) -> Row:
    """Turn one decoded record into a row; a bare list is a list of messages.

    Raises:
        RowError: naming what is missing or of the wrong type.
    """
    if isinstance(value, list):
        return _conversation("messages", value, "role", "content", _MESSAGE_ROLES)
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object, not {_type(value)}")
    if "messages" in value:
        return _conversation("messages", value["messages"], "role", "content", _MESSAGE_ROLES)
    if "conversations" in value:
        return _sharegpt(value)
    if "instruction" in value:
        return _alpaca(value)
    if "prompt" in value:
        return _prompt(value)
    if "text" in value:
        text = _string(value, "text")
        if not text:
            raise RowError("text is empty")
        return Row("text", text=text)
    raise RowError(
        f"no known keys (has {one_line(', '.join(map(str, value)) or 'none', 60)}); "
        "known: instruction, messages, conversations, prompt, text"
    )


def _alpaca(value: Mapping[str, Any]) -> Row:
    key = "output" if "output" in value else "response"
    instruction, answer = _string(value, "instruction"), _string(value, key)
    given = _string(value, "input") if value.get("input") is not None else ""
    system = _string(value, "system") if value.get("system") is not None else ""
    if not instruction:
        raise RowError("instruction is empty")
    question = f"{instruction}\n{given}" if given else instruction
    turns: tuple[Turn, ...] = (Turn("user", question), Turn("assistant", answer))
    if system:
        turns = (Turn("system", system), *turns)
    return Row("alpaca", turns, instruction, given, answer)


def _prompt(value: Mapping[str, Any]) -> Row:
    key = "completion" if "completion" in value else "response"
    if isinstance(value["prompt"], list):  # TRL's conversational prompt and completion
        completion = value.get(key)
        if not isinstance(completion, list):
            raise RowError(f"prompt is a list of messages, {key} is not")
        return _conversation("prompt", [*value["prompt"], *completion], "role", "content", _MESSAGE_ROLES)
    prompt, answer = _string(value, "prompt"), _string(value, key)
    if not prompt:
        raise RowError("prompt is empty")
    return Row("prompt", (Turn("user", prompt), Turn("assistant", answer)), prompt, "", answer)


def _sharegpt(value: Mapping[str, Any]) -> Row:
    turns = value["conversations"]
    openai = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    if openai:
        return _conversation("messages", turns, "role", "content", _MESSAGE_ROLES)
    return _conversation("sharegpt", turns, "from", "value", _SHAREGPT_ROLES)


def _conversation(shape: str, turns: Any, who: str, what: str, roles: Mapping[str, str]) -> Row:
    if not isinstance(turns, list) or not turns:
        raise RowError(f"a conversation must be a list of turns, not {_type(turns) if turns != [] else 'empty'}")
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} is {_type(turn)}, not an object with {who} and {what}")
        role = turn.get(who)
        if not isinstance(role, str) or role not in roles:
            raise RowError(f"turn {number}: {who} is {one_line(role, 30)!r}; known: {', '.join(roles)}")
        found.append(Turn(roles[role], _content(turn.get(what), number, what)))
    row = Row(shape, tuple(found))
    if len(found) == 2 and found[0].role == "user" and found[1].role == "assistant":
        row = row._replace(instruction=found[0].content, output=found[1].content)
    return row


def _content(value: Any, number: int, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "".join(part["text"] for part in value)
    raise RowError(f"turn {number}: {what} is {_type(value)}; only text can be planned")


def _string(value: Mapping[str, Any], key: str) -> str:
    if key not in value:
        raise RowError(f"{key} is missing")
    text = value[key]
    if not isinstance(text, str):
        raise RowError(f"{key} is {_type(text)}, not text")
    return text


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def doubts(row: Row) -> list[str]:
    """What is odd about a row that can still be used."""
    if row.shape == "text":
        return []
    if row.instruction:  # one question and one answer
        return [] if row.output.strip() else ["the last answer is empty"]
    roles = [turn.role for turn in row.turns]
    found = []
    if "assistant" not in roles:
        found.append("no assistant turn: nothing to learn from")
    elif roles[-1] != "assistant":
        found.append("the last turn is not the assistant's")
    elif not row.turns[-1].content.strip():
        found.append("the last answer is empty")
    if "system" in roles[1:]:
        found.append("a system turn that is not the first")
    spoken = [role for role in roles if role != "system"]
    if "tool" not in roles and any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        found.append("user and assistant do not alternate")
    return found
