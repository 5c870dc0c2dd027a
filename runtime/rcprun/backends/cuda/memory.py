"""What a model will take of the GPU's memory, and whether that fits. Knows nothing of CUDA: it is given numbers."""

from __future__ import annotations

from dataclasses import dataclass

from rcprun.errors import OutOfMemory

_FEWEST_TOKENS = 512
"""A context below this is not worth advising."""
_STEP = 256
"""Advised contexts are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that a backend asks for."""

    weights: int
    kv_cache: int
    """Of all streams."""
    tables: int
    """Of the positions' angles: like the KV cache, in proportion to the context."""
    buffers: int
    """All else: what passes write between kernels, workspaces, sampling, and what CUDA itself takes."""
    context: int
    """Tokens of each stream."""
    streams: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.tables + self.buffers

    def describe(self, free: int, size: int) -> str:
        """One line. free, size: of the GPU, in bytes, before anything is allocated."""
        return f"GPU memory: {_gib(self.total)} GiB ({self._parts()}) of {_gib(size)} GiB, {_gib(free)} free"

    def require(self, free: int) -> None:
        """Raises OutOfMemory, with what to do, where it does not fit into so many free bytes."""
        if self.total > free:
            raise OutOfMemory(
                f"GPU memory: needs {_gib(self.total)} GiB ({self._parts()}), {_gib(free)} free: {self._remedy(free)}"
            )

    def _parts(self) -> str:
        streams = f"{self.streams} × " if self.streams > 1 else ""
        return (
            f"{_gib(self.weights)} weights, {_gib(self.kv_cache)} KV cache for {streams}{self.context:,} tokens, "
            f"{_gib(self.tables + self.buffers)} buffers"
        )

    def _remedy(self, free: int) -> str:
        growing = self.kv_cache + self.tables
        fits = self.context * (free - self.weights - self.buffers) // growing // _STEP * _STEP
        if fits >= _FEWEST_TOKENS:
            return f"use -c {fits}" + (", or a smaller --parallel" if self.streams > 1 else "")
        if self.streams > 1:
            return "use a smaller --parallel"
        return "free some of it, or use --backend numpy"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f}"
