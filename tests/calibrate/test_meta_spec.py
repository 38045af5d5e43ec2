"""Models outside the registry, read from transformers' class: exact shapes, peaks near the trace, honest refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import PlannerError
from planner.cli.main import cli
from planner.device.cuda_rules import Architecture
from planner.memory import walk
from planner.model.families import known_families
from planner.model.lora import trainable_lora_parameters
from planner.step import program
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec
from tests.helpers.real_models import planned_linears, planned_norms, real_linears, real_model

pytestmark = pytest.mark.oracle

pytest.importorskip("torch")
pytest.importorskip("transformers")
spec_from_class = pytest.importorskip("calibrate.model.meta_spec").spec_from_class

ROOT = Path(__file__).parent.parent.parent
SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 16000,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "cwm": {},  # windows on three layers of four
    "exaone": {"num_attention_heads": 16},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},  # layer norms, squared relu
    "persimmon": {"num_key_value_heads": 8},  # fused projection with per-head norms
    "biogpt": {"num_key_value_heads": 8},  # learned positions, scaled embedding
    "vaultgemma": {},
    "mellum": {"num_experts": 8},
    "exaone_moe": {"num_experts": 8},
    "solar_open": {"n_routed_experts": 8},
    "minicpm3": {"num_key_value_heads": 8},  # latent attention
}


def config_of(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **OWN[model_type]}


@pytest.mark.parametrize("model_type", OWN)
def test_shapes_are_those_of_the_class(model_type: str) -> None:
    """Parameters, linear modules and norms; the tie and the kernel too."""
    assert model_type not in known_families()
    config = config_of(model_type)
    spec, real = spec_from_class(config, model_id="x"), real_model(config)
    assert spec.num_parameters == sum(p.numel() for p in real.parameters())
    assert planned_linears(spec) == real_linears(real)
    modules = dict(real.named_modules())
    for path, elements in planned_norms(spec):
        assert sum(p.numel() for p in modules[path].parameters()) == elements, path
    assert spec.tied == (real.get_output_embeddings().weight is real.get_input_embeddings().weight)
    assert spec.attentions()[0].sdpa == real._supports_sdpa
    assert model_type in spec.notes[0] and "not in the registry" in spec.notes[0]


@pytest.mark.parametrize("model_type", ["cwm", "jais2", "minicpm3"])
def test_adapters_are_pefts(model_type: str) -> None:
    peft = pytest.importorskip("peft")
    config = config_of(model_type)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(real_model(config), settings, low_cpu_mem_usage=True)
    planned = trainable_lora_parameters(spec_from_class(config, model_id="x"), LoraSpec(r=4))
    assert planned == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


RUNS = (
    {"method": "qlora", "quantization": QuantizationSpec(kind="nf4"), "gradient_checkpointing": "full"},
    {"method": "lora", "gradient_checkpointing": "none"},
)


TRACE = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from calibrate.oracle.trace import trace; from planner.training.spec import training_from_dict
config, trainings = json.loads(sys.argv[1])
print(json.dumps([trace(config, training_from_dict(training)).peak_bytes for training in trainings]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["internlm3", "jais2", "solar_open"])
def test_peaks_are_those_of_the_trace(model_type: str) -> None:
    """With and without checkpointing, within 2 % of the real class under fake tensors."""
    lora = LoraSpec(r=16, target_modules=("attention",))
    trainings = [TrainingSpec(lora=lora, micro_batch_size=2, seq_len=512, **changes) for changes in RUNS]
    given = json.dumps([config_of(model_type), [training.describe() for training in trainings]])
    done = subprocess.run([sys.executable, "-c", TRACE, given], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    spec = spec_from_class(config_of(model_type), model_id="x")
    for training, real in zip(trainings, json.loads(done.stdout), strict=True):
        run = program.run(spec, training, Architecture(), full_depth=True, accumulates_in_place=False)
        assert walk.peak_bytes(run.record, block=1) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mamba", "num_hidden_layers": 2}, "MambaBlock.*state-space"),
        ({"model_type": "qwen3_next", **SIZES}, "Qwen3NextGatedDeltaNet.*state-space"),
        ({"model_type": "no-such-model"}, "neither loraplan nor transformers.*llama"),
        ({"model_type": "cwm", **SIZES, "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"model_type": "cwm", **SIZES, "hidden_size": -4}, "cannot build model_type 'cwm'"),
        ({"model_type": "cwm", **SIZES, "hidden_size": "wide"}, "cannot build model_type 'cwm'"),
        ({"model_type": "bert", "is_decoder": True}, "unknown form"),
    ],
)
def test_what_is_not_recognised_is_refused_in_one_line(config: dict[str, Any], says: str) -> None:
    with pytest.raises(PlannerError, match=says) as error:
        spec_from_class(config, model_id="x")
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_the_command_uses_it_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("cwm")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["fits", str(path), "--gpu", "t4", "--format", "json"])
    assert stop.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert any("not in the registry" in text for text in document["warnings"])
    monkeypatch.setitem(sys.modules, "calibrate.model.meta_spec", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fits", str(path), "--gpu", "t4"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "unknown model_type 'cwm'" in error and "loraplan[trace]" in error and "starcoder2" in error
