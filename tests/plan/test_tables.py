"""Tables, searches, comparisons and reports: right, bounded, and inert whatever a name contains."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import searches
from planner.base.errors import PlannerError
from planner.cli.main import cli
from planner.facts import catalog, sources
from planner.model import families
from planner.plan import predict, sweep
from planner.plan import rows as plan_rows
from planner.plan.largest import frontier, largest
from planner.plan.pick import Candidate, Limits, pick
from planner.plan.rows import Block, Caption
from planner.report import comparison, figures, grid, html_report
from planner.runs import cost
from planner.training import stacks

MODEL = "Qwen/Qwen2.5-1.5B"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def test_a_small_table_says_what_fits_says(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "table", MODEL, "--gpu", "rtx-4090,t4", "--batch", "1,4", "--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 4
    for row in rows:
        words = ("fits", MODEL, "--gpu", row["gpu"], "--batch", row["micro_batch_size"], "--format", "json")
        _, text, _ = run(capsys, *words, "--no-changes")
        answer = json.loads(text)
        assert (row["verdict"], int(row["device_bytes"])) == (answer["verdict"], answer["device"]["expected"])


@pytest.mark.extra
def test_a_large_table_is_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("table", MODEL, "--gpu", "l4", "--batch", "1..6", "--seq-len", "512..2048:512", "-r", "8,16")
    code, out, _ = run(capsys, *words, "--tokens", "1M", "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 48
    model = families.build_spec(sources.load_config(MODEL).config, model_id=MODEL)
    for row in random.Random(1).sample(rows, 4):
        given = {key: row[key] for key in sweep.NUMBERS}
        training = stacks.to_training_spec(stacks.resolve("custom", method="qlora", given=given))
        found = predict.predict(model, training, catalog.gpu("l4"))
        assert found.time is not None
        unsplit = dict(found.breakdown.ledger).get("unsplit blocks", 0)
        assert row["allocated_bytes"] == found.allocated.expected - unsplit  # live memory, as the caption says
        assert row["step_s"] == pytest.approx(found.time.step_s.expected, rel=1e-9)
        made = cost.plan(
            found.time, catalog.gpu("l4"), cost.Amount(tokens=1e6), micro_batch_size=given["micro_batch_size"],
            seq_len=given["seq_len"], price=cost.cheapest(catalog.gpu("l4"), catalog.instances()),
        )  # fmt: skip
        assert row["hours"] == pytest.approx(made.hours.expected)
        assert made.usd is not None and row["usd"] == pytest.approx(made.usd.expected)


@pytest.mark.extra
def test_a_large_table_says_what_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("table", MODEL, "--gpu", "l4", "--seq-len", "64..2048:64", "--format", "json")
    document = json.loads(run(capsys, *words)[1])
    assert "live memory (without unsplit blocks) and time exact; the allocator's cache replayed in" in str(document)


@pytest.mark.extra
def test_rows_are_kept_sorted_and_turned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("table", MODEL, "--gpu", "rtx-4090,l4,a100-sxm4-80gb", "--batch", "1..10", "--tokens", "1M")
    _, out, _ = run(capsys, *words, "--where", "peak<12", "--sort", "-tokens_s", "--top", "3", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    rates = [float(row["tokens_per_s"]) for row in rows]
    assert len(rows) == 3 and rates == sorted(rates, reverse=True)
    assert all(int(row["device_bytes"]) < 12 * 2**30 for row in rows)
    _, out, _ = run(capsys, *words, "--pareto", "time,usd", "--format", "jsonl")
    front = [json.loads(line) for line in out.splitlines()]
    assert front and not any(
        a["hours"] <= b["hours"] and a["usd"] <= b["usd"] and (a["hours"], a["usd"]) != (b["hours"], b["usd"])
        for a in front for b in front
    )  # fmt: skip
    code, out, _ = run(capsys, "table", MODEL, "microsoft/phi-2", "--gpu", "l4,t4", "--pivot", "model", "gpu")
    assert code == 0 and out.splitlines()[0].split() == ["model", "l4", "t4"]
    code, _, err = run(capsys, *words, "--pivot", "model", "gpu")
    assert code == 2 and "several rows" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "nope"), "unknown GPU"),
        (("--gpu", "l4", "--batch", "1..x"), "whole numbers"),
        (("--gpu", "l4", "--where", "peak~3"), "no condition"),
        (("--gpu", "l4", "--where", "usd<3"), "need --tokens"),
        (("--gpu", "l4", "--seq-len", "1..900000", "--batch", "1..900000"), "at most"),
        (("--gpu", "l4", "--format", "parquet"), "give a file"),
        (("--gpu", "l4", "-o", "x.docx"), "unknown suffix"),
        (("--gpu", "l4", "-q", "none", "--method", "qlora"), "quantiz"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, "table", MODEL, *words)
    assert code == 2 and not out
    assert err.count("\n") == 1 and message in err


def test_grids_and_rows_from_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"model: {MODEL}\ngpu: [l4, rtx-4090]\nmicro-batch-size: 1..2\ncheckpointing: [off, full]\n")
    _, out, _ = run(capsys, "table", "--grid", str(path), "--format", "csv")
    assert out.count("\n") == 9
    path.write_text("a: &x [1]\nb: *x\n")
    code, _, err = run(capsys, "table", "--grid", str(path))
    assert code == 2 and "aliases" in err
    rows = tmp_path / "rows.csv"
    rows.write_text(f"model,gpu,batch,quantization\n{MODEL},l4,2,none\n{MODEL},t4,1,nf4\n")
    _, out, _ = run(capsys, "table", "--from", str(rows), "--format", "csv")
    found = [(row["gpu"], row["quantization"]) for row in csv.DictReader(io.StringIO(out))]
    assert found == [("l4", "none"), ("t4", "nf4")]
    rows.write_text("model,gpu,batch\nx,l4,no\n")
    code, _, err = run(capsys, "table", "--from", str(rows))
    assert code == 2 and "line 2" in err


HOSTILE = ("=cmd|' /C calc'!A0", "<script>alert(1)</script>", 'a"b\nc', "\\input{/etc/passwd}", "@SUM(1)", "`x`|y")


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(
            name.startswith("on") or (name in ("src", "href") and value != "data:,") for name, value in attrs
        )


def test_a_table_on_data_says_what_fits_says(capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", str(Path(__file__).parent.parent / "instructions.jsonl"), "--epochs", "3")
    words = ("table", MODEL, "--gpu", "l4", "--batch", "1,2", "--seq-len", "64,512", *data, "--format", "json")
    code, text, err = run(capsys, *words)
    assert code == 0, err
    rows = json.loads(text)["rows"]
    assert len(rows) == 4
    for row, (batch, limit) in zip(rows, ((1, 64), (1, 512), (2, 64), (2, 512)), strict=True):
        asked = ("fits", MODEL, "--gpu", "l4", "--batch", str(batch), "--seq-len", str(limit), *data)
        answer = json.loads(run(capsys, *asked, "--format", "json")[1])
        assert row["device_bytes"] == answer["device"]["expected"] and row["seq_len"] <= limit
        assert row["hours"] == pytest.approx(answer["run"]["hours"]["expected"], rel=1e-12)
    for wrong in (("--tokens", "1M"), ("--mean-tokens", "9"), ("--batch", "1..600")):
        assert run(capsys, *words, *wrong)[0] == 2
    assert run(capsys, "table", MODEL, "--gpu", "l4", "--padding", "packed")[0] == 2


def test_own_cards_and_a_margin(capsys: pytest.CaptureFixture[str], flat: Callable[[str], str]) -> None:
    words = ("table", MODEL, "--gpu", "l4", "--vram", "4GiB,2GiB", "--format", "json")
    plain, kept = (json.loads(run(capsys, *words, "--margin", m)[1])["rows"] for m in ("0", "50"))
    assert [row["gpu"] for row in plain] == ["l4", "4.00 GiB", "2.00 GiB"]
    assert plain[0]["headroom_bytes"] - kept[0]["headroom_bytes"] == int(catalog.gpu("l4").memory_bytes * 0.5)
    assert [row["verdict"] for row in kept] == ["fits", "does not fit", "does not fit"]
    assert plain[1]["tokens_per_s"] is None
    assert "50 % of every card" in flat(run(capsys, *words[:-2], "--margin", "50%")[1])
    assert run(capsys, *words, "--margin", "100")[0] == 2


@pytest.mark.extra
@pytest.mark.parametrize("lengths", ["512", "512..8192:256"])  # predicted one by one, and swept
def test_padding_is_paid_for(capsys: pytest.CaptureFixture[str], lengths: str) -> None:
    words = ("table", MODEL, "--gpu", "l4", "--seq-len", lengths, "--format", "json")
    whole, half = (
        json.loads(run(capsys, *words, *more)[1])["rows"][0]["hours"]
        for more in (("--tokens", "10M"), ("--tokens", "10M", "--mean-tokens", "256"))
    )
    assert half == pytest.approx(2 * whole, rel=1e-3)


def test_a_matrix_marks_what_does_not_fit(capsys: pytest.CaptureFixture[str], flat: Callable[[str], str]) -> None:
    words = ("table", MODEL, "--gpu", "l4", "--vram", "2GiB", "--batch", "1,64", "--pivot", "batch", "gpu")
    code, text, _ = run(capsys, *words)
    rows = [line.split() for line in text.splitlines()[2:4]]
    assert code == 0 and [row[2][0] for row in rows] == ["!", "!"] and rows[0][1][0].isdigit()
    assert "peak GiB (! does not fit)" in flat(text)
    for style in ("html", "latex", "markdown"):
        assert re.search(r"!\d+\.\d\d\b", run(capsys, *words, "--format", style)[1])
    (first, _) = json.loads(run(capsys, *words, "--format", "json")[1])["rows"]
    assert all(isinstance(value, int) for value in first.values())
    assert "!" not in run(capsys, *words, "--format", "csv")[1]


@pytest.mark.extra
def test_sorting_is_bounded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan_rows, "MOST_SORTED", 40)
    words = ("table", MODEL, "--gpu", "l4", "--seq-len", "64..4096:64", "--sort", "-peak", "--format", "csv")
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and "more than 40 rows to sort; add --top" in err
    assert run(capsys, *words, "--top", "3")[1].count("\n") == 4


def test_hostile_names_are_inert_in_every_format(tmp_path: Path) -> None:
    columns = ["model", "verdict", "device_bytes"]
    block = Block({}, {"model": list(HOSTILE), "verdict": ["fits"] * 6, "device_bytes": [2**30] * 6}, 6)
    rows = list(block.rows(columns))
    caption = Caption((HOSTILE[1],), {"note": HOSTILE[1]})
    out = io.StringIO()
    grid.write_streamed("csv", out, columns, [block], caption)
    read = list(csv.reader(io.StringIO(out.getvalue())))
    assert len(read) == 7 and all(row[0][0] not in "=+-@\t\r" for row in read[1:])
    out = io.StringIO()
    grid.write_streamed("jsonl", out, columns, [block], caption)
    assert [json.loads(line)["model"] for line in out.getvalue().splitlines()] == list(HOSTILE)
    parser = _Tags()
    parser.feed(grid.whole("html", columns, rows, caption))
    assert "script" not in parser.tags and "td" in parser.tags
    latex = grid.whole("latex", columns, rows, caption)
    assert "\\input" not in latex and latex.count(r"\\") == 7
    text = grid.whole("markdown", columns, rows, caption)
    assert "<script" not in text and len([line for line in text.splitlines() if line.startswith("|")]) == 8
    assert len(grid.whole("table", columns, rows, caption, 80).splitlines()) == 10
    assert len(json.loads(grid.whole("json", columns, rows, caption))["rows"]) == 6


@pytest.mark.extra
def test_parquet_holds_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    code, _, _ = run(capsys, "table", MODEL, "--gpu", "l4,t4", "--batch", "1..20", "-o", str(path))
    assert code == 0
    table = parquet.read_table(path)
    assert table.num_rows == 40 and str(table.schema.field("device_bytes").type) == "int64"


@pytest.mark.extra
@pytest.mark.parametrize("case", range(6))
def test_max_and_pick_are_brute_forces_answers(case: int) -> None:
    """Six drawn cases; benchmarks/searches.py draws 200."""
    drawn = random.Random(case)
    model, training = searches.drawn(drawn)
    cards = [gpu for gpu in catalog.gpus() if gpu.vendor == "NVIDIA" and gpu.bf16_native and gpu.compute_capability]
    if case % 2:
        gpu, values = drawn.choice(cards), list(range(1, 13))
        found = largest(model, training, gpu, "micro_batch_size", values, 0.95)
        assert found.value == searches.brute_largest(model, training, gpu, "micro_batch_size", values, 0.95)
        assert found.evaluations <= 60
        return
    some = [Candidate(gpu, cost.cheapest(gpu, catalog.instances()), training) for gpu in drawn.sample(cards, 5)]
    amount, limits = cost.Amount(tokens=2e7), Limits(hours=40.0)
    picked = pick(model, some, amount, "time", limits)
    mine = picked.answer.candidate.gpu.gpu_id if picked.answer else None
    assert mine == searches.brute_pick(model, some, amount, "time", limits)
    assert picked.evaluations <= 60
    assert len(picked.rejected) + (picked.answer is not None) == 5 and all(item.reason for item in picked.rejected)


@pytest.mark.extra
def test_the_largest_run_says_what_limits_it(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for gpu, up_to in (("rtx-4090", "32768"), ("h100", "2")):
        words = ("max", MODEL, "--gpu", gpu, "--of", "length" if up_to != "2" else "batch", "--up-to", up_to)
        code, text, _ = run(capsys, *words)
        (row,) = json.loads(run(capsys, *words, "--format", "json")[1])["rows"]
        assert code == 0 and "limit: " in text and text.count("sure to fit") == 1
        assert ("no probability" in text) == (row["limited_by"] == "allocator replay")
        seen.add(row["limited_by"])
    assert "what was tried" in seen
    tight = run(capsys, "max", MODEL, "--vram", "2GiB")
    assert tight[0] == 1 and tight[1].startswith("none: not even the smallest fits") and "0.0 % sure" in tight[1]


@pytest.mark.extra
def test_a_search_ends_where_nothing_fits_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of growing length give the answer of one over all; litgpt's chunks make many lengths many programs."""
    from planner.plan import largest as search

    model, training = searches.drawn(random.Random(3))
    values = list(range(1, 200))
    answers: list[tuple[object, ...]] = []
    for first in (2, 64, 10**6):
        monkeypatch.setattr(search, "FIRST_SWEEP", first)
        answers.append(largest(model, training, catalog.gpu("l4"), "micro_batch_size", values)[:6])
        axes = {"micro_batch_size": values, "seq_len": (512, 1024, 4096)}
        answers.append(frontier(model, training, catalog.gpu("l4"), axes))
    assert answers[:2] == answers[2:4] == answers[4:] and answers[0][1] and answers[1]
    monkeypatch.undo()
    model = families.build_spec(sources.load_config("meta-llama/Llama-3.1-8B").config, model_id="x")
    training = stacks.to_training_spec(stacks.resolve("litgpt", method="lora", given={}))
    found = largest(model, training, catalog.gpu("h100"), "seq_len", range(64, 131073, 64))
    assert found.value == 2304 and found.limit == 131072 and found.evaluations < 140


