"""Which configurations to run in a time budget: one base, one change at a time, then mixed draws and repeats.

The single changes give every coefficient of the time model bursts in which its own share moves; mixed draws check the
sum. Models are real classes with random weights; cut to fewer layers where that saves time (layers are linear, and
two full-depth bursts check it).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.base.errors import PlannerError
from planner.base.records import record
from planner.device.hardware import Gpu
from planner.facts import catalog
from planner.model import families
from planner.plan.predict import predict
from planner.timing.coefficients import Coefficients, priors
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

REPEAT_EVERY = {"cuda": 6, "cpu": 3}
"""Every so many bursts an earlier one runs again: what two runs of one burst differ by. A CPU's neighbours on the host
slow whole bursts down, so that more are needed to know it."""
NF4 = QuantizationSpec(kind="nf4", double_quant=True)
INT8 = QuantizationSpec(kind="int8")
NONE = QuantizationSpec()


@record
class Burst:
    """One configuration of the grid."""

    model: str
    config: Mapping[str, Any]
    layers: int | None
    training: TrainingSpec
    repeat: bool = False

    def request(self, device: str, threads: int, steps: int, warmup: int) -> dict[str, Any]:
        """What the worker reads."""
        kind = device.partition(":")[0]
        return {
            "model": self.model, "config": dict(self.config), "layers": self.layers, "device": device,
            "device_kind": kind, "threads": threads, "training": self.training.describe(), "warmup": warmup,
            "steps": steps, "profile": True, "seed": 0,
        }  # fmt: skip


# --- CPU -----------------------------------------------------------------------------------------------------------


def _small(model_type: str, hidden: int, layers: int, vocab: int, **more: Any) -> dict[str, Any]:
    """A config small enough for steps below a second on one thread."""
    heads = hidden // 64
    groups = 2 if heads % 2 == 0 else 1
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": -(-hidden * 8 // 3 // 64) * 64,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // groups,
        "vocab_size": vocab, "max_position_embeddings": 2048, "tie_word_embeddings": False, **more,
    }  # fmt: skip


CPU_MODELS: dict[str, dict[str, Any]] = {
    "llama-384": _small("llama", 384, 3, 4096),
    "llama-256": _small("llama", 256, 4, 2048),
    "llama-640": _small("llama", 640, 2, 8192),
    "qwen2-512": _small("qwen2", 512, 2, 16384, tie_word_embeddings=True),
    "neox-384": _small("gpt_neox", 384, 3, 4096, intermediate_size=1536, hidden_act="gelu"),
    "llama-128": _small("llama", 128, 8, 1024),
}
"""Shapes of the CPU's grid."""
CPU_UNSEEN: dict[str, dict[str, Any]] = {
    "llama-448": _small("llama", 448, 3, 6144),
    "mistral-512": _small("mistral", 512, 3, 4096, sliding_window=None),
    "qwen2-320": _small("qwen2", 320, 5, 12288, tie_word_embeddings=True),
    "llama-704": _small("llama", 704, 2, 4096),
}
"""Shapes that only the checking grid has."""

_FP32: dict[str, Any] = {"autocast": "none", "base_dtype": "fp32"}


def _fp32(kind: QuantizationSpec) -> QuantizationSpec:
    return replace(kind, compute_dtype="fp32")


CPU_BASE = TrainingSpec(
    method="qlora", lora=LoraSpec(r=8), quantization=_fp32(NF4), micro_batch_size=2, seq_len=128,
    gradient_checkpointing="none", **_FP32,
)  # fmt: skip
CPU_CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama-384", {}),
    ("llama-384", {"micro_batch_size": 1, "seq_len": 32}),
    ("llama-640", {}),
    ("llama-384", {"autocast": "bf16", "base_dtype": "bf16", "quantization": NF4}),
    ("llama-256", {"seq_len": 512}),
    ("llama-384", {"method": "lora", "quantization": NONE}),
    ("llama-128", {"micro_batch_size": 1, "seq_len": 64}),
    ("llama-384", {"gradient_checkpointing": "full"}),
    ("qwen2-512", {"seq_len": 256}),
    ("llama-384", {"quantization": _fp32(INT8)}),
    ("llama-384", {"attention": "eager", "seq_len": 256}),
    ("llama-256", {"autocast": "bf16", "base_dtype": "bf16", "quantization": NF4, "seq_len": 512,
                   "micro_batch_size": 1}),
    ("llama-384", {"lora": LoraSpec(r=64)}),
    ("neox-384", {}),
    ("llama-384", {"optimizer": "adamw", "lora": LoraSpec(r=128), "micro_batch_size": 1, "seq_len": 64}),
    ("llama-384", {"lora": LoraSpec(r=16, target_modules=("attention",)), "micro_batch_size": 4}),
    ("llama-384", {"optimizer": "adamw-8bit", "lora": LoraSpec(r=64)}),
    ("llama-640", {"method": "lora", "quantization": NONE, "autocast": "bf16", "base_dtype": "bf16",
                   "micro_batch_size": 1}),
    ("llama-384", {"lora": LoraSpec(r=4, target_modules=("mlp",)), "seq_len": 256, "micro_batch_size": 1}),
    ("llama-384", {"optimizer": "sgd", "micro_batch_size": 1}),
)  # fmt: skip
"""(model, what differs from CPU_BASE)."""


