"""Models without weights: from a class of transformers on the meta device to a spec, and fake models."""
