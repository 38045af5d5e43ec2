"""A tokenizer's own chat template, rendered by jinja in a sandbox as transformers 5.24 renders it.

Same environment as transformers' utils/chat_template_utils.py: blocks trimmed, loop controls, the generation tag,
tojson without HTML escapes, raise_exception and strftime_now. The sandbox keeps a template from running code; it is
read from a local folder only.
"""

from __future__ import annotations

import json
import os
from typing import Any

from planner.base.errors import InvalidInput, MissingDependency, one_line
from planner.runs.dataset.rows import Row, RowError

MAX_FILE = 64 * 2**20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled chat template and the special tokens it may name."""

    def __init__(self, text: str, special: dict[str, str], source: str) -> None:
        self.source = source
        self.special = special
        self.environment, self.error = _environment()
        try:
            self.template = self.environment.from_string(text)
        except self.error as error:
            raise InvalidInput(f"{source}: the chat template does not compile: {one_line(str(error), 100)}") from None

    def render(self, row: Row) -> str:
        """Render a conversation.

        Raises:
            RowError: the row is text, or the template refuses it.
        """
        if not row.turns:
            raise RowError("the tokenizer's chat template takes a conversation; this row is text")
        messages = [{"role": turn.role, "content": turn.content} for turn in row.turns]
        try:
            text: str = self.template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **self.special
            )
        except (self.error, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RowError(f"the chat template refuses it: {one_line(str(error), 80)}") from None
        return text


def _environment() -> tuple[Any, type[Exception]]:
    """The jinja environment of transformers, and jinja's error."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingDependency(
            "chat templates need jinja2 (pip install 'loraplan[data]'); or choose --template chatml"
        ) from None

    class Generation(Extension):
        """{% generation %} marks the assistant's tokens; what it encloses is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own attribute

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **extra: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **extra)

    def strftime_now(pattern: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(pattern)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made, jinja2.TemplateError


def load(folder: str) -> ChatTemplate | None:
    """Read the chat template of a tokenizer's folder: chat_template.jinja, else tokenizer_config.json; None without.

    Raises:
        PlannerError: files that cannot be read as what they claim to be.
    """
    config = _json(os.path.join(folder, "tokenizer_config.json"))
    special = {key: text for key in _SPECIAL if (text := _token(config.get(key)))}
    own = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(own):
        return ChatTemplate(_text(own), special, "chat_template.jinja")
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return ChatTemplate(found, special, "tokenizer_config.json") if isinstance(found, str) and found else None


def special_tokens(folder: str) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names."""
    config = _json(os.path.join(folder, "tokenizer_config.json"))
    return {key: text for key in _SPECIAL if (text := _token(config.get(key)))}


def _token(value: Any) -> str:
    if isinstance(value, dict):  # a serialized AddedToken
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _json(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        raise InvalidInput(f"{one_line(path, 200)} is not JSON; give the folder of a tokenizer") from None
    return found if isinstance(found, dict) else {}


def _text(path: str) -> str:
    if os.path.getsize(path) > MAX_FILE:
        raise InvalidInput(f"{one_line(path, 200)} is larger than {MAX_FILE // 2**20} MiB; give a tokenizer's folder")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise InvalidInput(f"{one_line(path, 200)} is not UTF-8; give the folder of a tokenizer") from None
