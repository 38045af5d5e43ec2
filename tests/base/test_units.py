"""A few units stand for the whole depth: peak, ledger, moment, reserved memory and time are those of every layer."""

from __future__ import annotations

from typing import Any

import pytest

from planner.device.cuda_rules import Architecture
from planner.facts import catalog, sources
from planner.memory import allocator, sequence, walk
from planner.model import families
from planner.step import program
from planner.timing import step_time
from planner.timing.coefficients import priors
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

GPU = catalog.gpu("a100-sxm4-80gb")
UNITS = {
    "meta-llama/Llama-3.1-8B": 4,
    "google/gemma-2-9b": 4,
    "google/gemma-3-12b-it": 4,
    "google/gemma-3-27b-it": 6,
    "openai/gpt-oss-20b": 4,
    "allenai/Olmo-3-1025-7B": 4,
    "deepseek-ai/DeepSeek-V2-Lite": 5,
    "HuggingFaceTB/SmolLM3-3B": 4,
}
"""Model -> units emulated: patterns of sliding and full layers, a dense layer before the experts, an odd end."""


def setting(number: int, lora: LoraSpec) -> TrainingSpec:
    """One of four settings that move the peak: checkpointed or not, at the loss, in a layer, in the optimizer step."""
    quantization, batch = QuantizationSpec(kind="nf4", double_quant=True), 2
    common: dict[str, Any] = {"method": "qlora", "lora": lora, "quantization": quantization}
    return (
        TrainingSpec(**common, micro_batch_size=batch, seq_len=1024, gradient_checkpointing="none"),
        TrainingSpec(**common, micro_batch_size=batch, seq_len=5000, use_reentrant=True),
        TrainingSpec(**common, micro_batch_size=batch, seq_len=1024, loss="fused", gradient_accumulation_steps=4),
        TrainingSpec(**common, micro_batch_size=1, seq_len=64, kbit_preparation=True, optimizer="adamw"),
    )[number]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", UNITS)
def test_units_stand_for_every_layer(name: str, number: int) -> None:
    model = families.build_spec(sources.load_config(name).config, model_id=name)
    training = setting(number, LoraSpec(r=512 if number == 3 else 16, target_modules=("attention",)))
    short = program.run(model, training, Architecture())
    whole = program.run(model, training, Architecture(), full_depth=True)
    assert len(short.layer_names) == UNITS[name]
    assert len(whole.layer_names) == model.num_layers
    assert short.trainable_parameters == whole.trainable_parameters
    ours, theirs = (walk.breakdown(run.record, run.layer_names) for run in (short, whole))
    assert ours.peak_allocated_bytes == theirs.peak_allocated_bytes
    assert ours.ledger == theirs.ledger
    assert ours.moment == theirs.moment
    seconds = [step_time.step_time(run.record, training, GPU, priors(GPU)).step_s.expected for run in (short, whole)]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-9)
    events = [sequence.expand(run.record, 2, allocator.SMALL_SIZE) for run in (short, whole)]
    assert allocator.replay(events[0]).peak_reserved == allocator.replay(events[1]).peak_reserved
