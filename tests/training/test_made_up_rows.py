"""A made-up optimizer, quantization, loss, set of kernels, framework and setting, each added by one row of its table.

A copy of the house gets one row for each, nothing else, and must then know them wherever it knows the others: options,
aliases, importers, exporters, bytes, passes, launches, sweeps, JSON. What a row cannot give is refused in words.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.extra

ROOT = Path(__file__).resolve().parent.parent.parent

ROWS: dict[str, tuple[tuple[str, str], ...]] = {
    "planner/training/optimizers.py": (
        ('    "sgd",\n]', '    "sgd",\n    "made-up",\n    "nameless",\n]'),
        (
            "}  # fmt: skip\n\nOPTIMIZERS = ",
            """    "made-up": {
        **_BNB, "state_tensors": 3, "state_layout": "blocks-of-8-bit", "cpu_passes": None, "unpaged": "",
        "eight_bit": "", "paged_eight_bit": "adamw-8bit", "launches": 7, "transformers_name": "made_up_8bit",
        "transformers_aliases": ("made_up",), "aliases": ("mu",), "made_by": "bitsandbytes.optim.MadeUp8bit",
        "kernel_words": ("made_up",), "step_counter_bytes": 0,
    },
    "nameless": {
        **_FOREACH_ADAMW, "passes": 40, "transformers_name": "", "aliases": (), "from_transformers": False,
        "made_by": "torch.optim.Nameless", "entrenar_name": "",
    },
}  # fmt: skip

