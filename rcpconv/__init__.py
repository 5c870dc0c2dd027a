"""Converts Hugging Face LLaMA-family checkpoints to 2-bit `.rcp` files: load, rotate, train, export."""
