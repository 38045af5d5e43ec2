"""Measuring on a device: bursts, recordings of the allocator, and the processes that make them."""
