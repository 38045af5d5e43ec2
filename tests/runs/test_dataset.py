"""Reading data: row shapes, templates byte for byte, tokens, broken lines, splits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import Contradiction, InvalidInput, PlannerError, UnknownName
from planner.runs.dataset import chat, files
from planner.runs.dataset.rows import RowError, doubts, parse
from planner.runs.dataset.scan import WRITTEN, Source, Split, scan, write
from planner.runs.dataset.templates import BUILT_IN, choose
from planner.runs.dataset.tokens import RATIOS, Estimate, Exact, family_of

ALPACA = {"instruction": "Summarize the following text.", "input": "ML is a subset of AI.", "output": "ML learns."}
BARE = {"instruction": "Say hello.", "input": "", "output": "Hello."}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Goodbye."},
    ]
}


def rendered(name: str, row: Any) -> str:
    return BUILT_IN[name].render(parse(row))


# --- templates -----------------------------------------------------------------------------------------------------


def test_alpaca_as_the_course_has_it() -> None:
    """fine-tuning/src/main.rs format_alpaca."""
    assert rendered("alpaca-seed", ALPACA) == (
        "### Instruction:\nSummarize the following text.\n\n### Input:\nML is a subset of AI.\n\n"
        "### Response:\nML learns."
    )


def test_fixture_14_no_input_block_without_input() -> None:
    without = {"instruction": "Say hello.", "output": "Hello."}
    for row in (BARE, without, {**BARE, "input": None}):
        assert rendered("alpaca-seed", row) == "### Instruction:\nSay hello.\n\n### Response:\nHello."
        assert "### Input" not in rendered("alpaca-stanford", row)
        assert rendered("chat-seed", row) == "<|user|>\nSay hello.\n<|assistant|>\nHello."


def test_alpaca_as_stanford_has_it() -> None:
    """stanford_alpaca train.py: PROMPT_DICT, then the answer without a newline."""
    text = rendered("alpaca-stanford", ALPACA)
    assert text.startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\n"
    )
    assert text.endswith("### Input:\nML is a subset of AI.\n\n### Response:ML learns.")
    # the course's study counts the preamble with its blank line
    assert text.index("### Instruction") == 159
    assert rendered("alpaca-stanford", BARE).index("### Instruction") == 107


def test_the_courses_chat_is_not_chatml() -> None:
    assert rendered("chat-seed", ALPACA) == (
        "<|user|>\nSummarize the following text.\nML is a subset of AI.\n<|assistant|>\nML learns."
    )
    assert rendered("chatml", ALPACA) == (
        "<|im_start|>user\nSummarize the following text.\nML is a subset of AI.<|im_end|>\n"
        "<|im_start|>assistant\nML learns.<|im_end|>\n"
    )


CHATML_JINJA = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}"
)
"""axolotl 0.19.0 utils/chat_templates/templates/chatml.jinja, without the generation prompt."""

CHAT_TEMPLATES = {
    "chatml": CHATML_JINJA,
    "llama-3-like": (
        "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    ),
    "mistral-like": (
        "{{ bos_token }}{% set loop_messages = messages %}{% if messages[0]['role'] == 'system' %}"
        "{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}{% endif %}"
        "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "[INST] {% if system is defined and loop.last %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "generation-tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m | tojson }}{% continue %}{% endif %}\n{% endfor %}"
    ),
    "trims-blocks": "{% for m in messages %}\n    {% if true %}\n  {{ m['content'] }}\n    {% endif %}\n{% endfor %}\n",
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    "row", [ALPACA, CHAT, {"prompt": 'é <b>"x"', "completion": "😀\n"}], ids=["one", "many", "odd"]
)
def test_chat_templates_render_as_transformers_renders_them(name: str, row: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), bos_token="<s>", eos_token="</s>"
    )
    turns = [turn._asdict() for turn in parse(row).turns]
    theirs = tokenizer.apply_chat_template(turns, chat_template=CHAT_TEMPLATES[name], tokenize=False)
    ours = chat.ChatTemplate(CHAT_TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}, "test").render(parse(row))
    assert ours == theirs


@pytest.mark.extra
def test_built_in_chatml_is_the_published_one() -> None:
    published = chat.ChatTemplate(CHATML_JINJA, {}, "axolotl")
    for row in (ALPACA, BARE, CHAT):
        assert BUILT_IN["chatml"].render(parse(row)) == published.render(parse(row))


@pytest.mark.extra
@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_a_chat_template_runs_no_code(hostile: str) -> None:
    template = chat.ChatTemplate(hostile, {}, "test")
    with pytest.raises(RowError, match="refuses"):
        template.render(parse(CHAT))


def test_templates_are_chosen_and_refused() -> None:
    assert choose("auto", "alpaca", None).name == "alpaca-seed"
    assert choose("auto", "sharegpt", None).name == "chatml"
    assert choose("auto", "text", None).name == "plain"
    with pytest.raises(Contradiction, match="give --tokenizer"):
        choose("model", "messages", None)
    with pytest.raises(UnknownName, match="did you mean chatml"):
        choose("chatmll", "messages", None)
    with pytest.raises(RowError, match="one instruction"):
        rendered("alpaca-seed", CHAT)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_the_five_shapes() -> None:
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    shapes = [
        ALPACA,
        {"instruction": "Hi", "response": "Hello."},
        CHAT,
        CHAT["messages"],
        share,
        {"prompt": "Hi", "response": "Hello."},
        {"prompt": "Hi", "completion": "Hello."},
        {"text": "Hi"},
    ]
    assert [parse(row).shape for row in shapes] == [
        "alpaca", "alpaca", "messages", "messages", "sharegpt", "prompt", "prompt", "text",
    ]  # fmt: skip
    assert parse(share).turns == parse({"prompt": "Hi", "response": "Hello."}).turns
    assert parse(share).instruction == "Hi"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"foo": 1}, "no known keys"),
        (3, "must be an object"),
        ({"instruction": "a"}, "response is missing"),
        ({"instruction": 5, "output": "b"}, "instruction is a number"),
        ({"instruction": "", "output": "b"}, "instruction is empty"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": "x"}, "must be a list of turns"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "known: system"),
        ({"messages": [{"role": "user", "content": None}]}, "only text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text"),
        ({"conversations": [["a"]]}, "turn 1"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_what_is_wrong_with_a_row(row: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        parse(row)


def test_doubts() -> None:
    def chatted(*roles: str) -> list[str]:
        return doubts(parse({"messages": [{"role": role, "content": "x"} for role in roles]}))

    assert chatted("system", "user", "assistant") == []
    assert chatted("user") == ["no assistant turn: nothing to learn from"]
    assert chatted("user", "assistant", "user") == ["the last turn is not the assistant's"]
    assert "user and assistant do not alternate" in chatted("user", "user", "assistant")
    assert "a system turn that is not the first" in chatted("user", "system", "assistant")
    assert doubts(parse({"prompt": "a", "response": " "})) == ["the last answer is empty"]


# --- files ---------------------------------------------------------------------------------------------------------

ROWS = [ALPACA, BARE, {"instruction": "Ünïcode 😀", "input": "\u2028", "output": "línea\nnext"}]


PLAIN = ("a.jsonl", "a.json", "a.csv")


def written(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif name.endswith(".csv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ALPACA))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", [*PLAIN, pytest.param("a.parquet", marks=pytest.mark.extra)])
def test_every_format_reads_the_same_rows(name: str, tmp_path: Path) -> None:
    found = list(files.records(str(written(tmp_path, name))))
    assert [item.value for item in found] == ROWS
    assert not any(item.problem for item in found)


def test_broken_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(ALPACA).encode()
    lines = [
        good,
        b"{broken",
        b"",
        b"\xff\xfe",
        b'{"instruction": 1}',
        b"[" * 200_000,
        good,
        b'{"text": "\\ud800"}',
        good,
    ]
    path.write_bytes(b"\n".join(lines))
    found = scan(Source(paths=(str(path),)))
    assert len(found.lengths) == 3
    assert [p.line for p in found.problems] == [2, 4, 5, 6, 8]
    assert found.num_problems == 5
    assert all(p.file == "a.jsonl" for p in found.problems)
    assert "column" in found.problems[0].reason


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(BARE)}\n{{"text": "{"x" * 5000}"}}\n{json.dumps(BARE)}\n')
    found = list(files.records(str(path)))
    assert [bool(item.problem) for item in found] == [False, True, False]
    assert [item.line for item in found] == [1, 2, 3]


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_an_array_is_read_in_pieces(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the pieces, the same rows and their lines."""
    monkeypatch.setattr(files, "_CHUNK", size)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    found = list(files.records(str(path)))
    assert [item.value for item in found] == ROWS
    assert [item.line for item in found] == [2, 7, 12]