def cpu_grid(seed: int = 1) -> Iterator[Burst]:
    """The single changes, then mixed draws without end."""
    for model, change in CPU_CHANGES:
        yield Burst(model=model, config=CPU_MODELS[model], layers=None, training=replace(CPU_BASE, **change))
    yield from _mixed(random.Random(seed), CPU_MODELS, (1, 2, 4), (32, 64, 128, 256))


def cpu_check(seed: int = 1001) -> Iterator[Burst]:
    """Mixed draws over shapes that the fitting grid does not have."""
    yield from _mixed(random.Random(seed), CPU_UNSEEN, (1, 2, 3), (48, 96, 192, 320))


def _mixed(
    rng: random.Random, models: Mapping[str, dict[str, Any]], batches: Sequence[int], lengths: Sequence[int]
) -> Iterator[Burst]:
    """Draws from the product of all axes."""
    while True:
        name = rng.choice(sorted(models))
        half = rng.random() < 0.25
        method: Any = rng.choice(["qlora", "qlora", "lora"])
        kind = rng.choice([NF4, NF4, INT8]) if method == "qlora" else NONE
        change: dict[str, Any] = {"autocast": "bf16", "base_dtype": "bf16"} if half else {}
        targets: tuple[str, ...] = rng.choice([("all-linear",), ("attention",), ("mlp",)])
        training = replace(
            CPU_BASE,
            method=method,
            quantization=kind if half else _fp32(kind),
            lora=LoraSpec(r=rng.choice([4, 8, 16, 32, 64]), target_modules=targets),
            micro_batch_size=rng.choice(list(batches)),
            seq_len=rng.choice(list(lengths)),
            gradient_checkpointing=rng.choice(["none", "none", "full"]),
            attention=rng.choice(["sdpa", "sdpa", "eager"]),
            optimizer=rng.choice(["adamw-fused", "adamw", "adamw-8bit", "sgd"]),
            **change,
        )
        yield Burst(model=name, config=models[name], layers=None, training=training)


# --- NVIDIA --------------------------------------------------------------------------------------------------------

GPU_MODELS: tuple[tuple[str, int], ...] = (
    ("HuggingFaceTB/SmolLM2-360M", 8), ("Qwen/Qwen2.5-1.5B", 6), ("meta-llama/Llama-3.2-3B", 6),
    ("meta-llama/Llama-3.1-8B", 4), ("mistralai/Mistral-7B-v0.1", 4), ("EleutherAI/pythia-1.4b", 6),
)  # fmt: skip
"""Catalogue models and the layers that are kept of them."""
GPU_UNSEEN: tuple[tuple[str, int | None], ...] = (
    ("Qwen/Qwen2.5-7B", 4), ("HuggingFaceTB/SmolLM2-1.7B", 6), ("Qwen/Qwen3-4B", 5), ("google/gemma-2-2b", 6),
    ("microsoft/Phi-3-mini-4k-instruct", 5), ("allenai/OLMo-2-1124-7B", 4), ("EleutherAI/pythia-2.8b", 6),
    ("Qwen/Qwen2.5-0.5B", None), ("Qwen/Qwen2.5-3B", None), ("mistralai/Mistral-7B-v0.3", None),
)  # fmt: skip
FULL_DEPTH = ("HuggingFaceTB/SmolLM2-360M", "meta-llama/Llama-3.1-8B")
GPU_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
FILL = 0.85
"""Share of the card that a burst is predicted to fill at most."""

