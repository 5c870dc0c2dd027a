"""The CUDA backend: CuPy kernels."""
