"""What the real libraries allocated, layer by layer: cases, and the script that records them (needs torch).

python -m tests.helpers.recorded_traces [NAME ...]
python -m tests.helpers.recorded_traces --apart     # only "apart" anew, from the traces that are recorded: no torch

writes tests/step/traces.json: for each case the trace's highest level and the sum of all allocations in every layer's
forward and backward, in the head and loss and in their backward, in requested bytes of the second step, and the FLOPs
of each part by torch's own count. Under "apart" stand the bytes by which the program differed from the trace when it
was recorded, where that is more than TOLERANCE: small temporaries that the program leaves out, and the few levels that
it misses. A change of either is to be explained by whoever records anew, which is due when the releases of
transformers, peft or bitsandbytes that are planned for by default change.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.oracle.cases import Case
from planner.device.cuda_rules import Architecture
from planner.model.families import build_spec
from planner.step import program
from planner.step.engine import Record
from planner.timing import step_time
from planner.training.spec import QuantizationSpec
from tests.helpers.agreement_cases import DIRECTED, GPT, INT8, KBIT, LLAMA, NF4, OPT, SIZES, TOKENS, case

if TYPE_CHECKING:
    from calibrate.oracle.result import TraceResult

FILE = Path(__file__).parent.parent / "step" / "traces.json"
SHORT: dict[str, Any] = {"seq_len": 128, "micro_batch_size": 2}
ALL = ("all-linear",)
NESTED = QuantizationSpec(kind="nf4", double_quant=True)
LATENT = {
    "model_type": "deepseek_v3", "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 256, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 8,
}  # fmt: skip
FP32_COMPUTE = QuantizationSpec(kind="nf4", compute_dtype="fp32")

MORE = (
    case("llama: dropout before adapters of every projection", LLAMA, targets=ALL, dropout=0.1, **SHORT),
    case("llama: fp32 adapters without autocast", LLAMA, targets=ALL, lora_dtype="fp32", **SHORT),
    case("llama: fp32 adapters under autocast", LLAMA, targets=ALL, lora_dtype="fp32", autocast="bf16", **SHORT),
    case("llama: eager, padded", LLAMA, attention="eager", padded=True, autocast="bf16", **SHORT),
    case("llama: memory-efficient attention with a mask", LLAMA, padded=True, seq_len=120, micro_batch_size=2),
    case("llama: every weight, fp32 logits", LLAMA, method="full", loss="full-logits-fp32", optimizer="adamw", **SHORT),
    case("llama: every weight in fp32 under autocast", LLAMA, method="full", base_dtype="fp32", autocast="bf16",
         optimizer="adamw-fused", **SHORT),
    case("llama: nf4, doubly quantized, fp32 adapters", LLAMA, targets=ALL, method="qlora", quantization=NESTED,
         lora_dtype="fp32", autocast="bf16", **SHORT),
    case("llama: nf4 with k-bit preparation, no autocast", LLAMA, targets=ALL, lora_dtype="fp32", **SHORT, **KBIT),
    case("llama: nf4 computed in fp32", LLAMA, method="qlora", quantization=FP32_COMPUTE, **SHORT),
    case("llama: int8, adapters on every projection", LLAMA, targets=ALL, method="qlora", quantization=INT8, **SHORT),
    case("llama: int8 with fp32 adapters", LLAMA, method="qlora", quantization=INT8, lora_dtype="fp32", **SHORT),
    case("llama: DoRA", LLAMA, method="dora", targets=ALL, **SHORT),
    case("llama: DoRA with dropout on nf4", LLAMA, method="dora", quantization=NF4, dropout=0.1, autocast="bf16",
         **SHORT),
    case("llama: reentrant checkpoints", LLAMA, gradient_checkpointing="full", use_reentrant=True, **SHORT),
    case("llama: offloaded checkpoints", LLAMA, gradient_checkpointing="offload", use_reentrant=False, **SHORT),
    case("qwen2: biases", SIZES | {"model_type": "qwen2"}, targets=ALL, **SHORT),
    case("qwen3: norms of q and k", SIZES | {"model_type": "qwen3", "head_dim": 64}, **SHORT),
    case("mistral: a window as long as the row", SIZES | {"model_type": "mistral", "sliding_window": 128}, **SHORT),
    case("mistral: a longer window", SIZES | {"model_type": "mistral", "sliding_window": 129}, **SHORT),
    case("gemma: weight + 1, scaled embeddings", SIZES | {"model_type": "gemma", "head_dim": 64}, **SHORT),
    case("gemma2: soft caps", SIZES | {"model_type": "gemma2", "head_dim": 64}, attention="eager", autocast="bf16",
         **SHORT),
    case("cohere: fp32 rotation, scaled logits", SIZES | {"model_type": "cohere"}, **SHORT),
    case("granite: residual multiplier", SIZES | {"model_type": "granite"}, autocast="bf16", **SHORT),
    case("nemotron: squared relu, partial rotation", SIZES | {"model_type": "nemotron"}, **SHORT),
    case("stablelm: partial rotation", SIZES | {"model_type": "stablelm", "partial_rotary_factor": 0.25}, **SHORT),
    case("phi: parallel, partial rotation", SIZES | {"model_type": "phi", "partial_rotary_factor": 0.5}, **SHORT),
    case("phi3: fused projections", SIZES | {"model_type": "phi3"}, targets=ALL, **SHORT),
    case("gpt_neox: parallel", TOKENS | {"model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 8, "intermediate_size": 2048}, autocast="bf16", **SHORT),
    case("gptj: tokens first", GPT | {"model_type": "gptj", "rotary_dim": 32}, **SHORT),
    case("opt: relu, learned positions", OPT, targets=ALL, method="full", **SHORT),
    case("mixtral: every weight", SIZES | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
         method="full", autocast="bf16", **SHORT),
    case("deepseek_v3: latent attention", SIZES | LATENT, autocast="bf16", **SHORT),
    case("granitemoe: routing weights in the hidden states' dtype", SIZES | {"model_type": "granitemoe",
         "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256}, **SHORT),
    case("starcoder2: tanh GELU with biases", SIZES | {"model_type": "starcoder2"}, **SHORT),
    case("llama: outputs in fp32 that the caller keeps", LLAMA, outputs_to_fp32=True, keeps_outputs=True,
         autocast="bf16", **SHORT),
)  # fmt: skip
CASES: dict[str, Case] = dict((*DIRECTED, *MORE))

Segments = dict[str, tuple[int, int]]
"""Segment -> (highest level, sum of what was allocated), in requested bytes."""
TOLERANCE = 2e-4
"""Share of a segment's bytes."""
PARTS = {"forward": "forward", "backward": "backward", "recomputation": "recompute"}
"""Part of the step -> its name in a trace."""


