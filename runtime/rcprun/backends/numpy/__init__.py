"""The NumPy backend: runs on any CPU, and is what the other backends are compared with."""

from rcprun.backends.numpy.backend import NumpyBackend

__all__ = ["NumpyBackend"]
