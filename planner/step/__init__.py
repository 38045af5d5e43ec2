"""The program of one training step: operations that allocate, compute and free as PyTorch's eager mode does."""
