"""Between a trained decoder and the tensors of a file (SPEC.md, section 7), in both directions. Knows no paths."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rcpconv.errors import ExportMismatch
from rcpconv.layers import ComputeOptions, HeadMatrix, QuantLinear, QuantTable
from rcpconv.model import Decoder, DecoderLayer, LazyDecoder, OneTableInput, Piece, build_pieces
from rcpconv.parts import BakedParts
from rcpconv.proof import hash_decoded, hash_weights
from rcpformat import codec, spec
from rcpformat.architecture import Architecture, Quantization

Array = NDArray[Any]

_PROVEN_TOGETHER = len(spec.LINEARS)
"""Linears of a layer on a GPU whose weights are hashed at a time, each in its thread."""


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().contiguous().numpy()


def _linears(piece: Piece) -> Iterator[tuple[str, QuantLinear]]:
    name, module = piece
    for linear_name, linear in module.named_modules(prefix=name):
        if isinstance(linear, QuantLinear):
            yield linear_name, linear


@torch.no_grad()
def bake(decoder: Decoder) -> dict[str, Array]:
    """Every tensor of the file but the tokenizer, from a decoder in training, on the device it trained on."""
    tensors = {name: array for piece in decoder.pieces() for name, array in bake_piece(piece)}
    return {spec.INV_FREQ: _numpy(decoder.inv_freq)} | tensors


@torch.no_grad()
def bake_piece(piece: Piece) -> Iterator[tuple[str, Array]]:
    """The tensors of the file that one piece of a decoder in training becomes."""
    name, module = piece
    for linear_name, linear in _linears(piece):
        baked = linear.bake()
        yield linear_name + ".codes", codec.pack_codes(_numpy(baked.codes_NK))
        yield linear_name + ".levels", _numpy(baked.levels_NG4)
        yield linear_name + ".scale", _numpy(baked.scale_N)
        if linear.bias is not None:
            yield linear_name + ".bias", _numpy(linear.bias)
    if isinstance(module, DecoderLayer):
        attn: Any = module.attn
        mlp: Any = module.mlp
        sites = (attn.input_quantizer, attn.o_quantizer, mlp.input_quantizer, mlp.down_quantizer)
        yield name + ".act_clip", _numpy(torch.cat([site.clip for site in sites]))
        yield name + ".kv_clip", _numpy(torch.cat([attn.key_quantizer.clip, attn.value_quantizer.clip]))
        if attn.q_norm is not None:
            yield name + ".attn.q_norm", _numpy(attn.q_norm)
            yield name + ".attn.k_norm", _numpy(attn.k_norm)
    elif isinstance(module, OneTableInput):
        yield spec.FINAL_GAIN, _numpy(module.gain)
        if module.signs is not None:
            yield spec.ROTATION_SIGNS, _numpy(module.signs.to(torch.int8))
    elif isinstance(module, HeadMatrix):
        yield spec.HEAD_MATRIX, _numpy(module.bake())
    elif isinstance(module, QuantTable):
        weight, scale = module.bake()
        yield name + ".weight", _numpy(weight)
        if scale is not None:
            yield name + ".scale", _numpy(scale)


@torch.no_grad()
def weight_hashes(piece: Piece) -> dict[str, str]:
    """SHA-256 of the float32 weights (N, K), scale times integer, that the training forward of each linear uses."""
    hashes = {}
    for name, linear in _linears(piece):
        hashes[name] = hash_weights(_used_weights(linear))
    return hashes


def _used_weights(linear: QuantLinear) -> Array:
    integers, scale = linear.quantizer(linear.weight)
    return _numpy(integers * scale[:, None])


def proven_hashes(piece: Piece, baked: Mapping[str, Array]) -> dict[str, str]:
    """weight_hashes, once each linear's baked tensors were decoded and gave the same. Raises ExportMismatch.

    baked: what bake_piece gives for this piece. Of a model on a GPU, several linears are hashed side by side.
    """
    computing = threading.Lock()

    @torch.no_grad()
    def prove(name: str, linear: QuantLinear) -> tuple[str, str]:
        with computing:
            weights = _used_weights(linear)
        found = hash_weights(weights)
        packed = codec.PackedLinear(
            name=name,
            shape=(linear.weight.shape[0], linear.weight.shape[1]),
            group_size=linear.quantizer.group_size,
            codes=baked[name + ".codes"],
            levels=baked[name + ".levels"],
            scale=baked[name + ".scale"],
        )
        if hash_decoded(packed) != found:
            raise ExportMismatch(
                f"{name}: codes, levels and scale decode to other weights than the training's forward pass uses, by "
                "SHA-256; the machine erred, or rcpconv has a fault: resume the run to try again, and report it"
            )
        return name, found

    linears = dict(_linears(piece))
    on_gpu = any(linear.weight.is_cuda for linear in linears.values())
    with ThreadPoolExecutor(_PROVEN_TOGETHER if on_gpu else 1) as pool:  # on a CPU one at a time is in memory
        return dict(pool.map(prove, linears.keys(), linears.values()))


def lazy_baked(
    architecture: Architecture,
    quantization: Quantization,
    tensor: Callable[[str], Array],
    options: ComputeOptions | None = None,
) -> LazyDecoder:
    """The quantized model with fixed weights, from a run's baked tensors or an open file (`file.tensor`); eval mode."""
    options = options or ComputeOptions()
    q = quantization
    parts = BakedParts(architecture=architecture, quantization=q, options=options, tensor=tensor)

    def read(target: Tensor, name: str) -> None:
        target.copy_(torch.from_numpy(np.array(tensor(name))))

    @torch.no_grad()
    def load(name: str, module: nn.Module) -> None:
        """What BakedParts does not supply."""
        if isinstance(module, OneTableInput):
            read(module.gain, spec.FINAL_GAIN)
            if module.signs is not None:
                read(module.signs, spec.ROTATION_SIGNS)
        elif isinstance(module, DecoderLayer) and architecture.qk_norm:
            for norm in ("q_norm", "k_norm"):
                read(getattr(module.attn, norm), f"{name}.attn.{norm}")

    def pieces() -> Iterator[Piece]:
        for name, module in build_pieces(architecture, parts, r1=q.r1, r3=q.r3, r4=q.r4):
            load(name, module)
            yield name, module.requires_grad_(False).eval()

    return LazyDecoder(architecture=architecture, inv_freq=tensor(spec.INV_FREQ), pieces=pieces, options=options)


def baked_decoder(
    architecture: Architecture,
    quantization: Quantization,
    tensor: Callable[[str], Array],
    options: ComputeOptions | None = None,
) -> Decoder:
    """All of lazy_baked."""
    return lazy_baked(architecture, quantization, tensor, options).whole().eval()
