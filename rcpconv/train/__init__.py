"""Quantization-aware training: texts, tokens, losses, the loop, checkpoints and progress."""