OPTIMIZERS = """,
        ),
    ),
    "planner/training/quantizations.py": (
        ('"gptq8", "awq4"]', '"gptq8", "awq4", "xf4", "gptq3"]'),
        (
            '        ("awq4", QuantizationRow(',
            """        ("xf4", QuantizationRow(
            storing="blocks-of-4-bit", bits=4, by_bitsandbytes=True, keeps_column_groups=False, warm_up_half_bytes=1,
            bnb_4bit_type="xfloat4", better="nf4", aliases=("x4",),
        )),
        ("gptq3", QuantizationRow(
            storing="groups", bits=3, by_bitsandbytes=False, keeps_column_groups=True, warm_up_half_bytes=None,
            bnb_4bit_type="", better="", aliases=(),
        )),
        ("awq4", QuantizationRow(""",
        ),
    ),
    "planner/training/losses.py": (
        ('"chunked", "fused"]', '"chunked", "fused", "cut"]'),
        (
            '        ("fused", LossRow(',
            '        ("cut", LossRow(logits="never", upcasts=False)),\n        ("fused", LossRow(',
        ),
        ('"unsloth", "fms-fused"]', '"unsloth", "fms-fused", "hand-made"]'),
        (
            '        ("liger", KernelSet(',
            """        ("hand-made", KernelSet(
            fuses_rotary=True, fuses_norms=True, norm_grad_in_place=True, fuses_swiglu=True, fuses_lora=False,
            loss_grad_in_place=False, upcasts_logits=False, offloads_aside=False, doubt=0.125,
            transformers_argument="use_hand_made", llama_factory_argument="enable_hand_made",
            axolotl_values={"hand_made": True}, default_loss="cut",
        )),
        ("liger", KernelSet(""",
        ),
    ),
    "planner/training/stacks.py": (
        (
            'STACKS = Rows("stack"',
            '''_stack(
    "home-made",
    (
        _d("r", 24, "home-made 1.0 config.py"),
        _d("optimizer", "made-up", "home-made 1.0 config.py"),
        _d("kernels", "hand-made", "home-made 1.0 config.py"),
    ),
    notes=("home-made trains on Sundays only",),
    read="home-made 1.0",
    torch_adamw="adamw-fused",
    transformers_code=True,
    splits_fused=False,
)

STACKS = Rows("stack"''',
        ),
    ),
    "planner/training/spec.py": (
        ("    keeps_outputs: bool = False\n", "    rest_days: int = 2\n    keeps_outputs: bool = False\n"),
    ),
    "planner/training/settings.py": (
        (
            '    "keeps_outputs": {\n',
            """    "rest_days": {
        **_LOSS, "field": "rest_days", "place": 9, "flags": ("--rest-days",), "kind": Whole(low=0, high=7),
        "defaults": (_if(3, optimizer="made-up"), Default(2)), "help": "Days of the week without a step.",
        "column": "rest_days", "column_words": {},
    },
    "keeps_outputs": {
""",
        ),
    ),
}
"""File -> (text, the same with a row more). The field of TrainingSpec is what the made-up setting fills."""

MODEL = "meta-llama/Llama-3.2-1B"
FITS = ("fits", MODEL, "--gpu", "l4", "--no-changes", "--format", "json")
HAND = ("--kernels", "hand-made", "--optimizer", "mu", "-q", "x4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("fits", "--help"),
    "known": (*FITS, "--kernels", "liger", "--loss", "fused", "-q", "nf4", "--optimizer", "adamw-8bit"),
    "rows": (*FITS, "--kernels", "hand-made", "--loss", "cut", "-q", "xf4", "--optimizer", "made-up"),
    "aliases": (*FITS, *HAND),
    "transformers": (*FITS, "--optimizer", "made_up_8bit"),
    "gptq3": (*FITS, "-q", "gptq3"),
    "gptq4": (*FITS, "-q", "gptq4"),
    "nameless": (*FITS, "--optimizer", "nameless"),
    "adamw": (*FITS, "--optimizer", "adamw"),
    "stack": (*FITS, "--stack", "home-made"),
    "explain": ("fits", MODEL, "--gpu", "l4", "--no-changes", "--stack", "home-made", "--explain"),
    "setting": (*FITS, "--rest-days", "5"),
    "too high": ("fits", MODEL, "--rest-days", "8"),
    "table": ("table", MODEL, "--gpu", "l4", "--rest-days", "0,7", "--optimizer", "sgd,mu", "--format", "json"),
    "from trl": ("fits", "--from", "trl.yaml", "--gpu", "l4", "--no-changes", "--format", "json"),
    "from home": ("fits", "--from", "home.yaml", "--gpu", "l4", "--no-changes", "--format", "json"),
    "lint": ("lint", "trl.yaml", "--gpu", "l4", "--format", "json"),
    "validate": ("validate", "table.csv", "--rows", "--format", "json"),
    "trl": ("export", "trl", MODEL, "-q", "xf4", "--optimizer", "made-up"),
    "peft": ("export", "peft", MODEL, *HAND),
    "axolotl": ("export", "axolotl", MODEL, *HAND),
    "llama-factory": ("export", "llama-factory", MODEL, *HAND),
    "entrenar": ("export", "entrenar", MODEL, *HAND),
    "trl nameless": ("export", "trl", MODEL, "--optimizer", "nameless"),
    "trl gptq3": ("export", "trl", MODEL, "-q", "gptq3"),
}
FILES = {
    "trl.yaml": f"""
model_name_or_path: {MODEL}
dataset_name: x
use_peft: true
load_in_4bit: true
bnb_4bit_quant_type: xfloat4
optim: made_up
use_hand_made: true
max_length: 512
""",
    "home.yaml": f"home_model: {MODEL}\nhome_rest: 6\n",
    "data/frameworks/home-made.json": json.dumps(
        {
            "title": "home-made config", "stack": "home-made", "rank": 1, "source": "home-made 1.0",
            "versions": "home-made 1.0", "recognise": [{"home_model": "*"}], "model": [{"from": "home_model"}],
            "options": {"rest_days": [{"from": "home_rest"}]},
        }
    ),
}  # fmt: skip

DRIVER = """
import csv, json, sys
from click.testing import CliRunner
from planner.facts.measurements import COLUMNS, ENUMERATIONS
with open("table.csv", "w", encoding="utf-8", newline="") as file:
    row = {"id": "a", "source": "s", "model": "MODEL", "framework": "home-made", "method": "qlora",
           "quantization": "xf4", "loss": "cut", "optimizer": "made-up", "kernels": "hand-made", "rest_days": "4",
           "seq_len": "512", "micro_batch": "1", "gpu": "l4", "outcome": "ok", "confidence_memory": "A",
           "allocated_bytes_low": "1000000000", "allocated_bytes_high": "9000000000"}
    writer = csv.DictWriter(file, COLUMNS, restval="")
    writer.writeheader()
    writer.writerow(row)
from planner.cli.main import cli
found = {}
for name, args in json.load(sys.stdin).items():
    done = CliRunner().invoke(cli, args)
    found[name] = [done.exit_code, done.stdout, done.stderr]

import itertools
from planner.facts import catalog, sources
from planner.memory import walk
from planner.model import families
from planner.plan import predict, sweep
from planner.plan.published_rows import row_options
from planner.step import program
from planner.step.architecture import architecture
from planner.training import stacks

model, card = families.build_spec(sources.load_config("MODEL").config, model_id="MODEL"), catalog.gpu("l4")


def run(training):
    return program.run(model, training, architecture(card, training), full_depth=True).record


def spec_of(**given):
    method = "qlora" if "quantization" in given else "lora"
    return stacks.to_training_spec(stacks.resolve("custom", method=method, given=given))


found["sweep"] = []
for given in (
    {"optimizer": "made-up", "quantization": "xf4", "kernels": "hand-made"},
    {"optimizer": "nameless", "quantization": "gptq3", "loss": "cut"},
):
    training = spec_of(**given)
    axes = sweep.Axes(micro_batch_size=(1, 3), seq_len=(500, 512), r=(4, 24), gradient_accumulation_steps=(1,))
    cells = sweep.Sweeper(model, axes).cells(training, [card])
    for place in itertools.product(*map(range, cells.allocated_bytes.shape)):
        one = sweep.at(cells, place[1:])
        record = program.run(model, one, architecture(card, one)).record
        clock = predict._time(record, one, card, None).step_s.expected
        found["sweep"].append([int(cells.allocated_bytes[place]), walk.breakdown(record).peak_allocated_bytes,
                               float(cells.step_s[place]), clock])
found["static"] = {q: walk.breakdown(run(spec_of(quantization=q))).static_bytes for q in ("gptq3", "gptq4")}
for name in ("made-up", "nameless"):
    kernels = [k for k in run(spec_of(optimizer=name, max_grad_norm=0.0)).kernels if k.op == "optimizer"]
    found[name] = [sum(k.bytes for k in kernels), sum(k.count for k in kernels)]
found["published"] = {k: str(v) for k, v in row_options({**dict.fromkeys(COLUMNS, ""), **row}).items()}
json.dump(found, sys.stdout)
""".replace("MODEL", MODEL)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the house with a row more in each table answers: [exit code, stdout, stderr] of every command."""
    house = tmp_path_factory.mktemp("house")
    for folder in ("planner", "data"):
        shutil.copytree(ROOT / folder, house / folder)
    for name, changes in ROWS.items():
        text = (house / name).read_text(encoding="utf-8")
        for before, after in changes:
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        (house / name).write_text(text, encoding="utf-8")
    for name, text in FILES.items():
        (house / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(COMMANDS), capture_output=True, text=True, check=False,
        cwd=house, env={**os.environ, "PYTHONPATH": str(house), "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def settings_of(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    code, out, err = found[name]
    assert code in (0, 1), (name, out, err)
    return {key: item["value"] for key, item in json.loads(out)["configuration"].items()}


def allocated(found: Mapping[str, Any], name: str) -> int:
    return int(json.loads(found[name][1])["allocated"]["expected"])


def test_every_option_knows_its_made_up_word(found: dict[str, Any]) -> None:
    code, out, _ = found["help"]
    text = "".join(out.split())
    assert code == 0
    for word in ("|made-up|nameless]", "|xf4|gptq3]", "|fused|cut]", "|fms-fused|hand-made]"):
        assert word in text, word
    assert "ms-swift,home-madeorcustom" in text
    assert "--rest-daysINTEGERDaysoftheweekwithoutastep." in text


def test_aliases_and_names_of_other_tools_mean_the_rows(found: dict[str, Any]) -> None:
    by_name, by_alias = settings_of(found, "rows"), settings_of(found, "aliases")
    assert by_name == by_alias
    assert (by_alias["optimizer"], by_alias["quantization"], by_alias["loss"]) == ("made-up", "xf4", "cut")
    assert settings_of(found, "transformers")["optimizer"] == "made-up"


RANK = 8
HIDDEN, INNER, LAYERS, KEYS = 2048, 8192, 16, 512
LEAVES = LAYERS * (9 * (RANK * HIDDEN,) + 2 * (RANK * KEYS,) + 3 * (RANK * INNER,))
"""Elements of LoRA's factors on q, k, v, o, gate, up and down of Llama-3.2-1B."""


def test_an_optimizers_states_lie_where_the_row_says(found: dict[str, Any]) -> None:
    """One state of 8 bit more than adamw-8bit, every other row a twin of a known one."""
    state = sum(-(-(n + 4 * n // 256) // 512) * 512 for n in LEAVES)
    assert state == 5_775_360
    assert allocated(found, "rows") - allocated(found, "known") == state


def test_passes_and_launches_are_the_rows(found: dict[str, Any]) -> None:
    elements = sum(LEAVES)
    assert found["nameless"][0] == 40 * 4 * elements
    assert found["made-up"] == [18 * elements + 24 * elements // 256, 7 * len(LEAVES)]


def test_a_quantizations_bits_are_the_rows(found: dict[str, Any]) -> None:
    """A bit less for every weight and for every zero point, of groups of 128."""
    elements = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER)
    assert found["static"]["gptq4"] - found["static"]["gptq3"] == elements // 8 + elements // 128 // 8


def test_a_sweep_equals_the_program(found: dict[str, Any]) -> None:
    assert len(found["sweep"]) == 16
    for swept, whole, seconds, clock in found["sweep"]:
        assert swept == whole
        assert seconds == pytest.approx(clock, rel=1e-9)


def test_a_set_of_kernels_widens_the_interval(found: dict[str, Any]) -> None:
    reasons = json.loads(found["rows"][1])["uncertainty"]
    assert {"reason": "hand-made's fused kernels are modelled coarsely", "share": 0.125} in reasons


def test_a_frameworks_defaults_come_with_their_source(found: dict[str, Any]) -> None:
    stack = json.loads(found["stack"][1])["configuration"]
    assert stack["r"] == {"value": 24, "origin": "stack home-made: home-made 1.0 config.py", "used": True}
    values = settings_of(found, "stack")
    assert (values["optimizer"], values["kernels"], values["loss"]) == ("made-up", "hand-made", "cut")
    assert values["rest_days"] == 3  # its own default with that optimizer
    code, out, _ = found["explain"]
    assert code == 0
    text = " ".join(out.split())
    assert "r = 24 [stack home-made: home-made 1.0 config.py]" in text
    assert "rest_days = 3 [loraplan default]" in text
    assert "home-made trains on Sundays only" in text


def test_a_setting_is_an_option_with_bounds_an_axis_and_a_column(found: dict[str, Any]) -> None:
    assert json.loads(found["setting"][1])["configuration"]["rest_days"]["origin"] == "given"
    assert settings_of(found, "setting")["rest_days"] == 5
    assert found["too high"][0] == 2
    assert "rest_days is 8; must be between 0 and 7" in found["too high"][2]
    code, out, _ = found["table"]
    assert code == 0
    rows = json.loads(out)["rows"]
    assert sorted((row["rest_days"], row["optimizer"]) for row in rows) == [
        (0, "made-up"), (0, "sgd"), (7, "made-up"), (7, "sgd"),
    ]  # fmt: skip
    assert found["published"]["rest_days"] == "4"


def test_configs_of_trainers_name_the_rows(found: dict[str, Any]) -> None:
    values = settings_of(found, "from trl")
    assert (values["optimizer"], values["quantization"], values["kernels"]) == ("made-up", "xf4", "hand-made")
    home = settings_of(found, "from home")
    assert (home["stack"], home["rest_days"], home["optimizer"]) == ("home-made", 6, "made-up")


def test_lint_knows_which_quantization_is_better(found: dict[str, Any]) -> None:
    traps = {trap["name"]: trap for trap in json.loads(found["lint"][1])["files"][0]["traps"]}
    assert "xf4 is as large as nf4 and less accurate" in traps["xf4"]["what"]
    assert traps["xf4"]["change"] == "bnb_4bit_quant_type: nf4"


def test_published_runs_hold_the_words(found: dict[str, Any]) -> None:
    code, out, err = found["validate"]
    assert code == 0, err
    assert json.loads(out)["verdicts"]["ok_right"] == 1
    row = found["published"]
    assert (row["stack"], row["kernels"], row["loss"]) == ("home-made", "hand-made", "cut")


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        ("trl", ("optim: made_up_8bit", "bnb_4bit_quant_type: xfloat4")),
        ("peft", ("optim='made_up_8bit'", "bnb_4bit_quant_type='xfloat4'", "use_hand_made=True")),
        ("axolotl", ("optimizer: made_up_8bit", "bnb_4bit_quant_type: xfloat4", "hand_made: true")),
        ("llama-factory", ("optim: made_up_8bit", "quantization_type: xfloat4", "enable_hand_made: true")),
        ("entrenar", ("name: adamw", "bits: 4")),
    ],
)
def test_exports_write_the_rows_names(found: dict[str, Any], target: str, lines: tuple[str, ...]) -> None:
    code, out, err = found[target]
    assert code == 0, err
    for line in lines:
        assert line in out, line
    assert "hand-made kernels, which only their own trainer has" not in err
    if target == "entrenar":
        assert "entrenar has adam, adamw and sgd; made-up becomes adamw" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trl nameless", "error: transformers' trainers have no nameless: choose another optimizer (adamw, "),
        ("trl gptq3", "error: a gptq3 base is a checkpoint of its own"),
    ],
)
def test_what_a_row_has_no_name_for_is_refused_in_words(found: dict[str, Any], name: str, message: str) -> None:
    code, out, err = found[name]
    assert (code, out) == (2, "")
    assert err.startswith(message)
