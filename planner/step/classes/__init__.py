"""What is known of single classes of transformers, and of frameworks with modules of their own: one file each."""
