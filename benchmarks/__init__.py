"""Benchmarks: how fast, how right, beside what."""
