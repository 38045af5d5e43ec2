"""Configs from strangers: whatever a file holds, reading it ends soon, in one line or a result, and runs nothing."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from planner.base.errors import PlannerError
from planner.importers import read_job
from tests.helpers.training_configs import AXOLOTL, EXAMPLES, SCRIPT_TRL, notebook

SECONDS = 2.0
"""No file may take longer."""


def refused(path: Path | str, **how: bool) -> str:
    """Read a file that must be refused: one printable line, soon."""
    start = time.process_time()
    with pytest.raises(PlannerError) as caught:
        read_job([str(path)], **how)
    assert time.process_time() - start < SECONDS
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 1000 and message.isprintable()
    return message


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --- YAML ---------------------------------------------------------------------------------------------------------


def test_billion_laughs(tmp_path: Path) -> None:
    lines = ["base_model: x", "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "stands for more than 20,000 values" in refused(write(tmp_path, "a.yml", "\n".join(lines)))


def test_anchors_without_end(tmp_path: Path) -> None:
    assert "names an anchor that is not there" in refused(write(tmp_path, "a.yml", "base_model: &a [*a]\n"))
    text = "base_model: x\nadapter: lora\n" + "".join(f"k{i}: &b{i} {i}\n" for i in range(9_000))
    assert read_job([str(write(tmp_path, "b.yml", text))]).stack == "axolotl"
    assert "values" in refused(write(tmp_path, "c.yml", text + "".join(f"l{i}: *b{i}\n" for i in range(9_000))))


def test_merge_keys_do_not_multiply(tmp_path: Path) -> None:
    wide = "base: &b {" + ", ".join(f"k{i}: {i}" for i in range(3000)) + "}\n"
    text = "base_model: x\nadapter: lora\n" + wide + "".join(f"m{i}:\n  <<: *b\n" for i in range(2000))
    assert "values" in refused(write(tmp_path, "a.yml", text))


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "!!seq ["])
def test_deep_nesting(tmp_path: Path, opening: str) -> None:
    refused(write(tmp_path, "a.yml", "base_model: " + opening * 50_000))
    refused(write(tmp_path, "b.yml", opening * 50_000))


def test_tags_build_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for tag in (
        f"!!python/object/apply:os.system ['touch {victim}']",
        f"!!python/object/new:subprocess.Popen [['touch', '{victim}']]",
        "!!python/name:os.system",
        "!!binary aGVsbG8=",
        "!custom {a: 1}",
        "!!timestamp 2001-01-01",
    ):
        assert "tags are not read" in refused(write(tmp_path, "a.yml", f"base_model: x\nadapter: {tag}\n"))
    assert not victim.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00\x00",
        b"base_model: \xff\xfe\n",
        b"\x00" * 100,
        b"base_model: a\n\tadapter: b",
        b"- a\n- b\n",
        b"just words",
        b"42",
        b"base_model: [",
        b"%YAML 9.9\n---\na: b",
        b"&a",
        b"*a",
        b"? [a, b]\n: c\n",
        b"a: b\na: {",
        b"\xef\xbb\xbf",
        b"---\n---\n",
        b'base_model: "\\ud800"\n',
        b"{" * 5000,
        b"a: b: c: d",
    ],
)
def test_broken_yaml(tmp_path: Path, data: bytes) -> None:
    refused(write(tmp_path, "a.yml", data))


def test_long_scalars_and_comments(tmp_path: Path) -> None:
    for text in (
        "# " + "x" * 1_000_000,
        "a: " + "x" * 1_000_000,
        'a: "' + "\\n" * 400_000 + '"',
        "a: |\n" + " x\n" * 300_000,
    ):
        start = time.process_time()
        with pytest.raises(PlannerError):
            read_job([str(write(tmp_path, "a.yml", text))])
        assert time.process_time() - start < SECONDS


def test_huge_numbers(tmp_path: Path) -> None:
    for number in ("9" * 63, "9" * 5000, "1e999", "-1", ".inf", "0x10", "1_000", "nan", "1e-400"):
        text = f"base_model: x\nlora_r: {number}\n"
        if number == "1_000":
            assert read_job([str(write(tmp_path, "a.yml", text))]).given["r"].value == 1000
        else:
            assert "lora_r" in refused(write(tmp_path, "a.yml", text))


def test_control_characters_reach_no_terminal(tmp_path: Path) -> None:
    text = 'base_model: x\nadapter: lora\nlora_r: "\\e[2J\\e]0;title\\a"\n'
    assert "\x1b" not in refused(write(tmp_path, "a.yml", text))
    job = read_job([str(write(tmp_path, "b.yml", 'base_model: x\nadapter: lora\noptimizer: "\\e[31m"\n'))])
    assert all(str(missing).isprintable() for missing in job.missing)


# --- sizes and places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.yml", "a.json", "a.py", "a.ipynb", "adapter_config.json"])
def test_a_gigabyte_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert "1073741824 bytes" in refused(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yml")
    for path in (tmp_path / "pipe.yml", tmp_path, "/dev/zero", "/dev/stdin", tmp_path / "absent.yml"):
        refused(path)


def test_pickles_and_weights_are_refused_by_name(tmp_path: Path) -> None:
    assert "pickle, which can run code" in refused(write(tmp_path, "training_args.bin", b"\x80\x04."))
    assert "holds weights" in refused(write(tmp_path, "model.safetensors", b"x"))


def test_the_model_of_a_config_stays_in_its_folder(tmp_path: Path) -> None:
    for name in ("/etc", "../../etc/config.json", "~root/model", "a/b/../../../c", "C:\\\\models\\\\x", "./../x"):
        text = f"base_model: {name}\nadapter: lora\nmicro_batch_size: 1\n"
        if name.startswith("C:"):
            continue  # a relative path here, and outside nothing
        assert "outside its folder" in refused(write(tmp_path, "a.yml", text)), name


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"peft_type": "LORA",}',
        '{"peft_type": NaN}',
        '{"r": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"peft_type": "LORA", "r": {"a": 1}}',
        '{"peft_type": "LORA", "r": true}',
        '{"peft_type": "LORA", "r": [1, 2]}',
        '{"peft_type": 1}',
        '{"peft_type": "IA3"}',
    ],
)
def test_broken_json(tmp_path: Path, text: str) -> None:
    refused(write(tmp_path, "a.json", text))


def test_many_values_in_json(tmp_path: Path) -> None:
    text = json.dumps({"peft_type": "LORA", "target_modules": list(range(100_000))})
    assert "20,000 values" in refused(write(tmp_path, "a.json", text))


def test_lines_are_right_where_strings_look_like_keys(tmp_path: Path) -> None:
    text = '{\n "a": "x: {\\"r\\": 3, [",\n "peft_type": "LORA",\n "b": [{"r": 1},\n {"r": 2}],\n "r":\n 5\n}'
    assert read_job([str(write(tmp_path, "a.json", text))]).given["r"].origin == "file a.json:6 r"


# --- scripts and notebooks ----------------------------------------------------------------------------------------


def test_scripts_are_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    text = f"open({str(victim)!r}, 'w')\nimport os; os.system('touch {victim}')\n" + SCRIPT_TRL
    text += f"LoraConfig(r=__import__('os').system('touch {victim}'))\nclass A(LoraConfig(r=3)): pass\n"
    read_job([str(write(tmp_path, "a.py", text))])
    assert not victim.exists()


@pytest.mark.parametrize(
    "text",
    [
        "def f(:",
        "x = (",
        "\x00",
        "LoraConfig(" * 3000,
        "x = " + "(" * 5000 + ")" * 5000,
        "x = " + "-" * 50_000 + "1",
        "x = " + "+".join(["1"] * 60_000),
        "if x:\n" + "".join(" " * i + "if x:\n" for i in range(1, 200)),
        "x = 9" + "9" * 5000,
        "a" + ".b" * 30_000,
        "f" + "()" * 20_000,
        "lambda: " * 5000 + "0",
        "é" * 600_000,
        "'\\N{x}'",
        "x = yield",
        "# coding: rot13\n",
    ],
)
def test_broken_scripts(tmp_path: Path, text: str) -> None:
    refused(write(tmp_path, "a.py", text))


def test_names_that_go_round_in_circles(tmp_path: Path) -> None:
    text = "a = b\nb = a\nLoraConfig(r=a)\n" + "".join(f"c{i} = c{i + 1}\n" for i in range(5000)) + "LoraConfig(r=c0)\n"
    job = read_job([str(write(tmp_path, "a.py", text))])
    assert any("a deep expression" in str(missing) for missing in job.missing)


def test_lists_that_double_through_names(tmp_path: Path) -> None:
    text = "a0 = [1, 1]\n" + "".join(f"a{i} = [{', '.join([f'a{i - 1}'] * 20)}]\n" for i in range(1, 15))
    start = time.process_time()
    read_job([str(write(tmp_path, "a.py", text + "LoraConfig(target_modules=a14, r=8)\n"))])
    assert time.process_time() - start < SECONDS


def test_notebooks_with_megabytes_of_output(tmp_path: Path) -> None:
    path = write(tmp_path, "a.ipynb", notebook(SCRIPT_TRL, output="x" * 20_000_000))
    start = time.process_time()
    assert read_job([str(path)]).given["r"].value == 16
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"cells": 1}',
        '{"cells": [1]}',
        '{"cells": [{"cell_type": "code"}]}',
        '{"cells": [null]}',
        "nope",
        '{"cells": [{"cell_type": "code", "source": [1]}]}',
        '{"cells":' * 5000,
        notebook("x" * 2_000_000),
    ],
)
def test_broken_notebooks(tmp_path: Path, text: str) -> None:
    refused(write(tmp_path, "a.ipynb", text))


# --- mutation -----------------------------------------------------------------------------------------------------

WORDS = (
    "null",
    "true",
    "0",
    "-1",
    "1e999",
    "[]",
    "{}",
    "'",
    '"',
    "&a",
    "*a",
    "!!python/object:x",
    "- ",
    ": ",
    "\n",
    "  ",
    "\t",
    "auto",
    "9" * 40,
    "é",
    "\x00",
    "\x1b[2J",
    "%",
    "[[[[",
    "}}",
    "#",
    "|",
    ">",
    "?",
    "---",
    "<<: *a",
    "../..",
    "/etc/passwd",
    "qlora",
    "gptq",
    "((",
    "lambda:",
    "=",
    ",",
    "None",
    "torch.float16",
    "\\",
    "/",
    "nan",
    ".inf",
    "0x1",
    "all-linear",
    "(.*)*$",
    "fsdp",
    "deepspeed",
)
MUTATIONS = 20_000


def mutated(text: str, random_: random.Random) -> str:
    """Return a text with a few of its parts cut, doubled, swapped or replaced by what parsers stumble over."""
    for _ in range(random_.choice((1, 1, 2, 3, 8))):
        if not text:
            return "x"
        a, b = sorted(random_.randrange(len(text) + 1) for _ in range(2))
        kind = random_.randrange(7)
        if kind == 0:
            text = text[:a] + random_.choice(WORDS) + text[a:]
        elif kind == 1:
            text = text[:a] + text[min(b, a + 40) :]
        elif kind == 2:
            text = text[:a] + text[a : a + 60] * random_.choice((2, 3, 30)) + text[a + 60 :]
        elif kind == 3:  # another value for a key
            lines = text.split("\n")
            i = random_.randrange(len(lines))
            for mark in (": ", "=", ":"):
                if mark in lines[i]:
                    lines[i] = lines[i].split(mark, 1)[0] + mark + random_.choice(WORDS)
                    break
            text = "\n".join(lines)
        elif kind == 4:  # lines in another order
            lines = text.split("\n")
            random_.shuffle(lines)
            text = "\n".join(lines)
        elif kind == 5:
            text = text[:a] + chr(random_.randrange(1, 0x2FF)) + text[a + 1 :]
        else:  # a line of another format
            other = random_.choice(EXAMPLES).text.split("\n")
            text = text[:a] + "\n" + random_.choice(other) + "\n" + text[a:]
    return text


@pytest.mark.slow
def test_mutated_configs_end_in_one_line_or_a_reading(tmp_path: Path) -> None:
    """20,000 mutated configs: no exception but ours, none slower than two seconds, and a good part is still read."""
    random_ = random.Random(8)
    read = 0
    for number in range(MUTATIONS):
        example = EXAMPLES[number % len(EXAMPLES)]
        text = mutated(example.text, random_)
        path = write(tmp_path, example.name, text.encode("utf-8", "surrogatepass"))
        start = time.process_time()
        try:
            job = read_job([str(path)], one_gpu=number % 2 == 0)
        except PlannerError as error:
            message = str(error)
            assert message and "\n" not in message and message.isprintable(), (message, text)
        else:
            read += 1
            assert job.summary and all(str(missing).isprintable() for missing in job.missing), text
        assert time.process_time() - start < SECONDS, text
    assert MUTATIONS // 10 < read < MUTATIONS


def test_the_seeds_of_the_mutations_are_read(tmp_path: Path) -> None:
    for example in EXAMPLES:
        read_job([str(write(tmp_path, example.name, example.text))])
    assert AXOLOTL in {example.text for example in EXAMPLES}
