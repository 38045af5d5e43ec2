"""The agreement suite: the analytical program against the trace of the real libraries, case by case.

`python -m calibrate.agreement --cases 200` draws configurations from the product of model families, methods and
settings, runs both, and prints each difference; nothing is filtered. The program is run with the rule of a dispatch
mode (gradients are added out of place), because that is what the trace sees.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner import catalog, memory
from planner.cuda_rules import Architecture
from planner.errors import PlannerError
from planner.families import build_spec
from planner.lora import PEFT_DEFAULT_TARGETS
from planner.step import program
from planner.training import LoraSpec, QuantizationSpec, TrainingSpec

MODELS = (
    "HuggingFaceTB/SmolLM2-360M", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-0.6B", "mistralai/Mistral-7B-v0.1",
    "meta-llama/Llama-3.1-8B", "EleutherAI/pythia-410m", "facebook/opt-1.3b", "openai-community/gpt2-medium",
    "ibm-granite/granite-3.1-2b-instruct", "google/gemma-2b", "google/gemma-2-2b", "google/gemma-3-1b-it",
    "microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-1_5", "bigcode/starcoder2-3b", "tiiuae/falcon-7b",
    "stabilityai/stablelm-2-1_6b", "allenai/OLMo-2-1124-7B", "allenai/Olmo-3-1025-7B", "THUDM/glm-4-9b-chat-hf",
    "arcee-ai/AFM-4.5B", "ByteDance-Seed/Seed-OSS-36B-Instruct", "CohereLabs/c4ai-command-r-v01",
    "HuggingFaceTB/SmolLM3-3B", "swiss-ai/Apertus-8B-Instruct-2509", "bigscience/bloom-7b1", "EleutherAI/gpt-j-6b",
    "mosaicml/mpt-7b", "bigcode/gpt_bigcode-santacoder", "Qwen/Qwen3-30B-A3B", "mistralai/Mixtral-8x7B-v0.1",
    "deepseek-ai/DeepSeek-V2-Lite", "openai/gpt-oss-20b",
)  # fmt: skip
"""One catalogue model of each of 33 model types or variants."""

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
VOCABULARIES = (0, 32000, 65536, 131072, 262144)
"""0 keeps the model's own."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration: a shrunk config of a catalogue model and the training settings."""

    model_id: str
    config: dict[str, Any]
    training: TrainingSpec

    def label(self) -> str:
        t = self.training
        lora = (
            f" r{t.lora.r} p{t.lora.lora_dropout:g} {','.join(t.lora.target_modules)} {t.lora.dtype}" if t.lora else ""
        )
        return (
            f"{self.model_id} V{self.config.get('vocab_size')} {t.method} {t.quantization.kind}"
            f"{'-dq' if t.quantization.double_quant else ''}{lora} {t.micro_batch_size}x{t.seq_len}"
            f" {'kbit ' if t.kbit_preparation else ''}autocast-{t.autocast}"
            f" {t.attention}{' padded' if t.padded else ''}"
            f" ckpt-{t.gradient_checkpointing}{'-re' if t.use_reentrant else ''} {t.optimizer} {t.loss}"
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What both sides said about one case; bytes of the second step."""

    case: Case
    program_bytes: int
    trace_bytes: int
    program_place: str
    trace_place: str
    seconds: float

    @property
    def error_pct(self) -> float:
        return 100 * (self.program_bytes - self.trace_bytes) / self.trace_bytes


def shrunk(model_id: str, layers: int, vocabulary: int) -> dict[str, Any]:
    """The catalogue's config with few layers and experts, at its real widths."""
    record = catalog.model_record(model_id)
    assert record is not None, model_id
    config = dict(record.config)
    for key in LAYER_KEYS:
        if key in config:
            config[key] = layers
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:layers]
    for key in EXPERT_KEYS:
        if key in config:
            config[key] = min(config[key], 16)
    if vocabulary:
        config["vocab_size"] = vocabulary
    return config


