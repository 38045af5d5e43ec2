"""LoRA formulas as courses and other planners give them, for comparison."""
