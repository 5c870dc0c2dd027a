"""A model's tensors on the GPU, and the operations that have constants of their own. Knows nothing of sequences."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from rcpformat.reader import RcpFile
from rcpformat.spec import EMBED, FINAL_GAIN, HEAD, HEAD_MATRIX, layer_prefix
from rcprun.backends.cuda.hadamard import Transform
from rcprun.backends.cuda.linear import UnitLinear


def _on_gpu(file: RcpFile, name: str) -> Any:
    return cupy.asarray(np.ascontiguousarray(file.tensor(name)))


class Layer:
    """One decoder layer: its linear layers, fused as they are launched, and its clips, which stay on the host."""

    def __init__(self, file: RcpFile, index: int) -> None:
        prefix, a = layer_prefix(index), file.architecture
        q, k, v, o, gate, up, down = (
            file.linear(prefix + name)
            for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
        )
        self.qkv, self.o, self.down = UnitLinear((q, k, v)), UnitLinear((o,)), UnitLinear((down,))
        self.gate_up = UnitLinear((gate, up), interleave=True)
        self.act_clip = file.tensor(prefix + "act_clip").copy()
        self.kv_clip = file.tensor(prefix + "kv_clip").copy()
        self.window = a.window(index)
        self.qk_gain = None
        if a.qk_norm:
            self.qk_gain = (_on_gpu(file, f"{prefix}attn.q_norm"), _on_gpu(file, f"{prefix}attn.k_norm"))

    @property
    def linears(self) -> tuple[UnitLinear, ...]:
        """In the order of their use."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(linear.nbytes for linear in self.linears)


class Weights:
    """Everything of a file that lives on the GPU."""

    def __init__(self, file: RcpFile) -> None:
        a, q = file.architecture, file.quantization
        self.layers = [Layer(file, index) for index in range(a.num_layers)]
        self.embed_VD = _on_gpu(file, f"{EMBED}.weight")
        self.embed_scale_V = _on_gpu(file, f"{EMBED}.scale") if q.embed_bits == 8 else None
        self.head_VD, self.head_scale_V = self.embed_VD, self.embed_scale_V
        self.gain_D: Any | None = None
        self.turn_DD: Any | None = None
        if a.head_matrix:
            self.turn_DD = _on_gpu(file, HEAD_MATRIX)
        elif a.tied_table:
            # rot(gain ∘ unrot(h)): the signs of both cancel, whatever they are.
            self.gain_D = _on_gpu(file, FINAL_GAIN)
            self.rotate = Transform(a.hidden_size, rotate=q.r1)
            self.unrotate = Transform(a.hidden_size, transpose=True, rotate=q.r1)
        else:
            self.head_VD = _on_gpu(file, f"{HEAD}.weight")
            self.head_scale_V = _on_gpu(file, f"{HEAD}.scale") if q.head_bits == 8 else None
        self.r4 = Transform(a.intermediate_size, rotate=q.r4)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tables = [self.embed_VD, self.embed_scale_V, self.turn_DD]
        if self.head_VD is not self.embed_VD:
            tables += [self.head_VD, self.head_scale_V]
        layers = sum(layer.nbytes for layer in self.layers)
        return layers + sum(int(table.nbytes) for table in tables if table is not None)