@pytest.mark.extra
def test_a_replay_that_limits_is_named() -> None:
    model = families.build_spec(sources.load_config("Qwen/Qwen2.5-7B").config, model_id="Qwen/Qwen2.5-7B")
    training = stacks.to_training_spec(stacks.resolve("custom", method="qlora", given={}))
    values = list(range(2048, 4801, 64))
    found = largest(model, training, catalog.gpu("t4"), "seq_len", values)
    assert (found.value, found.limited_by) == (3456, "allocator replay")
    above = stacks.to_training_spec(stacks.resolve("custom", method="qlora", given={"seq_len": 3520}))
    after = predict.predict(model, above, catalog.gpu("t4"))
    assert after.verdict == "too close to call"
    assert after.allocated.high < catalog.gpu("t4").rooms[2]


@pytest.mark.extra
def test_a_calibration_decides_the_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from planner.facts import calibration_files
    from planner.timing.coefficients import Coefficients, Selection, priors

    words = ("max", MODEL, "--gpu", "l4", "--up-to", "2", "--format", "json")
    picks = ("pick", MODEL, "--gpu", "l4", "--format", "json")
    before = [json.loads(run(capsys, *w)[1])["rows"][0] for w in (words, picks)]
    one = priors(catalog.gpu("l4"))
    slow = Coefficients({**one, "matmul": replace(one["matmul"], value=one["matmul"].value / 2)})
    chosen = Selection(slow, None, ())
    monkeypatch.setattr(calibration_files, "select", lambda *_: chosen)
    after = [json.loads(run(capsys, *w)[1])["rows"][0] for w in (words, picks)]
    assert after[0]["step_s"] > 1.2 * before[0]["step_s"] and after[1]["hours"] > 1.2 * before[1]["hours"]
    assert after[0]["device_bytes"] == before[0]["device_bytes"]