def told(segment: str) -> bool:
    """Whether a segment is compared: layers, and what is between the last layer's forward and its backward."""
    return segment.startswith("layer.") or segment in ("head and loss", "head backward")


def planned(name: str) -> Record:
    """The program's record of a case, gradients added out of place as under a trace's dispatch mode."""
    case = CASES[name]
    spec = build_spec(case.config, model_id=name)
    return program.run(spec, case.training, Architecture(), full_depth=True, accumulates_in_place=False).record


def of_program(record: Record) -> Segments:
    """The program's segments in the trace's names."""
    found: Segments = {}
    level, began = 0, False
    for segment in record.segments:
        top, made = 0, 0
        for _, size in record.events[segment.start : segment.end]:
            level += size
            if size > 0:  # a segment that only frees reaches nothing
                top, made = max(top, level), made + size
        began = began or (segment.phase == "backward" and segment.layer >= 0)
        outside = {"loss": "head and loss", "backward": "layer.0 backward" if began else "head backward"}
        name = f"layer.{segment.layer} {segment.phase}" if segment.layer >= 0 else outside.get(segment.phase, "")
        if told(name) and segment.phase in ("forward", "loss", "backward"):
            before = found.get(name, (0, 0))
            found[name] = max(before[0], top), before[1] + made
    return found


def flops_of(record: Record) -> dict[str, float]:
    """The program's FLOPs by part, fused attention doubled: torch counts what the causal mask leaves out."""
    total = dict.fromkeys(PARTS, 0.0)
    for kernel in record.kernels:
        part = step_time.part_of(record.segments[kernel.segment].phase, kernel.recomputed)
        if part in total:
            total[part] += kernel.flops * (2 if kernel.op.startswith(("flash", "efficient")) else 1)
    return total


def of_trace(result: TraceResult) -> Segments:
    """The segments of the last step of a trace."""
    from calibrate.oracle.agreement import merged
    from calibrate.oracle.result import STEPS

    found: Segments = {}
    level = 0
    for event in result.events:
        level += event.nbytes
        name = merged(event.segment)
        if event.step == STEPS and event.nbytes > 0 and told(name):
            top, made = found.get(name, (0, 0))
            found[name] = max(top, level), made + event.nbytes
    return found


def record(names: list[str]) -> None:
    """Trace the cases (all by default) and write the file; traces of cases that are not named stay as they are."""
    if names != ["--apart"]:
        from calibrate.oracle.trace import trace

    held: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"cases": {}}
    for name in () if names == ["--apart"] else names or CASES:
        result = trace(CASES[name].config, CASES[name].training, arch=Architecture())
        flops = {ours: sum(result.flops.get(theirs, {}).values()) for ours, theirs in PARTS.items()}
        held["cases"][name] = {"segments": of_trace(result), "flops": flops}
        held["versions"] = result.versions
    for name in held["cases"]:
        held["cases"][name] |= difference(held["cases"][name], planned(name))
    held["cases"] = {name: held["cases"][name] for name in CASES if name in held["cases"]}
    FILE.write_text(text_of(held), encoding="utf-8")


def difference(recorded: Mapping[str, Any], now: Record) -> dict[str, Any]:
    """What the program differs by, beyond TOLERANCE: bytes by segment (level, allocated), FLOPs by part."""
    ours, flops = of_program(now), flops_of(now)
    apart: dict[str, Any] = {}
    for segment, theirs in recorded["segments"].items():
        pair = [mine - other for mine, other in zip(ours.get(segment, (0, 0)), theirs, strict=True)]
        if any(abs(d) > TOLERANCE * other for d, other in zip(pair, theirs, strict=True)):
            apart[segment] = pair
    of_flops = {part: flops[part] - number for part, number in recorded["flops"].items()}
    return {"apart": apart, "flops_apart": {part: d for part, d in of_flops.items() if abs(d) > 1e-9 * flops[part]}}


def text_of(held: Mapping[str, Any]) -> str:
    """The file's text, one line a case: a new recording shows in a diff what changed."""
    cases = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in held["cases"].items())
    return f'{{"versions": {json.dumps(held["versions"])},\n"cases": {{\n' + ",\n".join(cases) + "\n}}\n"


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    record(sys.argv[1:])