GPU_BASE = TrainingSpec(
    method="qlora", lora=LoraSpec(r=16), quantization=NF4, micro_batch_size=1, seq_len=1024,
    gradient_checkpointing="full",
)  # fmt: skip
WORK_FLOPS_PER_S, MOST_WORK = 125e12, 8
"""A card twice as fast gets twice the base's tokens, or only its host would be measured; at most so many times."""
_LORA: dict[str, Any] = {"method": "lora", "quantization": NONE}
GPU_CHANGES: tuple[tuple[int, dict[str, Any]], ...] = (
    (3, {}),
    (1, {"micro_batch_size": 8}),
    (3, {"seq_len": 128}),
    (3, {**_LORA, "seq_len": 4096}),
    (0, {"seq_len": 128}),
    (3, {"seq_len": 4096}),
    (3, {"gradient_checkpointing": "none"}),
    (1, {**_LORA, "base_dtype": "fp32", "autocast": "none"}),
    (2, {"micro_batch_size": 8, "seq_len": 512}),
    (1, {**_LORA, "seq_len": 128, "gradient_checkpointing": "none"}),
    (4, {}),
    (3, {"quantization": INT8}),
    (1, {"attention": "eager"}),
    (5, {"seq_len": 256, "gradient_checkpointing": "none"}),
    (3, {**_LORA, "seq_len": 8192}),
    (2, {"lora": LoraSpec(r=128)}),
    (1, {"optimizer": "adamw", "lora": LoraSpec(r=256), "seq_len": 128}),
    (3, {"autocast": "none"}),
    (5, {"seq_len": 2048}),
    (3, {"lora": LoraSpec(r=8, target_modules=("attention",))}),
    (1, {"optimizer": "adamw-8bit", "lora": LoraSpec(r=256)}),
    (3, {"padded": True}),
    (2, {"optimizer": "paged-adamw-8bit", "lora": LoraSpec(r=256)}),
    (3, {"seq_len": 8192}),
    (4, {"kbit_preparation": True}),
    (0, {"micro_batch_size": 16, "seq_len": 256}),
)
"""(index into GPU_MODELS, what differs from GPU_BASE)."""


