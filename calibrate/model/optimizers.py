"""The optimizers of TrainingSpec, from torch, bitsandbytes and transformers, constructed for a trace or a real step."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from calibrate.oracle.tracker import Tracker
from planner.training.optimizers import BNB_PAGED_ELEMENTS, OPTIMIZERS
from planner.training.spec import TrainingSpec


def make_optimizer(training: TrainingSpec, parameters: list[torch.nn.Parameter], tracker: Tracker | None = None) -> Any:
    """Return the optimizer; its states appear in the tracker, if there is one, when the first step makes them."""
    name = training.optimizer
    if name in ("adamw", "adamw-bf16-states"):
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    if name == "adamw-fused":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4, foreach=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
    return _bitsandbytes(name, parameters, tracker)


def _bitsandbytes(name: str, parameters: list[torch.nn.Parameter], tracker: Tracker | None) -> Any:
    import bitsandbytes as bnb

    kinds: dict[str, Any] = {
        "adamw-8bit": bnb.optim.AdamW8bit,
        "paged-adamw": bnb.optim.PagedAdamW32bit,
        "paged-adamw-8bit": bnb.optim.PagedAdamW8bit,
        "lion": bnb.optim.Lion,
        "lion-8bit": bnb.optim.Lion8bit,
    }
    with unset_fake_temporarily():  # fill_qmap reads tensor values
        optimizer = kinds[name](parameters, lr=1e-4)
        optimizer.fill_qmap()
    if tracker is not None and OPTIMIZERS[name].paged:
        device_buffer = optimizer.get_state_buffer

        def state_buffer(p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            if p.numel() < BNB_PAGED_ELEMENTS:
                return device_buffer(p, dtype)
            with tracker.ignore():
                return device_buffer(p, dtype)

        optimizer.get_state_buffer = state_buffer
    return optimizer
