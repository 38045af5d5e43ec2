"""Classes that come with a checkpoint are no part of transformers: the program against traces of their own code."""

from __future__ import annotations

from typing import Any

import pytest

from planner.device import cuda_rules
from planner.memory import walk
from planner.model.families import build_spec
from planner.step import program
from planner.training import stacks
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

# Peaks in requested bytes of the second step of modeling_qwen.py (zhangningboo/Qwen-7B@1ff2086 on GitHub, a copy of the
# code published with Qwen/Qwen-7B) under calibrate's fake-tensor trace: torch 2.13.0, peft 0.21.2, bitsandbytes 0.50.2.
# Its calls of flash-attn went to aten's flash attention and to a rotary function that allocates as ApplyRotaryEmb does.
QWEN = {
    "model_type": "qwen", "hidden_size": 512, "intermediate_size": 2752, "num_attention_heads": 4, "kv_channels": 128,
    "num_hidden_layers": 4, "no_bias": True, "seq_length": 8192, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip
ALL = ("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj")
TRACED: tuple[tuple[str, str, str, bool, int, int, int, tuple[str, ...], int], ...] = (
    ("lora", "flash2", "full", False, 1, 256, 8000, ("c_attn",), 86_030_216),
    ("lora", "flash2", "none", False, 1, 256, 8000, ("c_attn",), 104_878_568),
    ("lora", "eager", "full", False, 1, 256, 8000, ("c_attn",), 86_030_216),
    ("lora", "eager", "none", False, 1, 250, 1000, ("c_attn",), 69_029_832),
    ("lora", "flash2", "none", False, 2, 256, 1000, ALL, 107_708_024),
    ("qlora", "flash2", "full", False, 1, 512, 1000, ALL, 51_908_736),
    ("qlora", "eager", "full", True, 2, 384, 1000, ALL, 63_746_680),
    ("full", "flash2", "full", False, 1, 256, 1000, (), 154_658_048),
)


def training(method: str, targets: tuple[str, ...], **rest: Any) -> TrainingSpec:
    lora = LoraSpec(
        r=8, lora_dropout=0.05, target_modules=targets, dtype="fp32" if method == "qlora" else "bf16"
    ) if targets else None  # fmt: skip
    quantization = QuantizationSpec(kind="nf4", double_quant=True) if method == "qlora" else QuantizationSpec()
    values: dict[str, Any] = {"method": method, "lora": lora, "quantization": quantization, **rest}
    return TrainingSpec(optimizer="adamw", outputs_to_fp32=True, **values)


@pytest.mark.parametrize("case", TRACED, ids=lambda case: "-".join(map(str, case[:7])))
def test_first_generation_qwen_equals_its_own_code(case: Any) -> None:
    method, attention, checkpointing, reentrant, batch, length, vocab, targets, traced = case
    spec = build_spec({**QWEN, "vocab_size": vocab}, model_id="qwen")
    settings = training(
        method, targets, attention=attention, gradient_checkpointing=checkpointing, use_reentrant=reentrant,
        micro_batch_size=batch, seq_len=length, padded=True,
    )  # fmt: skip
    run = program.run(spec, settings, cuda_rules.Architecture(), full_depth=True, accumulates_in_place=False)
    # the figures were traced before the trace knew cuBLASLt's workspaces: c_attn has a bias
    threads = cuda_rules.cublaslt_handles(biased=True, recomputes=checkpointing != "none")
    found = walk.peak_bytes(run.record, block=1) - threads * cuda_rules.CUBLASLT_WORKSPACE_BYTES
    assert found == pytest.approx(traced, rel=2e-4)


def test_logits_of_first_generation_qwen_stay_16_bit() -> None:
    """Logits 2 V, log_softmax 2 V and autocast's copy of it 4 V, then the trainer's fp32 copy of the outputs 4 V."""
    spec = build_spec({**QWEN, "vocab_size": 100_000}, model_id="qwen")
    settings = training("lora", ("c_attn",), attention="flash2", micro_batch_size=1, seq_len=512, padded=False)
    found = walk.breakdown(program.run(spec, settings, cuda_rules.Architecture()).record)
    logits = dict(found.ledger)["logits and loss"] / (512 * 100_000)
    assert found.moment.phase == "loss"
    assert 12 <= logits < 12.2


def test_an_old_torch_writes_a_padded_mask_out_for_every_head() -> None:
    """torch 2.1 expands a mask to all heads before it pads it to 16 columns; an aligned length needs no copy."""
    spec = build_spec({**QWEN, "vocab_size": 1000}, model_id="qwen")

    def activations(length: int, torch: tuple[int, int]) -> int:
        settings = training(
            "lora", ("c_attn",), attention="eager", gradient_checkpointing="none", micro_batch_size=1, seq_len=length
        )
        arch = cuda_rules.Architecture(torch=torch)
        return walk.breakdown(program.run(spec, settings, arch).record).peak_allocated_bytes

    heads, layers, row = 4, 4, 2 * 496 * 496
    assert activations(495, (2, 1)) - activations(495, (2, 13)) == pytest.approx((heads - 1) * layers * row, rel=0.01)
    assert activations(496, (2, 1)) == activations(496, (2, 13))


def test_ms_swift_of_2023_checkpoints_without_reentry() -> None:
    """Its wrapper of torch.utils.checkpoint; with bitsandbytes before 0.43 every 4-bit product then keeps its input."""
    spec = build_spec({**QWEN, "vocab_size": 1000}, model_id="qwen")

    def peak(releases: dict[str, str], stack: str) -> int:
        given = {"versions": releases, "r": 8, "target_modules": "c_attn", "seq_len": 512, "attention": "flash2"}
        resolved = stacks.resolve(stack, method="qlora", given={**given, "gradient_accumulation_steps": 1})
        run = program.run(spec, stacks.to_training_spec(resolved), cuda_rules.Architecture(bitsandbytes=(0, 41)))
        return walk.peak_bytes(run.record)

    old = {"torch": "2.1", "transformers": "4.36", "peft": "0.6", "bitsandbytes": "0.41"}
    settings = stacks.resolve("ms-swift", method="qlora", given={"versions": old})
    assert settings["use_reentrant"] is False
    assert stacks.resolve("ms-swift", method="qlora", given={"versions": {**old, "transformers": "4.38"}})[
        "use_reentrant"
    ]
    assert stacks.resolve("hf-trainer", method="qlora", given={"versions": old})["use_reentrant"]
    # inputs of c_attn, c_proj, w1 and w2 (one tensor) and mlp.c_proj, 2 bytes each, of every layer but the running one
    kept = 2 * 512 * (3 * 512 + 1376)
    later = {**old, "bitsandbytes": "0.43"}
    assert peak(old, "ms-swift") - peak(later, "ms-swift") >= 3 * kept