def draw(rng: random.Random, model_id: str) -> Case:
    """Draw one case for a model from the product of the settings."""
    config = shrunk(model_id, rng.choice([2, 3]), rng.choice(VOCABULARIES))
    experts = any(key in config for key in EXPERT_KEYS)
    method: Any = rng.choice(["qlora", "qlora", "qlora", "lora", "lora", "dora", "full"])
    quantization = QuantizationSpec()
    if method == "qlora":
        kind: Any = rng.choice(["nf4", "nf4", "nf4", "int8"])
        quantization = QuantizationSpec(kind=kind, double_quant=kind == "nf4" and rng.random() < 0.5)
    lora = None
    if method != "full":
        targets: tuple[str, ...] = rng.choice([("all-linear",), ("attention",), ("mlp",), ("default",)])
        if targets == ("default",):
            targets = PEFT_DEFAULT_TARGETS.get(str(config["model_type"]), ("attention",))
        plain = experts or method == "dora"
        lora = LoraSpec(
            r=rng.choice([4, 16, 64, 256]),
            lora_dropout=0.0 if plain else rng.choice([0.0, 0.05]),
            target_modules=("attention",) if experts and targets == ("mlp",) else targets,
            dtype=rng.choice(["fp32", "bf16"]),
            use_dora=method == "dora",
        )
    length = rng.choice([64, 512, 1024, 2048, 4096])
    attention: Any = "eager" if length <= 1024 and rng.random() < 0.25 else "sdpa"
    optimizers: list[Any] = ["adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit", "sgd"]
    if method == "full":
        optimizers = ["adamw-bf16-states", "adamw-fused", "adamw-8bit", "sgd"]
    training = TrainingSpec(
        method=method,
        lora=lora,
        quantization=quantization,
        kbit_preparation=method == "qlora" and rng.random() < 0.4,
        micro_batch_size=rng.choice([1, 2, 8]) if length < 4096 else rng.choice([1, 8]),
        seq_len=length,
        gradient_checkpointing=rng.choice(["none", "full", "full"]),
        use_reentrant=rng.random() < 0.5,
        attention=attention,
        padded=rng.random() < 0.2,
        autocast="none" if method == "full" else rng.choice(["none", "bf16", "bf16"]),
        optimizer=rng.choice(optimizers),
    )
    return Case(model_id=model_id, config=config, training=training)


def cases(number: int, seed: int = 1) -> Iterator[Case]:
    """Yield `number` cases, cycling through the models."""
    rng = random.Random(seed)
    made = 0
    while made < number:
        case = draw(rng, MODELS[made % len(MODELS)])
        made += 1
        yield case


def run(case: Case, arch: Architecture | None = None) -> Outcome:
    """Run both sides of one case.

    Raises:
        PlannerError: if the configuration is not valid (the libraries refuse it too).
    """
    from calibrate.trace import trace

    arch = arch or Architecture()
    start = time.perf_counter()
    spec = build_spec(case.config, model_id=case.model_id)
    ours = program.run(spec, case.training, arch, full_depth=True, accumulates_in_place=False)
    theirs = trace(case.config, case.training, arch=arch)
    place = memory.breakdown(ours.record).moment
    peak = theirs.events[theirs.peak_event]
    return Outcome(
        case=case,
        program_bytes=int(memory.peak_bytes(ours.record, block=1)),
        trace_bytes=theirs.peak_bytes,
        program_place=f"{place.phase} {place.op}",
        trace_place=f"{peak.segment} {peak.op}",
        seconds=time.perf_counter() - start,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; exit 0 if 95 % of the cases are within 0.1 % and none beyond 1 %, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="write one JSON line per case")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    errors: list[float] = []
    failed = 0
    lines: list[str] = []
    for case in cases(options.cases, options.seed):
        try:
            found = run(case)
        except (PlannerError, ValueError, RuntimeError, AttributeError, TypeError, KeyError, AssertionError) as error:
            failed += 1
            print(f"   refused  {case.label()}: {type(error).__name__} {str(error).splitlines()[0][:110]}", flush=True)
            continue
        errors.append(found.error_pct)
        mark = " " if abs(found.error_pct) <= 0.1 else "!" if abs(found.error_pct) <= 1 else "X"
        place = f"{found.program_place} | {found.trace_place}"
        print(f"{mark} {found.error_pct:+8.3f} %  {case.label()}  [{place}]", flush=True)
        lines.append(json.dumps({"case": case.label(), "error_pct": found.error_pct, "seconds": found.seconds}))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _summary(errors, failed)


def _summary(errors: list[float], failed: int) -> int:
    if not errors:
        print("no case ran", file=sys.stderr)
        return 1
    near = sum(abs(e) <= 0.1 for e in errors)
    worst = max(errors, key=abs)
    mean = sum(abs(e) for e in errors) / len(errors)
    print(f"{len(errors)} cases, {failed} refused: {near} within 0.1 %, mean {mean:.3f} %, worst {worst:+.3f} %")
    return 0 if near >= 0.95 * len(errors) and abs(worst) <= 1 else 1


__all__ = ["Case", "Outcome", "cases", "draw", "replace", "run", "shrunk"]

if __name__ == "__main__":
    raise SystemExit(main())
