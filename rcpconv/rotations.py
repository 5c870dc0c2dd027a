"""Rotations that were learned: how they turn a model's tensors, and the file that they are kept in.

They come on top of the Hadamard rotations of rcpconv/prepare.py: x' = r1ᵀ · rot(x) on the residual stream, and
v' = r2ᵀ · H v in the value heads of a layer. Both are merged into the weights, so that no file knows of them. Knows
nothing of how they are learned (rcpconv/train/rotations.py).

Shape suffixes: C hidden_size, L layers, D head_dim, N out-features, K in-features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcpconv.errors import BadRun
from rcpconv.runs import replacing

_FROM_STREAM = ("embed", "head_input", "head", "q", "k", "v", "gate", "up")
_TO_STREAM = ("o", "down", "head_input")


@dataclass(frozen=True, kw_only=True)
class LearnedRotations:
    """Orthogonal matrices beside the Hadamard ones; None = there is no other rotation."""

    r1_CC: Tensor | None = None
    r2_LDD: Tensor | None = None
    """One for each layer, shared by its heads."""

    def turned(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the decoder by its name ("layers.3.attn.v.weight"), turned; differentiable.

        value: (N, K) weight or (N,) bias, on the matrices' device. In their dtype where it is turned, else as it is.
        """
        owner, _, part = name.rpartition(".")
        kind = owner.rpartition(".")[2]
        if part not in ("weight", "bias"):
            return value
        weight = part == "weight"
        if self.r1_CC is not None:
            if weight and kind in _FROM_STREAM:
                value = value.to(self.r1_CC.dtype) @ self.r1_CC
            if kind in _TO_STREAM:
                value = _outputs(value, self.r1_CC)
        if self.r2_LDD is not None and kind in ("v", "o"):
            r2_DD = self.r2_LDD[int(owner.split(".")[1])]
            if kind == "v":
                value = _outputs(value, r2_DD)
            elif weight:
                value = _inputs(value, r2_DD)
        return value

    def on(self, device: torch.device | str) -> LearnedRotations:
        """The same, on a device."""
        r1_CC, r2_LDD = (None if each is None else each.to(device) for each in (self.r1_CC, self.r2_LDD))
        return LearnedRotations(r1_CC=r1_CC, r2_LDD=r2_LDD)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises NotSaved."""
        found = {"r1": self.r1_CC, "r2": self.r2_LDD}
        with replacing(path) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in found.items() if value is not None}, temporary)

    @classmethod
    def load(cls, path: Path) -> LearnedRotations:
        """Read the file. Raises BadRun where it is missing or damaged."""
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BadRun(f"{path}: cannot be used ({error}); restore the file or run quantize again") from error
        return cls(r1_CC=found.get("r1"), r2_LDD=found.get("r2"))


def _inputs(weight_NK: Tensor, rotation: Tensor) -> Tensor:
    """Each block of a row that is as long as the rotation is wide, turned."""
    blocks = weight_NK.to(rotation.dtype).reshape(*weight_NK.shape[:-1], -1, len(rotation))
    return (blocks @ rotation).reshape(weight_NK.shape)


def _outputs(value: Tensor, rotation: Tensor) -> Tensor:
    """As _inputs, for the columns of a weight, or a bias."""
    return _inputs(value.T, rotation).T if value.ndim == 2 else _inputs(value, rotation)
