"""Reports: alignment, wrapping, and text that neither a spreadsheet, a page nor a terminal can be driven by."""

from __future__ import annotations

import csv
import io
import json

import pytest

from planner.memory.walk import Moment
from planner.report import tables
from planner.report.answer import moment_words, target_words, value_words

HOSTILE = ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\tx", "a\x1b[31mb", "a\nb", "x|y", "<script>"]


@pytest.mark.parametrize("text", HOSTILE)
def test_csv_cells_are_inert(text):
    rows = list(csv.reader(io.StringIO(tables.csv_text(["name"], [[text]]))))
    assert rows[0] == ["name"]
    assert rows[1][0][0] not in "=+-@\t\r"
    assert rows[1][0].isprintable()


def test_csv_keeps_numbers_whole():
    text = tables.csv_text(["a", "b", "c", "d"], [[-1.5, 1234567, None, True]])
    assert text == "a,b,c,d\n-1.5,1234567,,true\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_cells_stay_cells(text):
    line = tables.markdown(["name", "n"], [[text, 1]]).splitlines()[2]
    assert line.replace("\\|", "").count("|") == 3
    assert "<" not in line
    assert line.isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_table_cells_are_printable(text):
    assert all(line.isprintable() for line in tables.aligned(["name"], [[text]]).splitlines())


def test_numbers_stand_to_the_right_and_text_to_the_left():
    text = tables.aligned(["name", "n", "x"], [["a", 1234, 1.0], ["bcdef", None, -0.001]])
    assert text.splitlines() == [
        "name       n     x",
        "-----  -----  ----",
        "a      1,234  1.00",
        "bcdef         0.00",
    ]
    assert tables.aligned(["name"], []).splitlines() == ["name", "----"]


@pytest.mark.line_ends
def test_wrapping_keeps_leading_blanks_and_long_words():
    assert tables.wrapped("  a b c", 5, "    ") == "  a b\n    c"
    assert tables.wrapped("x" * 90, 80) == "x" * 90
    assert tables.wrapped("") == ""
    text = tables.wrapped("word " * 50, 80, "  ")
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_one_document():
    assert json.loads(tables.json_text({"a": 1})) == {"a": 1}
    with pytest.raises(ValueError, match="JSON"):
        tables.json_text(float("nan"))


@pytest.mark.parametrize(
    ("phase", "layer", "in_head", "words"),
    [
        ("backward", -1, True, "at the start of the backward, in the loss and head"),
        ("backward", -1, False, "in the backward, outside the layers"),
        ("backward", 3, False, "in the backward of layer 4 of 8, recomputed from its checkpoint"),
        ("forward", 7, False, "in the forward of layer 8 of 8"),
        ("optimizer", -1, False, "in the optimizer step"),
        ("load", 0, False, "while the model is loaded, layer 1 of 8"),
    ],
)
def test_the_moment_is_said_in_words(phase, layer, in_head, words):
    assert moment_words(Moment(phase=phase, layer=layer, op="x", in_head=in_head), 8, True) == words


def test_values_are_said_in_words():
    assert value_words(True) == "yes"
    assert value_words(("a", "b")) == "a,b"
    assert value_words(()) == "none"
    assert value_words({"torch": "2.4"}) == "torch 2.4"
    assert target_words(("a", "b")) == "a+b"
    assert target_words(("a",) * 5) == "5 target modules"
