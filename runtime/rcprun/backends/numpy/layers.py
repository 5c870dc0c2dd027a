"""The layers of a model in NumPy: SPEC.md's arithmetic, with integer products as exact float32 ones (matrix.py).

`reference.py` beside it is the same arithmetic written plainly; tests compare the two.

Shape suffixes: M tokens, K inputs, N outputs, H query heads, G KV heads, D hidden_size (head_dim within heads),
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rcpformat import arithmetic
from rcpformat.arithmetic import Float32Array
from rcpformat.hadamard import hadamard_transform
from rcpformat.reader import RcpFile
from rcpformat.spec import EMBED, FINAL_GAIN, HEAD, HEAD_MATRIX, LEVEL_LIMIT, ROTATION_SIGNS, layer_prefix
from rcprun.backends.numpy.attention import attend
from rcprun.backends.numpy.kvcache import KEY, VALUE, KVCache
from rcprun.backends.numpy.matrix import IntegerMatrix


class Linear:
    """Linear layers with a common input, stacked along N: q|k|v, o, gate|up, or down."""

    def __init__(self, file: RcpFile, names: Sequence[str]) -> None:
        parts = [file.linear(name) for name in names]
        self._bits = file.quantization.a_bits
        integers_NK = np.concatenate([part.integers() for part in parts])
        self._matrix = IntegerMatrix(integers_NK, largest_code=2 ** (self._bits - 1))
        self._scale_N = np.concatenate([part.scale for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        self._bias_N = np.concatenate(biases) if biases else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._matrix.nbytes + self._scale_N.nbytes * (1 if self._bias_N is None else 2)

    def __call__(self, x_MK: Float32Array, clip: np.float32) -> Float32Array:
        """SPEC.md, "Activations" and "Linear": (M, N)."""
        codes_MK, scale_M1 = arithmetic.quantize_activations(x_MK, clip, self._bits)
        y_MN = self._matrix.product(codes_MK.astype(np.float32))
        y_MN *= scale_M1
        y_MN *= self._scale_N
        if self._bias_N is not None:
            y_MN += self._bias_N
        return y_MN


class DecoderLayer:
    """One layer: attention, with its keys and values in the cache, and MLP."""

    def __init__(self, file: RcpFile, index: int) -> None:
        a = file.architecture
        prefix = layer_prefix(index)
        self._index = index
        self._window = a.window(index)
        self._eps = a.rms_norm_eps
        self._heads, self._kv_heads, self._head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        self._rotate_heads, self._rotate_mlp = file.quantization.r3, file.quantization.r4
        self._qkv, self._o, self._gate_up, self._down = (
            Linear(file, [prefix + name for name in names])
            for names in (("attn.q", "attn.k", "attn.v"), ("attn.o",), ("mlp.gate", "mlp.up"), ("mlp.down",))
        )
        self._act_clip = file.tensor(prefix + "act_clip").copy()
        self._kv_clip = file.tensor(prefix + "kv_clip").copy()
        self._qk_gain_HD = None
        if a.qk_norm:
            q_gain, k_gain = (file.tensor(f"{prefix}attn.{which}_norm") for which in "qk")
            self._qk_gain_HD = np.stack([q_gain] * a.num_heads + [k_gain] * a.num_kv_heads)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(linear.nbytes for linear in (self._qkv, self._o, self._gate_up, self._down))

    def __call__(
        self, x_MD: Float32Array, rope: tuple[Float32Array, Float32Array], cache: KVCache, start: int
    ) -> Float32Array:
        """The residual (M, D) after this layer, for tokens at positions start, start + 1, … with these RoPE tables."""
        x_MD = x_MD + self._attention(x_MD, rope, cache, start)
        return x_MD + self._mlp(x_MD)

    def _attention(
        self, x_MD: Float32Array, rope: tuple[Float32Array, Float32Array], cache: KVCache, start: int
    ) -> Float32Array:
        count = len(x_MD)
        qkv_MN = self._qkv(arithmetic.rms_normalize(x_MD, self._eps), self._act_clip[0])
        qkv_MHD = qkv_MN.reshape(count, -1, self._head_dim)
        qk_MHD, v_MGD = np.split(qkv_MHD, [self._heads + self._kv_heads], axis=1)
        if self._qk_gain_HD is not None:
            qk_MHD = arithmetic.rms_normalize(qk_MHD, self._eps) * self._qk_gain_HD
        qk_MHD = arithmetic.apply_rope(qk_MHD, *rope)
        if self._rotate_heads:
            qk_MHD = hadamard_transform(qk_MHD, normalized=True)
        q_MHD, k_MGD = np.split(qk_MHD, [self._heads], axis=1)
        cache.write(self._index, KEY, start, k_MGD, self._kv_clip[0])
        cache.write(self._index, VALUE, start, v_MGD, self._kv_clip[1])
        out_MHD = attend(cache, self._index, q_MHD, start, self._window)
        return self._o(out_MHD.reshape(count, -1), self._act_clip[1])

    def _mlp(self, x_MD: Float32Array) -> Float32Array:
        gate_up_MN = self._gate_up(arithmetic.rms_normalize(x_MD, self._eps), self._act_clip[2])
        gate_MN, up_MN = np.split(gate_up_MN, 2, axis=1)
        z_MN = arithmetic.silu(gate_MN) * up_MN
        if self._rotate_mlp:
            z_MN = hadamard_transform(z_MN, normalized=True)
        return self._down(z_MN, self._act_clip[3])


class Head:
    """SPEC.md, "Head", with the rotations or the matrix of "One table" where embedding and head share theirs."""

    def __init__(self, file: RcpFile) -> None:
        tied, turned = file.architecture.tied_table, file.architecture.head_matrix
        name = EMBED if tied else HEAD
        weight_VD = file.tensor(f"{name}.weight")
        self._matrix: IntegerMatrix | None = None
        if file.quantization.head_bits == 8:
            self._matrix = IntegerMatrix(weight_VD, largest_code=LEVEL_LIMIT)
            self._scale_V = file.tensor(f"{name}.scale").copy()
        else:
            self._weight_VD = weight_VD.astype(np.float32)
        self._turn_DD = file.tensor(HEAD_MATRIX).astype(np.float32) if turned else None
        gain = tied and not turned
        self._gain_D = file.tensor(FINAL_GAIN).copy() if gain else None
        self._signs_D = file.tensor(ROTATION_SIGNS).astype(np.float32) if gain and file.quantization.r1 else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        table = self._weight_VD.nbytes if self._matrix is None else self._matrix.nbytes + self._scale_V.nbytes
        return table + (0 if self._turn_DD is None else self._turn_DD.nbytes)

    def __call__(self, h_MD: Float32Array) -> Float32Array:
        """Logits (M, V) of the normalized residual."""
        if self._turn_DD is not None:
            h_MD = _half_product(h_MD, self._turn_DD)
        elif self._gain_D is not None:
            h_MD = self._rotate(self._gain_D * self._unrotate(h_MD))
        if self._matrix is None:
            return _half_product(h_MD, self._weight_VD)
        codes_MD, scale_M1 = arithmetic.quantize_head_input(h_MD)
        logits_MV = self._matrix.product(codes_MD.astype(np.float32))
        logits_MV *= scale_M1
        logits_MV *= self._scale_V
        return logits_MV

    def _rotate(self, x_MD: Float32Array) -> Float32Array:
        return x_MD if self._signs_D is None else hadamard_transform(self._signs_D * x_MD, normalized=True)

    def _unrotate(self, x_MD: Float32Array) -> Float32Array:
        if self._signs_D is None:
            return x_MD
        return hadamard_transform(x_MD, transpose=True, normalized=True) * self._signs_D


def _half_product(x_MK: Float32Array, half_NK: Float32Array) -> Float32Array:
    """(M, N) of float16 values, widened, and inputs that are rounded to float16."""
    return x_MK.astype(np.float16).astype(np.float32) @ half_NK.T
