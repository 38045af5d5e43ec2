"""Warnings about a training setting that the prediction itself does not show."""

from __future__ import annotations

from typing import Any

from planner.device.hardware import Gpu
from planner.model.spec import ModelSpec
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import TrainingSpec


def lacks_bf16(gpu: Gpu) -> bool:
    """Whether the card has no bf16 matrix units (NVIDIA before compute capability 8.0)."""
    capability = gpu.compute_capability
    return gpu.bf16_native is False or (capability is not None and capability < (8, 0) and gpu.vendor != "AMD")


def training_warnings(model: ModelSpec | None, training: TrainingSpec, gpu: Gpu | None) -> tuple[str, ...]:
    """Visible warnings: what the hardware lacks, and what the settings cost unnoticed (None: an unread model)."""
    notes: list[str] = []
    capability = gpu.compute_capability if gpu else None
    half = "bf16" in (training.autocast, training.base_dtype, training.quantization.compute_dtype)
    if gpu and half and lacks_bf16(gpu):
        notes.append(f"{gpu.name} has no bf16 tensor cores: use fp16 (--autocast fp16 --base-dtype fp16)")
    if {training.autocast, training.base_dtype} == {"bf16", "fp16"}:
        notes.append(
            f"autocast {training.autocast} makes a copy of every {training.base_dtype} weight it meets: "
            f"--base-dtype {training.autocast} avoids it"
        )
    own = OWN_MODULES[training.own_modules]
    if training.attention == "eager" and not own.takes_eager:
        notes.append(f"{training.own_modules}'s own modules have no eager attention: the estimate is without")
    elif training.kernels != "none" and not own.takes_kernels:
        notes.append(
            f"{training.own_modules}'s own modules have no {training.kernels} kernels: the estimate is without"
        )
    if training.attention == "flash2" and capability and capability < (8, 0):
        notes.append(f"FlashAttention-2 needs compute capability 8.0, {gpu.name if gpu else ''} has less: use sdpa")
    if model is None:
        return tuple(notes)
    experts = [layer.experts for layer, _ in model.distinct_layers() if layer.experts]
    if experts and QUANTIZATIONS[training.quantization.kind].by_bitsandbytes:
        notes.append("expert weights are fused 3-D parameters that bitsandbytes does not quantize: they stay 16-bit")
    if model.tied and training.lora and "lm_head" in training.lora.modules_to_save:
        notes.append("lm_head is tied to the embeddings: saving it as a module trains an untied copy")
    if _int(training.seq_len) > model.max_position_embeddings > 0:
        notes.append(
            f"seq_len {_int(training.seq_len)} is longer than the model's {model.max_position_embeddings} positions"
        )
    return tuple(notes)


def _int(value: Any) -> int:
    return int(value.max()) if hasattr(value, "max") else int(value)
