"""Runs `.rcp` files: NumPy and CUDA backends behind one engine. Never imports torch."""
