"""The name of the architecture whose kernels a card runs."""

from __future__ import annotations

from planner.base.records import replace
from planner.device import cuda_rules
from planner.device.hardware import CPU, Gpu
from planner.step import loading
from planner.training.spec import TrainingSpec


def architecture(gpu: Gpu | None, training: TrainingSpec) -> cuda_rules.Architecture:
    """The facts about card and libraries that decide which kernels run; an A100's where nothing is known."""
    versions = training.versions
    if gpu is not None and gpu.vendor == CPU:
        return replace(cuda_rules.Architecture.plain(), torch=versions.torch, bitsandbytes=versions.bitsandbytes)
    capability = (gpu.compute_capability if gpu is not None else None) or (8, 0)
    return cuda_rules.Architecture(
        capability=capability,
        num_sms=(gpu.sm_count if gpu else 0) or 108,
        torch=versions.torch,
        bitsandbytes=versions.bitsandbytes,
        warmup_limit=loading.warmup_limit(gpu.rooms[1], versions.transformers) if gpu is not None else 0,
        cudnn_attention=cuda_rules.prefers_cudnn_attention(capability, versions.torch),
    )
