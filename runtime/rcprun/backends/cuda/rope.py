"""From the fused q|k|v linear to queries for attention and quantized keys and values in the cache. Launches rope.cu,
rope_many.cu and rope_lanes.cu.

Shape suffixes: M tokens, C channels (q, k and v: H + 2G heads of D), H heads, G KV heads, D head_dim, T positions,
R rows of the linear.
"""

from __future__ import annotations

import cupy
import numpy as np
from numpy.typing import NDArray

from rcpformat import arithmetic
from rcpformat.architecture import Architecture
from rcpformat.hadamard import hadamard_factor, paley_matrix
from rcpformat.spec import ceil_div
from rcprun.backends.cuda.kvcache import KVCache
from rcprun.backends.cuda.launch import check, kernel

MAX_HEAD_DIM = 1024
_WARPS = 4
_LANES_CHANNELS = 512
"""Of neighbouring heads that a warp of rope_lanes.cu does together."""
_LANES_TOKENS = 4
"""That it does one after the other: the layer's scales are read once."""


class Rope:
    """SPEC.md, "Attention", steps 2 to 5, for all layers: the RoPE tables and the Hadamard matrix on the GPU.

    While decoding, attention.Decode takes them and does these steps itself.
    """

    def __init__(self, architecture: Architecture, inv_freq: NDArray[np.float64], context: int, *, r3: bool) -> None:
        """context: positions to come. r3: whether heads of q and k are rotated."""
        a = architecture
        assert a.head_dim <= MAX_HEAD_DIM
        self._heads, self._kv_heads, self._head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        self.eps = np.float32(a.rms_norm_eps)
        tables = arithmetic.rope_tables(np.arange(context), inv_freq, a.rope_attention_factor)
        self.cos_T2, self.sin_T2 = map(cupy.asarray, tables)
        plan = hadamard_factor(a.head_dim)
        self.norm = np.float32(plan.norm)
        self.paley = cupy.asarray(paley_matrix(plan.m)) if r3 and plan.m > 1 else None
        self._by_lanes = a.head_dim in (32, 64, 128, 256, 512)
        self.hadamard = (("PALEY", plan.m if r3 else 0), ("HADAMARD", plan.block))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.cos_T2.nbytes + self.sin_T2.nbytes + (0 if self.paley is None else self.paley.nbytes))

    def __call__(
        self,
        qkv_MC: cupy.ndarray,
        position_M: cupy.ndarray,
        slot_M: cupy.ndarray,
        cache: KVCache,
        layer: int,
        kv_clip: NDArray[np.float32],
        q_MC: cupy.ndarray,
        qk_gain: tuple[cupy.ndarray, cupy.ndarray] | None = None,
    ) -> None:
        """Write the queries, (M, H * D) float32, to q_MC, and keys and values into the cache at (slot, position).

        qkv_MC: float32. position_M, slot_M: int32, no two rows alike. kv_clip: of key and value, on the host.
        qk_gain: float32 (D,) of q and of k, where the architecture has qk_norm.
        """
        check(qkv_MC, "qkv", np.float32, (len(q_MC), (self._heads + 2 * self._kv_heads) * self._head_dim))
        rest = position_M, slot_M, cache, layer, kv_clip, q_MC, qk_gain
        self._launch("rope", self._grid(len(q_MC)), (qkv_MC,), (), *rest)

    def from_sums(
        self,
        sum_MR: cupy.ndarray,
        x_scale_M: cupy.ndarray,
        scale_R: cupy.ndarray,
        bias_R: cupy.ndarray | None,
        position_M: cupy.ndarray,
        slot_M: cupy.ndarray,
        cache: KVCache,
        layer: int,
        kv_clip: NDArray[np.float32],
        q_MC: cupy.ndarray,
        qk_gain: tuple[cupy.ndarray, cupy.ndarray] | None = None,
    ) -> None:
        """The same where the linear's output is integer sums, as of gemm.Gemm, with scales and biases of rows."""
        count, rows = sum_MR.shape
        check(sum_MR, "sums", np.int32, (len(q_MC), rows))
        check(x_scale_M, "x_scale", np.float32, (count,))
        check(scale_R, "scale of rows", np.float32, (rows,))
        assert rows >= (self._heads + 2 * self._kv_heads) * self._head_dim
        sums = sum_MR, x_scale_M, scale_R, bias_R
        rest = position_M, slot_M, cache, layer, kv_clip, q_MC, qk_gain
        if self._by_lanes:
            kinds = (self._heads, self._kv_heads, self._kv_heads)
            groups = sum(ceil_div(heads * self._head_dim, _LANES_CHANNELS) for heads in kinds)
            grid = ceil_div(count, _LANES_TOKENS), ceil_div(groups, _WARPS), 1
            self._launch("rope_lanes", grid, sums, (np.int32(count), np.int32(rows)), *rest)
        else:
            self._launch("rope_many", self._grid(count), sums, (np.int32(rows),), *rest)

    def _launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        qkv: tuple[cupy.ndarray | None, ...],
        sizes: tuple[np.int32, ...],
        position_M: cupy.ndarray,
        slot_M: cupy.ndarray,
        cache: KVCache,
        layer: int,
        kv_clip: NDArray[np.float32],
        q_MC: cupy.ndarray,
        qk_gain: tuple[cupy.ndarray, cupy.ndarray] | None,
    ) -> None:
        """rope.cu, or rope_many.cu or rope_lanes.cu, to which qkv comes as sums, with sizes of its own."""
        count, width = len(q_MC), self._head_dim
        check(q_MC, "q", np.float32, (count, self._heads * width))
        for what, array in (("position", position_M), ("slot", slot_M)):
            check(array, what, np.int32, (count,))
        defines = (("HEAD_DIM", width), ("BITS", cache.bits), *self.hadamard)
        kernel(name, name, defines).launch(
            grid,
            32 * _WARPS,
            (
                *qkv,
                *self.gains(qk_gain),
                self.cos_T2,
                self.sin_T2,
                position_M,
                slot_M,
                self.paley,
                q_MC,
                cache.key_NGTB[layer],
                cache.value_NGTB[layer],
                cache.scale_NGT2[layer],
                *sizes,
                *map(np.int32, (self._heads, self._kv_heads, cache.capacity)),
                self.eps,
                self.norm,
                *map(np.float32, kv_clip),
            ),
            overlap=True,
        )

    def _grid(self, count: int) -> tuple[int, int, int]:
        """Of a warp to a head."""
        return count, ceil_div(self._heads + 2 * self._kv_heads, _WARPS), 1

    def gains(self, qk_gain: tuple[cupy.ndarray, cupy.ndarray] | None) -> tuple[cupy.ndarray | None, ...]:
        """As kernels take them."""
        if qk_gain is None:
            return (None, None)
        return tuple(check(gain, "qk_gain", np.float32, (self._head_dim,)) for gain in qk_gain)
