"""What a measuring process imports before it is forked."""

from __future__ import annotations

from typing import Any


def preload() -> tuple[Any, ...]:
    """Import what takes seconds and makes no CUDA context, so that a process that waits is not on the GPU.

    PEFT imports bitsandbytes, which asks CUDA for its capability; what both need is imported here.
    """
    import accelerate
    import scipy.stats
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.profiler
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto
    import transformers.quantizers.auto

    return accelerate, scipy, torch, transformers
