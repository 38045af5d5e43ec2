"""The fit: recorded bursts to coefficients, and what is left over."""
