"""What must hold for every model and setting: growth adds memory, checkpointing does not, order does not matter.

Exceptions are allowed only where the libraries make them, and each is shown on the library itself.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import PlannerError
from planner.device.cuda_rules import CUBLASLT_WORKSPACE_BYTES, Architecture
from planner.facts import catalog
from planner.memory import walk
from planner.model.depth import DEPTH_KEYS, lists_layers
from planner.model.families import build_spec
from planner.model.spec import ModelSpec
from planner.plan.predict import predict
from planner.step import program
from planner.training.choices import CHOICES
from planner.training.optimizers import BNB_MIN_8BIT_ELEMENTS, BNB_PAGED_ELEMENTS
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

ROOT = Path(__file__).parent.parent.parent
ARCH = Architecture()
CONFIGS = {
    name: dict(record.config)
    for name in catalog.model_ids()
    if (record := catalog.model_record(name)) is not None
    and record.config.get("model_type") not in ("t5", "mt5")  # refused: not decoder-only
}


def built(name: str, **changes: int) -> ModelSpec:
    return build_spec({**CONFIGS[name], **changes}, model_id=name)


def peak(spec: ModelSpec, training: TrainingSpec) -> int:
    return int(walk.peak_bytes(program.run(spec, training, ARCH).record))


def drawn(rng: random.Random) -> TrainingSpec:
    """Any setting of the command line."""
    method: Any = rng.choice(CHOICES["method"])
    kind: Any = rng.choice([k for k in CHOICES["quantization"] if k != "none"]) if method == "qlora" else "none"
    four_bit = kind in ("nf4", "fp4")
    lora = LoraSpec(
        r=rng.choice([4, 16, 64]),
        lora_dropout=rng.choice([0.0, 0.1]),
        target_modules=(rng.choice(["all-linear", "attention", "mlp"]),),
        use_dora=method == "dora",
        dtype=rng.choice(["fp32", "bf16"]),  # type: ignore[arg-type]
    )
    one_of: dict[str, Any] = {
        "gradient_checkpointing": CHOICES["checkpointing"], "attention": CHOICES["attention"],
        "autocast": ("none", "bf16"), "optimizer": CHOICES["optimizer"], "loss": CHOICES["loss"],
        "kernels": ("none", "none", "liger", "unsloth"), "use_reentrant": (True, False), "padded": (True, False),
        "keeps_outputs": (True, False), "outputs_to_fp32": (True, False), "micro_batch_size": (1, 2, 4),
        "seq_len": (64, 512, 1536, 4096), "gradient_accumulation_steps": (1, 4),
    }  # fmt: skip
    return TrainingSpec(
        method=method,
        lora=None if method == "full" else lora,
        quantization=QuantizationSpec(kind=kind, double_quant=four_bit and rng.random() < 0.5),
        kbit_preparation=method == "qlora" and rng.random() < 0.5,
        **{key: rng.choice(values) for key, values in one_of.items()},
    )


def cases(number: int, seed: int) -> list[tuple[str, TrainingSpec]]:
    """Draw that many combinations of a catalogue model and settings that the libraries accept."""
    rng = random.Random(seed)
    found: list[tuple[str, TrainingSpec]] = []
    while len(found) < number:
        name, training = rng.choice(sorted(CONFIGS)), drawn(rng)
        try:
            program.run(built(name), training, ARCH)
        except PlannerError:
            continue
        found.append((name, training))
    return found


def grown(name: str, training: TrainingSpec) -> list[tuple[str, ModelSpec, TrainingSpec]]:
    """What is larger in one way each; left out are the ways in which the libraries' own rules may give memory back."""
    spec, config = built(name), CONFIGS[name]
    change = dataclasses.replace
    out = [
        ("batch", spec, change(training, micro_batch_size=training.micro_batch_size + 1)),
        ("length", spec, change(training, seq_len=training.seq_len + 1)),
        ("twice the length", spec, change(training, seq_len=training.seq_len * 2)),
    ]
    # larger tensors may leave the GPU (paged) or get narrower states (8-bit): test_small_tensors_...
    if training.lora is not None and "paged" not in training.optimizer and "8bit" not in training.optimizer:
        ranks = (training.lora.r + 1, training.lora.r * 2)
        out += [(f"rank {r}", spec, change(training, lora=change(training.lora, r=r))) for r in ranks]
    # the fused loss makes its chunks shorter when the vocabulary is larger (Liger's power of two)
    if "vocab_size" in config and training.loss != "fused":
        out += [("vocabulary", built(name, vocab_size=config["vocab_size"] + more), training) for more in (1, 8192)]
    depth = next((key for key in DEPTH_KEYS if key in config), None)
    if depth and not lists_layers(config):
        out.append(("layers", built(name, **{depth: config[depth] + 1}), training))
    return out


@pytest.mark.parametrize("seed", range(6))
def test_memory_never_decreases(seed: int) -> None:
    """Batch, length, rank, vocabulary and depth only ever add allocated memory: 60 models and settings."""
    for name, training in cases(10, seed):
        base = peak(built(name), training)
        for what, spec, larger in grown(name, training):
            assert peak(spec, larger) >= base, (name, what, training)


TABLES = ("positions", "rotary_tables", "attention_mask")


