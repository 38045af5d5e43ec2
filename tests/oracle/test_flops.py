"""FLOPs of the program against torch.utils.flop_counter on the real models under fake tensors, part by part."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("torch")
for _library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(_library)

from calibrate.oracle.cases import shrunk  # noqa: E402
from calibrate.oracle.trace import trace  # noqa: E402
from planner.device.cuda_rules import Architecture  # noqa: E402
from planner.model.families import build_spec  # noqa: E402
from planner.step import program  # noqa: E402
from planner.timing import step_time  # noqa: E402
from planner.training.spec import LoraSpec, TrainingSpec  # noqa: E402

pytestmark = pytest.mark.oracle

FAMILIES = (
    "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-1.5B", "openai-community/gpt2-medium",
    "google/gemma-2-2b", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V2-Lite",
    "tiiuae/falcon-7b", "bigscience/bloom-7b1",
)  # fmt: skip
EXACT = 1e-9
WITHIN: dict[str, float] = {"deepseek-ai/DeepSeek-V2-Lite": 0.005}
"""torch counts the backward of attention with unequal head sizes product by product; the program by the forward's."""
PARTS = {"forward": "forward", "backward": "backward", "recomputation": "recompute"}


def counted(config: dict[str, Any], training: TrainingSpec) -> dict[str, float]:
    """torch's own count of a micro batch."""
    found = trace(config, training).flops
    return {ours: float(sum(found.get(theirs, {}).values())) for ours, theirs in PARTS.items()}


def planned(name: str, config: dict[str, Any], training: TrainingSpec) -> dict[str, float]:
    """The program's, with fused attention doubled: torch counts what the causal mask leaves out."""
    record = program.run(build_spec(config, model_id=name), training, Architecture(), full_depth=True).record
    total = dict.fromkeys(PARTS, 0.0)
    for kernel in record.kernels:
        part = step_time.part_of(record.segments[kernel.segment].phase, kernel.recomputed)
        if part in total:
            total[part] += kernel.flops * (2 if kernel.op.startswith(("flash", "efficient")) else 1)
    return total


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_those_torch_counts(name: str, method: Any, checkpointing: Any) -> None:
    warnings.filterwarnings("ignore")
    config = shrunk(name, 2, 32000)
    experts = any(layer.experts for layer, _ in build_spec(config, model_id=name).distinct_layers())
    training = TrainingSpec(
        method=method,
        lora=LoraSpec(r=8, target_modules=("attention",) if experts else ("all-linear",)) if method == "lora" else None,
        micro_batch_size=2,
        seq_len=128,
        gradient_checkpointing=checkpointing,
        use_reentrant=False,
        autocast="bf16" if method == "lora" else "none",
    )
    ours, theirs = planned(name, config, training), counted(config, training)
    assert theirs["forward"] > 0
    assert theirs["backward"] > 0
    assert (theirs["recomputation"] > 0) == (checkpointing == "full")
    for part, number in theirs.items():
        assert ours[part] == pytest.approx(number, rel=WITHIN.get(name, EXACT)), part
