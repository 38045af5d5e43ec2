"""Training data: rows, templates, tokens, and what padding or packing makes of the lengths."""