@pytest.mark.parametrize("text", ['[{"text": "a"}, {"text": ', '[{"text": "a"} {]', '[{"text": "a"},'])
def test_a_broken_array_says_where(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    found = list(files.records(str(path)))
    assert found[0].value == {"text": "a"}
    assert found[-1].problem
    assert len(found) == 2


@pytest.mark.extra
def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pyarrow = pytest.importorskip("pyarrow")
    texts = pyarrow.array([b"good", b"b\xffd", b"fine"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    found = list(files.records(str(path)))
    assert [item.problem for item in found] == ["", "not UTF-8", ""]
    assert found[2].value == {"text": "fine"}


@pytest.mark.parametrize("name", [*PLAIN, pytest.param("a.parquet", marks=pytest.mark.extra)])
def test_damaged_files_are_problems_or_one_line(name: str, tmp_path: Path) -> None:
    """Bytes changed, put in and cut out at random: never anything but rows, problems or a PlannerError."""
    rng = random.Random(name)
    sound = written(tmp_path, name).read_bytes()
    path = tmp_path / f"damaged{Path(name).suffix}"
    outcomes = set()
    for _ in range(150):
        data = bytearray(sound)
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.choice(
                [b"", b'"', b"{", b"]", b"\x00", b"\xff", b"\n", b"1e999"]
            )
        path.write_bytes(data)
        try:
            found = scan(Source(paths=(str(path),)))
            outcomes.add("rows" if not found.num_problems else "problems")
        except PlannerError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
    assert len(outcomes) > 1


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"\ufeff{json.dumps(BARE)}\n{json.dumps(BARE)}\n", encoding="utf-8")
    assert [item.value for item in files.records(str(path))] == [BARE, BARE]


def test_csv_rows_with_the_wrong_number_of_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\na,b\nc\n\nd,e\n")
    found = list(files.records(str(path)))
    assert [item.line for item in found] == [2, 3, 5]
    assert "1 cells" in found[1].problem


@pytest.mark.parametrize("name", ["missing.jsonl", "a.txt", "folder"])
def test_what_is_no_data_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInput):
        files.kind(str(tmp_path / name))


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    with pytest.raises(InvalidInput, match="line 1: no known keys"):
        scan(Source(paths=(str(path),)))


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer with special tokens and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {"[UNK]": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.enable_truncation(4)  # must not cut what is counted
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHATML_JINJA}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.extra
def test_tokens_are_counted_with_a_local_tokenizer(tokenizer: Path) -> None:
    words = "one two three four five six"
    assert Exact(str(tokenizer), adds_special=True).count([words, ""]) == [8, 2]
    assert Exact(str(tokenizer / "tokenizer.json"), adds_special=False).count([words]) == [6]


@pytest.mark.oracle
def test_the_tokenizers_own_template(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    found = scan(Source(paths=(str(path),), tokenizer=str(tokenizer)))
    assert found.template.name == "model"
    assert found.example == rendered("chatml", CHAT)
    assert list(found.lengths.values) == [len(found.example.split())]
    assert "counted" in found.token_label


@pytest.mark.extra
def test_batches_of_texts_keep_their_order(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    sizes = [random.Random(i).randrange(1, 50) for i in range(1500)]
    path.write_text("".join(json.dumps({"text": "x " * size}) + "\n" for size in sizes))
    found = scan(Source(paths=(str(path),), tokenizer=str(tokenizer)))
    assert list(found.lengths.values) == [size + 2 for size in sizes]


@pytest.mark.extra
def test_no_tokenizer_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no tokenizer\.json"):
        Exact(str(tmp_path), adds_special=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match="is no tokenizer"):
        Exact(str(tmp_path), adds_special=True)


def test_estimates_are_labelled_with_their_error() -> None:
    for family in RATIOS:
        counter = Estimate(family)
        assert counter.label.startswith("estimated")
        assert 0.05 < counter.relative_error < 0.15
        assert counter.count(["x" * 1000])[0] == pytest.approx(1000 / RATIOS[family].english, rel=0.01)
    assert Estimate().count(["é" * 100]) == [101]


def test_the_family_is_told_by_the_vocabulary() -> None:
    assert family_of("llama", 32_000) == "llama2"
    assert family_of("llama", 128_256) == "llama3"
    assert family_of("qwen2", 152_064) == "qwen"
    assert family_of("mistral", 131_072) == "tekken"
    assert family_of("mistral", 32_768) == "llama2"


# --- splits ---------------------------------------------------------------------------------------------------------


def test_the_courses_split_is_in_order() -> None:
    """main.rs split: the first floor(n * ratio) rows."""
    assert list(Split(0.9, None).membership(11)) == [True] * 9 + [False] * 2


def test_a_seeded_split_repeats_and_is_fair() -> None:
    first = list(Split(0.9, 7).membership(1000))
    assert first == list(Split(0.9, 7).membership(1000))
    assert first != list(Split(0.9, 8).membership(1000))
    assert sum(first) == 900
    # rows at the end are left out as often as rows at the start
    counts = [sum(not list(Split(0.5, seed).membership(10))[place] for seed in range(400)) for place in (0, 9)]
    assert all(150 < count < 250 for count in counts)


@pytest.mark.parametrize("shape", WRITTEN)
def test_written_rows_read_back(shape: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl")
    found = scan(Source(paths=(str(path),)))
    counts = write(found, Split(0.7, 1), str(tmp_path / "out"), shape)
    assert counts == {"train.jsonl": 2, "validation.jsonl": 1}
    how = "auto" if shape == "text" else "chatml"
    again = [scan(Source(paths=(str(tmp_path / "out" / name),), template=how)) for name in counts]
    before = scan(Source(paths=(str(path),), template=how))
    assert sorted(v for part in again for v in part.lengths.values) == sorted(before.lengths.values)


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path, "train.jsonl")
    with pytest.raises(InvalidInput, match="is an input"):
        write(scan(Source(paths=(str(path),))), Split(1.0, None), str(tmp_path), "same")
    assert path.stat().st_size


def test_duplicates_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(BARE) + "\n") * 3 + json.dumps(ALPACA) + "\n")
    assert scan(Source(paths=(str(path),))).duplicates == 2