@pytest.mark.parametrize("seed", range(6))
def test_checkpointing_does_not_increase_the_peak(seed: int) -> None:
    """Except by the rotary tables and the mask, which a checkpoint's closure holds to the end of the backward.

    And by the cuBLASLt workspace of autograd's thread, where it recomputes linears with a bias.
    """
    for name, training in cases(10, 100 + seed):
        spec = built(name)
        without = program.run(spec, dataclasses.replace(training, gradient_checkpointing="none"), ARCH).record
        tables = sum(n for i, n in without.events if n > 0 and without.ops[i] in TABLES)
        for mode in ("full", "offload"):
            checkpointed = peak(spec, dataclasses.replace(training, gradient_checkpointing=mode))
            most = walk.peak_bytes(without) + walk.rounded(tables) + CUBLASLT_WORKSPACE_BYTES
            assert checkpointed <= most, (name, training)


@pytest.mark.oracle
@pytest.mark.slow
def test_the_libraries_keep_the_tables_of_a_checkpoint_longer() -> None:
    """The exception above on the real libraries: full fine-tuning peaks at the last gradient, tables still alive."""
    pytest.importorskip("torch")
    script = (
        "import json, warnings; warnings.filterwarnings('ignore')\n"
        "from calibrate.oracle.trace import trace\n"
        "from planner.training.spec import TrainingSpec\n"
        f"config = json.loads({json.dumps(json.dumps({**CONFIGS['EleutherAI/pythia-70m'], 'num_hidden_layers': 2}))})\n"
        "for mode in ('none', 'full'):\n"
        "    training = TrainingSpec(method='full', optimizer='adamw-fused', autocast='none', seq_len=64,\n"
        "                            gradient_checkpointing=mode, use_reentrant=True)\n"
        "    found = trace(config, training)\n"
        "    alive = found.live_at(found.peak_event)\n"
        "    print(json.dumps([found.peak_bytes, sum(b.nbytes for b in alive if 'rotary_emb' in b.module)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (without, buffers), (with_it, held) = (json.loads(line) for line in done.stdout.splitlines())
    assert 0 < held - buffers <= with_it - without - CUBLASLT_WORKSPACE_BYTES < 10_000


@pytest.mark.oracle
def test_small_tensors_keep_wide_states_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exceptions of 8-bit and paged optimizers are bitsandbytes' own limits."""
    torch = pytest.importorskip("torch")
    optimizers = pytest.importorskip("bitsandbytes.optim.optimizer")
    optim = pytest.importorskip("bitsandbytes.optim")
    dtypes = []
    for elements in (BNB_MIN_8BIT_ELEMENTS - 1, BNB_MIN_8BIT_ELEMENTS):
        leaf = torch.nn.Parameter(torch.zeros(elements))
        leaf.grad = torch.zeros(elements)
        optimizer = optim.AdamW8bit([leaf])
        optimizer.init_state(optimizer.param_groups[0], leaf, 0, 0)
        dtypes.append(optimizer.state[leaf]["state1"].dtype)
    assert dtypes == [torch.float32, torch.uint8]

    def paged(*shape: int, **_: Any) -> Any:
        return torch.zeros(1, device="meta")

    monkeypatch.setattr(optimizers.F, "get_paged", paged)
    monkeypatch.setattr(optimizers.F, "fill", lambda *_: None)
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: "on the GPU")
    optimizer = optim.PagedAdamW([torch.nn.Parameter(torch.zeros(1))])
    found = []
    for elements in (BNB_PAGED_ELEMENTS - 1, BNB_PAGED_ELEMENTS):
        on_gpu = types.SimpleNamespace(
            device=types.SimpleNamespace(type="cuda"), shape=(elements,), numel=lambda n=elements: n
        )
        found.append(optimizer.get_state_buffer(on_gpu))
    assert found[0] == "on the GPU" and found[1].device.type == "meta"


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["tiiuae/falcon-7b", "Qwen/Qwen3-30B-A3B", "HuggingFaceTB/SmolLM2-135M"])
def test_what_bitsandbytes_leaves_alone(name: str) -> None:
    """Why QLoRA of a falcon or of experts is no smaller than LoRA: bitsandbytes converts neither."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    replace_linears = pytest.importorskip("transformers.integrations.bitsandbytes").replace_with_bnb_linear
    sizes = {**dict.fromkeys(DEPTH_KEYS, 2), "num_experts": 8}
    config = {**CONFIGS[name], **{key: value for key, value in sizes.items() if key in CONFIGS[name]}}
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(settings)
    replace_linears(real, ["lm_head"], transformers.BitsAndBytesConfig(load_in_4bit=True))
    converted = sum(type(module).__name__ == "Linear4bit" for module in real.modules())
    spec = build_spec(config, model_id=name)
    assert converted == sum(x.cls != "subclass" for layer in spec.layers for x in layer.linears)


def test_an_answer_does_not_depend_on_the_others() -> None:
    """30 predictions are the same to the byte in any order."""
    questions = cases(30, 7)
    cards = [catalog.gpu(name) for name in ("t4", "rtx-4090", "h100-sxm5-80gb")]

    def ask(index: int) -> dict[str, Any]:
        name, training = questions[index]
        answer = predict(built(name), training, cards[index % len(cards)])
        parts = ("allocated", "reserved", "device", "verdict", "breakdown", "trainable_parameters", "warnings")
        return {part: getattr(answer, part) for part in parts}

    forwards = [ask(index) for index in range(len(questions))]
    backwards = [ask(index) for index in reversed(range(len(questions)))]
    assert forwards == backwards[::-1]
