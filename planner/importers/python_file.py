"""Training scripts and notebooks: literal keyword arguments of the calls that configure a run. Parsed, never run.

Each recognised call (LoraConfig, SFTConfig, ...) becomes a section of the document: `LoraConfig(r=8)` is the entry
`LoraConfig.r`. A name is followed to the one literal it was assigned at any level; what would have to be run to be
known stays Unread, and the reader of the document says so where it matters.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from planner.base.errors import InvalidInput, one_line
from planner.importers.document import MAX_NODES, Document, Entry, Unread, quote

MAX_SOURCE: Final = 1_048_576
"""Bytes of program text; the largest example scripts have about 60 kB."""
MAX_NOTEBOOK: Final = 67_108_864
"""Bytes of a notebook file: images in outputs make megabytes, and only its code cells are looked at."""
MAX_CALLS: Final = 2_000

CALLS: Final[Mapping[str, tuple[str, ...]]] = {
    "LoraConfig": ("r",),
    "BitsAndBytesConfig": (),
    "TrainingArguments": ("output_dir",),
    "Seq2SeqTrainingArguments": ("output_dir",),
    "SFTConfig": ("output_dir",),
    "SFTTrainer": ("model",),
    "Trainer": ("model",),
    "DPOConfig": ("output_dir",),
    "GRPOConfig": ("output_dir",),
    "PPOConfig": ("output_dir",),
    "RLOOConfig": ("output_dir",),
    "KTOConfig": ("output_dir",),
    "ORPOConfig": ("output_dir",),
    "RewardConfig": ("output_dir",),
    "UnslothTrainingArguments": ("output_dir",),
    "prepare_model_for_kbit_training": ("model", "use_gradient_checkpointing"),
    "AutoModelForCausalLM.from_pretrained": ("pretrained_model_name_or_path",),
    "AutoModelForImageTextToText.from_pretrained": ("pretrained_model_name_or_path",),
    "FastLanguageModel.from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit"),
    "FastLanguageModel.get_peft_model": ("model", "r"),
    "FastModel.from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit"),
    "FastModel.get_peft_model": ("model", "r"),
    "FastVisionModel.from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit"),
    "FastVisionModel.get_peft_model": ("model", "r"),
    "foundation_model.create": ("model", "train_data_path", "register_to"),
}
"""Calls that are read, by the end of their dotted name, with the names of their positional arguments."""

SAME: Final[Mapping[str, str]] = {
    "Seq2SeqTrainingArguments": "TrainingArguments",
    "UnslothTrainingArguments": "TrainingArguments",
    "AutoModelForImageTextToText.from_pretrained": "from_pretrained",
    "AutoModelForCausalLM.from_pretrained": "from_pretrained",
    "FastModel.from_pretrained": "FastLanguageModel.from_pretrained",
    "FastModel.get_peft_model": "FastLanguageModel.get_peft_model",
    "FastVisionModel.from_pretrained": "FastLanguageModel.from_pretrained",
    "FastVisionModel.get_peft_model": "FastLanguageModel.get_peft_model",
}
"""Calls that take the same arguments as another: the section they are filed under."""


def parse_script(text: str, path: str) -> Document:
    """Return the recognised calls of a Python file.

    Raises:
        InvalidInput: not Python.
    """
    return _document(_tree(text, path), path, "python")


def parse_notebook(data: bytes, path: str) -> Document:
    """Return the recognised calls of a notebook's code cells; magics and shell lines are skipped.

    Raises:
        InvalidInput: not a notebook, or more code than a notebook has.
    """
    try:
        cells = json.loads(data.decode("utf-8-sig"))["cells"]
        sources = [_source(c["source"]) for c in cells if isinstance(c, dict) and c.get("cell_type") == "code"]
    except (UnicodeDecodeError, ValueError, RecursionError, KeyError, TypeError):
        raise InvalidInput(f"{quote(path)} is not a notebook; pass an .ipynb file that Jupyter opens") from None
    code = "\n".join(line for source in sources for line in _code_lines(source, path))
    if len(code) > MAX_SOURCE:
        raise InvalidInput(f"{quote(path)} holds over {MAX_SOURCE:,} characters of code; pass the config it uses")
    return _document(_tree(code, path), path, "notebook")


def _source(value: Any) -> str:
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("no text")
    return "".join(parts)


def _code_lines(source: str, path: str) -> list[str]:
    """Return the lines of a cell if they are Python; a cell of another language or with an error gives none."""
    if source.lstrip().startswith("%%"):
        return []
    lines = ["" if line.lstrip().startswith(("!", "%", "?")) else line for line in source.splitlines()]
    try:
        _tree("\n".join(lines), path)
    except InvalidInput:
        return []
    return lines


def _tree(text: str, path: str) -> ast.Module:
    import warnings

    if len(text) > MAX_SOURCE:
        raise InvalidInput(f"{quote(path)} has over {MAX_SOURCE:,} characters; pass the config it uses")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stranger's invalid escape is not this user's business
            return ast.parse(text)
    except SyntaxError as error:
        raise InvalidInput(f"{quote(path)} line {error.lineno or 1} is not Python; correct the file") from None
    except (ValueError, RecursionError, MemoryError):
        raise InvalidInput(f"{quote(path)} is not Python that can be parsed; pass the config it uses") from None


def _document(tree: ast.Module, path: str, kind: str) -> Document:
    reader = _Reader(tree)
    entries: dict[str, Entry] = {}
    for section, call, positional in reader.calls():
        entries.setdefault(section, Entry({}, call.lineno))
        for name, node in _arguments(call, positional):
            entries[f"{section}.{name}"] = Entry(reader.value(node), node.lineno)
    for key in [k for k, e in entries.items() if isinstance(e.value, dict) and "." in k]:
        for name, value in entries[key].value.items():  # gradient_checkpointing_kwargs={"use_reentrant": False}
            entries[f"{key}.{name}"] = Entry(value, entries[key].line)
    return Document(path, entries, kind)


def _arguments(call: ast.Call, positional: tuple[str, ...]) -> Iterator[tuple[str, ast.expr]]:
    yield from zip(positional, (a for a in call.args if not isinstance(a, ast.Starred)), strict=False)
    for keyword in call.keywords:
        if keyword.arg is not None:
            yield keyword.arg, keyword.value
        else:
            yield "**", keyword.value


class _Reader:
    """Finds calls in a tree and evaluates literals, following names that have exactly one literal value."""

    def __init__(self, tree: ast.Module) -> None:
        self.nodes: list[ast.AST] = []
        for node in ast.walk(tree):  # iterative: depth is no danger
            self.nodes.append(node)
            if len(self.nodes) > 50 * MAX_NODES:
                break
        self.names = _single_values(self.nodes)
        self.budget = MAX_NODES

    def calls(self) -> Iterator[tuple[str, ast.Call, tuple[str, ...]]]:
        """Yield section, call and positional names, in the order of the text."""
        found = [
            (SAME.get(name, name), node, CALLS[name])
            for node in self.nodes
            if isinstance(node, ast.Call)
            for name in [_called(node.func)]
            if name in CALLS
        ]
        yield from sorted(found[:MAX_CALLS], key=lambda item: (item[1].lineno, item[1].col_offset))

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """Return a literal, the last part of a dotted name (torch.bfloat16), or Unread."""
        self.budget -= 1  # a list that names a list that names a list could otherwise double without end
        if depth > 20 or self.budget < 0:
            return Unread("a deep expression")
        if isinstance(node, ast.Constant):
            known = isinstance(node.value, (str, int, float, bool, type(None)))
            return node.value if known and not _huge(node.value) else Unread("a constant")
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            items = [self.value(item, depth + 1) for item in node.elts[:MAX_NODES]]
            return next((item for item in items if isinstance(item, Unread)), items)
        if isinstance(node, ast.Dict):
            return self._dict(node, depth)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self.value(node.operand, depth + 1)
            return -inner if isinstance(inner, (int, float)) and not isinstance(inner, bool) else Unread(_text(node))
        if isinstance(node, ast.Name):
            target = self.names.get(node.id)
            return self.value(target, depth + 1) if target is not None else Unread(_text(node))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr
        return Unread(_text(node))

    def _dict(self, node: ast.Dict, depth: int) -> Any:
        result: dict[str, Any] = {}
        for key, item in zip(node.keys[:MAX_NODES], node.values, strict=False):
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                return Unread("a dict with computed keys")
            result[key.value] = self.value(item, depth + 1)
        return result


def _single_values(nodes: list[ast.AST]) -> dict[str, ast.expr]:
    """Return the names that are bound exactly once in the whole file, by a plain assignment, with what they get."""
    times: Counter[str] = Counter()
    values: dict[str, ast.expr] = {}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            times[node.id] += 1
        elif isinstance(node, ast.arg):
            times[node.arg] += 1  # a parameter hides the name of a constant
        elif isinstance(node, ast.alias):
            times[node.asname or node.name] += 1
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = node.value
    return {name: value for name, value in values.items() if times[name] == 1}


def _called(func: ast.expr) -> str:
    """Return the name of a recognised call: its last part, or its last two when the call is a method."""
    if isinstance(func, ast.Name):
        return func.id
    if isinstance(func, ast.Attribute):
        if isinstance(func.value, ast.Name):
            pair = f"{func.value.id}.{func.attr}"
            return pair if pair in CALLS else func.attr
        if isinstance(func.value, ast.Attribute):
            pair = f"{func.value.attr}.{func.attr}"
            return pair if pair in CALLS else func.attr
    return ""


def _huge(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() > 256


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return one_line(node.id, 40)
    if isinstance(node, ast.Attribute):
        return f"….{one_line(node.attr, 40)}"
    return f"a {type(node).__name__}"
