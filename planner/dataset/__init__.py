"""Training data: reading rows, rendering templates, counting tokens, and what padding or packing makes of the lengths."""
