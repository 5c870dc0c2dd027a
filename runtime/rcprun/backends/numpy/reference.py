"""SPEC.md chapter 10 written down plainly: the oracle for every backend, slow and without a cache between calls.

Weights are decoded from their codes at every use, integer sums are int64, keys and values are quantized and read back,
attention goes query by query and head by head. Nothing here is shared with the fast path but rcpformat.

Shape suffixes: M tokens, K inputs, N outputs, H query heads, G KV heads, D hidden_size or head_dim, T visible tokens,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rcpformat import arithmetic
from rcpformat.arithmetic import F32, Float32Array
from rcpformat.hadamard import hadamard_transform
from rcpformat.reader import RcpFile
from rcpformat.spec import EMBED, FINAL_GAIN, HEAD, HEAD_MATRIX, INV_FREQ, ROTATION_SIGNS, layer_prefix


class ReferenceModel:
    """The model in a file, as SPEC.md's "Arithmetic" says it, over whole sequences."""

    def __init__(self, file: RcpFile) -> None:
        self.file = file
        self.architecture = file.architecture
        self.quantization = file.quantization

    def float_tensor(self, name: str) -> Float32Array:
        """A tensor of the file as float32, which represents int8, float16 and float32 exactly."""
        tensor: Float32Array = self.file.tensor(name).astype(F32)
        return tensor

    def logits(self, tokens: Sequence[int]) -> Float32Array:
        """(M, V): the logits after each token of a fresh sequence."""
        x_MD = self.embed(tokens)
        for index in range(self.architecture.num_layers):
            x_MD = self.layer(index, x_MD)
        return self.head(x_MD)

    def embed(self, tokens: Sequence[int]) -> Float32Array:
        """ "Embedding": (M, D)."""
        ids = np.asarray(tokens, dtype=np.int64)
        rows_MD = self.float_tensor(f"{EMBED}.weight")[ids]
        if self.quantization.embed_bits == 16:
            return rows_MD
        return rows_MD * self.float_tensor(f"{EMBED}.scale")[ids][:, None]

    def layer(self, index: int, x_MD: Float32Array) -> Float32Array:
        """ "Attention" and "MLP" of one layer, for tokens at positions 0, 1, …: (M, D)."""
        x_MD = x_MD + self.attention(index, x_MD)
        return x_MD + self.mlp(index, x_MD)

    def attention(self, index: int, x_MD: Float32Array) -> Float32Array:
        """What attention adds to the residual: (M, D)."""
        a, prefix = self.architecture, layer_prefix(index)
        act_clip, kv_clip = self.float_tensor(prefix + "act_clip"), self.float_tensor(prefix + "kv_clip")
        h_MD = arithmetic.rms_normalize(x_MD, a.rms_norm_eps)
        q_MHD, k_MGD, v_MGD = (
            self.linear(f"{prefix}attn.{which}", h_MD, act_clip[0]).reshape(len(x_MD), -1, a.head_dim)
            for which in "qkv"
        )
        q_MHD, k_MGD = self.position(q_MHD, f"{prefix}attn.q_norm"), self.position(k_MGD, f"{prefix}attn.k_norm")
        keys_MGD = arithmetic.quantize_kv(k_MGD, kv_clip[0], self.quantization.kv_bits).dequantize()
        values_MGD = arithmetic.quantize_kv(v_MGD, kv_clip[1], self.quantization.kv_bits).dequantize()
        out_MHD = np.empty_like(q_MHD)
        window = a.window(index) or len(x_MD)
        for i in range(len(x_MD)):
            seen = slice(max(0, i - window + 1), i + 1)
            for head in range(a.num_heads):
                group = head // (a.num_heads // a.num_kv_heads)
                score_T = (keys_MGD[seen, group] @ q_MHD[i, head]) / F32(math.sqrt(a.head_dim))
                weight_T = np.exp(score_T - score_T.max())
                out_MHD[i, head] = (weight_T / weight_T.sum()) @ values_MGD[seen, group]
        return self.linear(f"{prefix}attn.o", out_MHD.reshape(len(x_MD), -1), act_clip[1])

    def position(self, x_MHD: Float32Array, gain: str) -> Float32Array:
        """Steps 2 to 4 of "Attention" on the heads of q or k: norm with gain, RoPE, Hadamard."""
        a = self.architecture
        if a.qk_norm:
            x_MHD = arithmetic.rms_normalize(x_MHD, a.rms_norm_eps) * self.float_tensor(gain)
        positions = np.arange(len(x_MHD))
        x_MHD = arithmetic.apply_rope(
            x_MHD, *arithmetic.rope_tables(positions, self.file.tensor(INV_FREQ), a.rope_attention_factor)
        )
        return hadamard_transform(x_MHD, normalized=True) if self.quantization.r3 else x_MHD

    def mlp(self, index: int, x_MD: Float32Array) -> Float32Array:
        """What the MLP adds to the residual: (M, D)."""
        prefix = layer_prefix(index)
        act_clip = self.float_tensor(prefix + "act_clip")
        h_MD = arithmetic.rms_normalize(x_MD, self.architecture.rms_norm_eps)
        gate_MN, up_MN = (self.linear(f"{prefix}mlp.{which}", h_MD, act_clip[2]) for which in ("gate", "up"))
        z_MN = arithmetic.silu(gate_MN) * up_MN
        if self.quantization.r4:
            z_MN = hadamard_transform(z_MN, normalized=True)
        return self.linear(f"{prefix}mlp.down", z_MN, act_clip[3])

    def linear(self, name: str, x_MK: Float32Array, clip: np.float32) -> Float32Array:
        """ "Activations" and "Linear": (M, N)."""
        packed = self.file.linear(name)
        codes_MK, scale_M1 = arithmetic.quantize_activations(x_MK, clip, self.quantization.a_bits)
        sums_MN = arithmetic.integer_matmul(codes_MK, packed.integers())
        y_MN = arithmetic.scale_sums(sums_MN, scale_M1, packed.scale)
        return y_MN if packed.bias is None else y_MN + packed.bias

    def head(self, x_MD: Float32Array) -> Float32Array:
        """ "Head" of the residual after the last layer: logits (M, V)."""
        h_MD = arithmetic.rms_normalize(x_MD, self.architecture.rms_norm_eps)
        name = HEAD
        if self.architecture.tied_table:
            name = EMBED
            if self.architecture.head_matrix:
                h_MD = self.half_product(HEAD_MATRIX, h_MD)
            else:
                h_MD = self.rotate(self.float_tensor(FINAL_GAIN) * self.unrotate(h_MD))
        if self.quantization.head_bits == 16:
            return self.half_product(f"{name}.weight", h_MD)
        codes_MD, scale_M1 = arithmetic.quantize_head_input(h_MD)
        sums_MV = arithmetic.integer_matmul(codes_MD, self.file.tensor(f"{name}.weight"))
        return arithmetic.scale_sums(sums_MV, scale_M1, self.float_tensor(f"{name}.scale"))

    def half_product(self, name: str, x_MK: Float32Array) -> Float32Array:
        """(M, N) of a float16 table or matrix (N, K) and inputs that are rounded to float16 ("Head")."""
        return x_MK.astype(np.float16).astype(F32) @ self.float_tensor(name).T

    def rotate(self, x_MD: Float32Array) -> Float32Array:
        """rot(x) of "Transforms"."""
        if not self.quantization.r1:
            return x_MD
        return hadamard_transform(self.float_tensor(ROTATION_SIGNS) * x_MD, normalized=True)

    def unrotate(self, x_MD: Float32Array) -> Float32Array:
        """unrot(x) of "Transforms"."""
        if not self.quantization.r1:
            return x_MD
        return hadamard_transform(x_MD, transpose=True, normalized=True) * self.float_tensor(ROTATION_SIGNS)
