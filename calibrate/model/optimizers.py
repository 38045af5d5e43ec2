"""The optimizers of TrainingSpec, from torch, bitsandbytes and transformers, constructed for a trace or a real step."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from calibrate.oracle.tracker import Tracker
from planner.training.optimizers import BNB_PAGED_ELEMENTS, OPTIMIZERS
from planner.training.spec import TrainingSpec


def make_optimizer(training: TrainingSpec, parameters: list[torch.nn.Parameter], tracker: Tracker | None = None) -> Any:
    """Return the optimizer; its states appear in the tracker, if there is one, when the first step makes them."""
    row = OPTIMIZERS[training.optimizer]
    module, _, name = row.made_by.rpartition(".")
    made = getattr(import_module(module), name)
    if not row.by_bitsandbytes:
        return made(parameters, lr=1e-4, **row.arguments)
    with unset_fake_temporarily():  # fill_qmap reads tensor values
        optimizer = made(parameters, lr=1e-4, **row.arguments)
        optimizer.fill_qmap()
    if tracker is not None and row.paged:
        _leaves_out_pages(optimizer, tracker)
    return optimizer


def _leaves_out_pages(optimizer: Any, tracker: Tracker) -> None:
    """Large states are in managed memory: the tracker does not count them."""
    device_buffer = optimizer.get_state_buffer

    def state_buffer(p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if p.numel() < BNB_PAGED_ELEMENTS:
            return device_buffer(p, dtype)
        with tracker.ignore():
            return device_buffer(p, dtype)

    optimizer.get_state_buffer = state_buffer