@pytest.mark.extra
def test_machines_with_several_cards_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pick", MODEL, "--gpu", "b200-sxm-180gb", "--provider", "aws", "--format", "json")
    (row,) = json.loads(run(capsys, *words)[1])["rows"]
    assert row["cards"] == 8 and row["reason"] == "picked: pays for 8 cards, uses one"


@pytest.mark.extra
def test_a_frontier_says_that_its_cache_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("max", MODEL, "--gpu", "l4", "--of", "batch", "--of", "rank", "--up-to", "4")
    assert "cache, estimated from a replay" in " ".join(run(capsys, *words)[1].split())
    assert "estimated" in json.loads(run(capsys, *words, "--format", "json")[1])["basis"]


@pytest.mark.extra
def test_a_frontier_has_only_corners() -> None:
    model, training = searches.drawn(random.Random(3))
    corners = frontier(
        model, training, catalog.gpu("l4"), {"micro_batch_size": (1, 2, 4, 8), "seq_len": (512, 1024, 2048, 4096)}
    )
    assert corners
    assert [c.first for c in corners] == sorted(c.first for c in corners)
    assert [c.second for c in corners] == sorted((c.second for c in corners), reverse=True)


def compared(*changes: dict[str, Any]) -> list[comparison.Compared]:
    model = families.build_spec(sources.load_config(MODEL).config, model_id="<b>$x$</b>\n=evil")
    items = []
    for number, given in enumerate(changes):
        method = given.pop("method", "qlora")
        resolved = stacks.resolve("custom", method=method, given=given)
        found = predict.predict(model, stacks.to_training_spec(resolved), catalog.gpu("l4"))
        items.append(comparison.Compared("AB"[number], found, resolved))
    return items


