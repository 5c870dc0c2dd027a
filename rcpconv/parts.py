"""What a decoder is made of: the parts of an original, a training and a baked model. Knows nothing of their use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rcpconv.layers import (
    ActivationQuantizer,
    BakedLinear,
    BakedTable,
    ComputeOptions,
    FixedClip,
    FloatLinear,
    FloatTable,
    HeadMatrix,
    KVQuantizer,
    QuantLinear,
    QuantTable,
)
from rcpconv.quantizers import Learning, weight_quantizer
from rcpformat import codec, spec
from rcpformat.architecture import Architecture, Quantization


class Parts(Protocol):
    """Supplies the pluggable modules of a Decoder, by the names of SPEC.md, section 7."""

    def linear(self, name: str) -> nn.Module:
        """The linear called e.g. "layers.0.attn.q"."""

    def activation(self, layer: int, site: int) -> nn.Module:
        """The quantizer in front of a linear; site indexes spec.ACTIVATION_SITES."""

    def kv(self, layer: int, site: int) -> nn.Module:
        """The quantizer of keys (0) or values (1)."""

    def norm_size(self) -> int | None:
        """Size of the RMSNorm gains, None when they are folded."""

    def table(self, name: str) -> nn.Module:
        """The "embed" or "head" table."""

    def head_matrix(self) -> nn.Module:
        """What turns a shared table's input where a rotation was learned."""


@dataclass(frozen=True, kw_only=True)
class FloatParts:
    """Parts of an unquantized model; with_gains False for one whose norms are folded."""

    architecture: Architecture
    with_gains: bool

    def linear(self, name: str) -> nn.Module:
        """See Parts."""
        kind = spec.linear_kind(name)
        return FloatLinear(spec.linear_shape(self.architecture, kind), spec.has_bias(self.architecture, kind))

    def activation(self, layer: int, site: int) -> nn.Module:
        """See Parts."""
        return nn.Identity()

    def kv(self, layer: int, site: int) -> nn.Module:
        """See Parts."""
        return nn.Identity()

    def norm_size(self) -> int | None:
        """See Parts."""
        return self.architecture.hidden_size if self.with_gains else None

    def table(self, name: str) -> nn.Module:
        """See Parts."""
        return FloatTable(self.architecture.vocab_size, self.architecture.hidden_size)

    def head_matrix(self) -> nn.Module:
        """See Parts."""
        size = self.architecture.hidden_size
        return FloatLinear((size, size), bias=False)


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """Parts of a model in quantization-aware training."""

    architecture: Architecture
    quantization: Quantization
    options: ComputeOptions
    a_clip: float = 0.9
    kv_clip: float = 0.95
    learning: Learning | None = None

    def linear(self, name: str) -> nn.Module:
        """See Parts."""
        kind = spec.linear_kind(name)
        shape = spec.linear_shape(self.architecture, kind)
        quantizer = weight_quantizer(self.quantization.method, shape, self.quantization.group_of(name), self.learning)
        return QuantLinear(shape, spec.has_bias(self.architecture, kind), quantizer, self.options)

    def activation(self, layer: int, site: int) -> nn.Module:
        """See Parts."""
        return ActivationQuantizer(self.quantization.a_bits, self.a_clip)

    def kv(self, layer: int, site: int) -> nn.Module:
        """See Parts."""
        return KVQuantizer(self.quantization.kv_bits, self.kv_clip)

    def norm_size(self) -> int | None:
        """See Parts."""
        return None

    def table(self, name: str) -> nn.Module:
        """See Parts."""
        bits = self.quantization.embed_bits if name == "embed" else self.quantization.head_bits
        return QuantTable(self.architecture.vocab_size, self.architecture.hidden_size, bits, self.options)

    def head_matrix(self) -> nn.Module:
        """See Parts."""
        return HeadMatrix(self.architecture.hidden_size)


@dataclass(frozen=True, kw_only=True)
class BakedParts:
    """Parts of a model as the file holds it. tensor: gives the array of a name of SPEC.md, section 7."""

    architecture: Architecture
    quantization: Quantization
    options: ComputeOptions
    tensor: Callable[[str], NDArray[Any]]

    def _get(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.tensor(name)))

    def linear(self, name: str) -> nn.Module:
        """See Parts."""
        kind = spec.linear_kind(name)
        k = spec.linear_shape(self.architecture, kind)[1]
        group = self.quantization.group_of(name)
        integers = codec.decode_integers(self.tensor(name + ".codes"), self.tensor(name + ".levels"), group, k)
        bias = self._get(name + ".bias") if spec.has_bias(self.architecture, kind) else None
        return BakedLinear(torch.from_numpy(integers), self._get(name + ".scale"), bias, self.options)

    def activation(self, layer: int, site: int) -> nn.Module:
        """See Parts."""
        clips = self._get(spec.layer_prefix(layer) + "act_clip")
        return FixedClip(self.quantization.a_bits, clips[site], "activation")

    def kv(self, layer: int, site: int) -> nn.Module:
        """See Parts."""
        clips = self._get(spec.layer_prefix(layer) + "kv_clip")
        return FixedClip(self.quantization.kv_bits, clips[site], "kv")

    def norm_size(self) -> int | None:
        """See Parts."""
        return None

    def table(self, name: str) -> nn.Module:
        """See Parts."""
        bits = self.quantization.embed_bits if name == spec.EMBED else self.quantization.head_bits
        scale = self._get(name + ".scale") if bits == 8 else None
        return BakedTable(self._get(name + ".weight"), scale, self.options)

    @torch.no_grad()
    def head_matrix(self) -> nn.Module:
        """See Parts."""
        matrix = HeadMatrix(self.architecture.hidden_size)
        matrix.weight.copy_(self._get(spec.HEAD_MATRIX))
        return matrix