def gpu_grid(gpu: Gpu, seed: int = 1) -> Iterator[Burst]:
    """Single changes, two full-depth bursts, then mixed draws; what would not fit is passed over."""
    for place, (index, change) in enumerate(GPU_CHANGES):
        yield from _fitting(gpu, *GPU_MODELS[index], _filled(gpu, change))
        if place in (5, 11):
            yield from _fitting(gpu, FULL_DEPTH[place // 6], None, _filled(gpu, {}))
    yield from _gpu_mixed(gpu, random.Random(seed), GPU_MODELS)


def _filled(gpu: Gpu, change: Mapping[str, Any]) -> dict[str, Any]:
    """The change, with as many rows of at least the base's length as keep the card busy; short ones probe the host."""
    length = int(change.get("seq_len", GPU_BASE.seq_len))
    if "micro_batch_size" in change or length < GPU_BASE.seq_len:
        return dict(change)
    work = min(max(gpu.bf16_flops_per_s / WORK_FLOPS_PER_S, 1), MOST_WORK)
    tokens = GPU_BASE.seq_len * 2 ** round(math.log2(work))
    return {**change, "micro_batch_size": max(tokens // length, 1)}


def gpu_check(gpu: Gpu, seed: int = 1001) -> Iterator[Burst]:
    """Mixed draws over models that the fitting grid does not have."""
    yield from _gpu_mixed(gpu, random.Random(seed), GPU_UNSEEN)


def _gpu_mixed(gpu: Gpu, rng: random.Random, models: Sequence[tuple[str, int | None]]) -> Iterator[Burst]:
    while True:
        model, layers = rng.choice(list(models))
        change = {
            "micro_batch_size": rng.choice([1, 2, 4, 8]),
            "seq_len": rng.choice(list(GPU_LENGTHS)),
            "lora": LoraSpec(r=rng.choice([8, 16, 64]), target_modules=rng.choice([("all-linear",), ("attention",)])),
            "gradient_checkpointing": rng.choice(["none", "full", "full"]),
            "optimizer": rng.choice(["adamw-fused", "adamw", "adamw-8bit"]),
            **rng.choice([{}, {}, _LORA, {"quantization": INT8}]),
        }
        yield from _fitting(gpu, model, layers, change)


HISTORIES: tuple[tuple[str, int | None, dict[str, Any], str], ...] = (
    ("meta-llama/Llama-3.1-8B", None, {"micro_batch_size": 2, "seq_len": 2048}, ""),
    ("HuggingFaceTB/SmolLM2-360M", None, {"seq_len": 512, "gradient_checkpointing": "none"}, ""),
    ("meta-llama/Llama-3.1-8B", 4, {"micro_batch_size": 2, "gradient_checkpointing": "none"}, ""),
    (
        "meta-llama/Llama-3.1-8B",
        4,
        {"micro_batch_size": 2, "gradient_checkpointing": "none"},
        "expandable_segments:True",
    ),
    ("Qwen/Qwen2.5-1.5B", 6, {"method": "full", "lora": None, "quantization": NONE, "micro_batch_size": 4}, ""),
    ("mistralai/Mistral-7B-v0.1", 4, {**_LORA, "micro_batch_size": 4, "seq_len": 4096}, ""),
    ("meta-llama/Llama-3.2-3B", 6, {"quantization": INT8, "seq_len": 2048}, ""),
    ("EleutherAI/pythia-1.4b", 6, {"attention": "eager", "padded": True, "micro_batch_size": 4}, ""),
    ("Qwen/Qwen3-4B", 5, {"optimizer": "paged-adamw-8bit", "lora": LoraSpec(r=256), "seq_len": 777}, ""),
)
"""(model, layers kept, what differs from GPU_BASE, PYTORCH_ALLOC_CONF) of the runs whose allocator is recorded."""


def histories(gpu: Gpu) -> Iterator[tuple[Burst, str]]:
    """Runs whose every allocation is recorded, with the allocator's settings."""
    for model, layers, change, conf in HISTORIES:
        yield from ((burst, conf) for burst in _fitting(gpu, model, layers, change))


def _fitting(gpu: Gpu, model: str, layers: int | None, change: Mapping[str, Any]) -> Iterator[Burst]:
    """The burst if its peak is predicted to lie within the card; on cards without bf16 in fp16."""
    found = catalog.model_record(model)
    assert found is not None, model
    training = replace(GPU_BASE, **change)
    if gpu.compute_capability is not None and gpu.compute_capability < (8, 0):
        training = _in_fp16(training)
    burst = Burst(model=model, config=found.config, layers=layers, training=training)
    if peak_bytes(burst, gpu) <= FILL * gpu.free_bytes:
        yield burst


def _in_fp16(training: TrainingSpec) -> TrainingSpec:
    change: dict[str, Any] = {"quantization": replace(training.quantization, compute_dtype="fp16")}
    if training.autocast == "bf16":
        change["autocast"] = "fp16"
    if training.base_dtype == "bf16":
        change["base_dtype"] = "fp16"
    return replace(training, **change)


# --- within the budget ---------------------------------------------------------------------------------------------


def bursts(gpu: Gpu, check: bool = False, seed: int | None = None) -> Iterator[Burst]:
    """The grid of a device, in order, with repeats, without end: the harness stops when the budget is used.

    `seed` draws other mixed bursts than the usual ones.
    """
    draw = {} if seed is None else {"seed": seed}
    if gpu.synchronous:
        return with_repeats(cpu_check(**draw) if check else cpu_grid(**draw), REPEAT_EVERY["cpu"])
    return with_repeats(gpu_check(gpu, **draw) if check else gpu_grid(gpu, **draw), REPEAT_EVERY["cuda"])


def exactly(model: str, config: Mapping[str, Any], training: TrainingSpec) -> Iterator[Burst]:
    """One job and its repeats, without end."""
    burst = Burst(model=model, config=config, layers=None, training=training)
    yield burst
    while True:
        yield replace(burst, repeat=True)


def with_repeats(source: Iterator[Burst], every: int) -> Iterator[Burst]:
    """Run an earlier burst again now and then, from the first on."""
    earlier: list[Burst] = []
    repeated = 0
    for burst in source:
        earlier.append(burst)
        yield burst
        if len(earlier) % (every - 1) == 0:
            yield replace(earlier[repeated], repeat=True)
            repeated += 1


def step_seconds(burst: Burst, gpu: Gpu, coefficients: Coefficients | None = None) -> float:
    """Predicted seconds of one step; a guess of the time a burst takes."""
    from planner.model.depth import first_layers

    config = first_layers(dict(burst.config), burst.layers)
    try:
        spec = families.build_spec(config, model_id=burst.model)
        time = predict(spec, burst.training, gpu, coefficients=coefficients or priors(gpu)).time
    except PlannerError:
        return 1.0
    return float(time.step_s.expected) if time else 1.0


def peak_bytes(burst: Burst, gpu: Gpu) -> int:
    """Predicted device memory."""
    from planner.model.depth import first_layers

    config = first_layers(dict(burst.config), burst.layers)
    spec = families.build_spec(config, model_id=burst.model)
    return predict(spec, burst.training, gpu).device.expected