def test_a_comparison_adds_up() -> None:
    items = compared({}, {"method": "lora", "micro_batch_size": 2})
    for number, item in enumerate(items):
        memory = sum(part.values[number] for part in comparison.memory_parts(items))
        assert memory == item.prediction.device.expected
        assert item.prediction.time is not None
        seconds = sum(part.values[number] for part in comparison.time_parts(items))
        assert seconds == pytest.approx(item.prediction.time.step_s.expected, rel=1e-6)
    first = comparison.sentences(items)[0]
    assert "base weights +" in first and "B needs" in first


@pytest.mark.extra
def test_a_report_is_one_inert_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    items = compared({}, {"micro_batch_size": 2})
    speeds = [figures.Speed("<i>A</i>", (1, 2, 4), (10.0, 15.0, 16.0), (True, True, False))]
    pictures = figures.pictures(items, speeds)
    page = html_report.page(items, pictures, "<script>x</script>")
    parser = _Tags()
    parser.feed(page)
    assert parser.tags.count("svg") == len(pictures) == 5
    assert not {"script", "iframe", "object", "img", "b", "i"} & set(parser.tags)
    assert "default-src 'none'" in page and "url(http" not in page and "@import" not in page
    assert "<text" in page  # text of the figures stays text
    assert pictures[0].data("png").startswith(b"\x89PNG")


