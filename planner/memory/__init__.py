"""Bytes alive over a step, and what the allocator makes of them."""
