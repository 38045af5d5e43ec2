"""Copies between the card and its host: names of three rows of `planner.step.kernels.KERNELS`."""

from __future__ import annotations

HOST_TRANSFER = "host_transfer"
"""In the stream of the kernels, one after the other with them."""
OVERLAPPED_TRANSFER = "overlapped_transfer"
"""In a stream of its own beside the kernels of decoder layers."""
PAGED_TRANSFER = "paged_transfer"
"""Of managed memory: as HOST_TRANSFER where the card has no room for it, else nothing moves."""