@pytest.mark.extra
def test_results_show_in_a_notebook() -> None:
    pandas = pytest.importorskip("pandas")
    model = families.build_spec(sources.load_config(MODEL).config, model_id=MODEL)
    training = stacks.to_training_spec(stacks.resolve("custom", method="qlora", given={}))
    axes = {"micro_batch_size": [1, 2], "seq_len": [512, 1024], "gradient_checkpointing": ["none", "full"]}
    found = sweep.sweep(model, training, catalog.gpu("l4"), axes)
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 8
    row = frame[(frame.micro_batch_size == 2) & (frame.seq_len == 512) & (frame.gradient_checkpointing == "full")]
    given = {"micro_batch_size": 2, "seq_len": 512}
    wanted = predict.predict(
        model, stacks.to_training_spec(stacks.resolve("custom", method="qlora", given=given)), catalog.gpu("l4")
    )
    assert row.allocated_bytes.item() == wanted.allocated.expected  # few cells: each is predict's
    assert row.device_bytes.item() == wanted.device.expected and row.verdict.item() == wanted.verdict
    assert found._repr_html_().count("<tr>") == 9
    assert "allocated" in wanted._repr_html_()
    with pytest.raises(PlannerError, match="unknown setting"):
        sweep.sweep(model, training, catalog.gpu("l4"), {"colour": ["red"]})


def test_tables_take_a_calibration_or_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "table", MODEL, "--gpu", "l4", "--calibration", "none", "--format", "csv")
    assert code == 0 and len(out.splitlines()) == 2
    for words in (("table", MODEL, "--gpu", "l4"), ("pick", MODEL, "--gpu", "l4"),
                  ("compare", "--model", MODEL, "--gpu", "l4", "batch=1", "batch=2")):  # fmt: skip
        code, _, err = run(capsys, *words, "--calibration", "cpu-xeon-2.8ghz")
        assert code == 2 and "was fitted on Intel" in err, words


def test_useful_tokens_cannot_exceed_the_length(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("fits", MODEL, "--gpu", "l4", "--seq-len", "512", "--rows", "100")
    code, _, err = run(capsys, *words, "--mean-tokens", "513")
    assert code == 2 and "a row has at most 512 tokens" in err
    assert run(capsys, *words, "--mean-tokens", "512", "--no-changes")[0] == 0


def test_a_cpu_has_a_process_and_no_cuda_context(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "fits", MODEL, "--gpu", "cpu", "--seq-len", "64", "--no-changes")
    assert code in (0, 1)
    assert "process" in out and "CUDA context" not in out and "nvidia-smi" not in out
