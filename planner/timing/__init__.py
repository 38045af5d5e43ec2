"""Kernels to seconds: rates, coefficients, the time of a step."""
