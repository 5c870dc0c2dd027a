"""Between a trained decoder and the tensors of a file (SPEC.md, section 7), in both directions. Knows no paths."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcpconv.layers import ComputeOptions, QuantLinear, QuantTable
from rcpconv.model import Decoder
from rcpconv.parts import BakedParts
from rcpformat import codec, spec
from rcpformat.architecture import Architecture, Quantization

Array = NDArray[Any]


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().contiguous().numpy()


def _linears(decoder: Decoder) -> Iterator[tuple[str, QuantLinear]]:
    for name, module in decoder.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


@torch.no_grad()
def bake(decoder: Decoder) -> dict[str, Array]:
    """Every tensor of the file but the tokenizer, from a decoder in training, on the device it trained on."""
    a = decoder.architecture
    out: dict[str, Array] = {spec.INV_FREQ: _numpy(decoder.inv_freq)}
    for name, linear in _linears(decoder):
        baked = linear.bake()
        out[name + ".codes"] = codec.pack_codes(_numpy(baked.codes_NK))
        out[name + ".levels"] = _numpy(baked.levels_NG4)
        out[name + ".scale"] = _numpy(baked.scale_N)
        if linear.bias is not None:
            out[name + ".bias"] = _numpy(linear.bias)
    for i, layer in enumerate(decoder.layers):
        prefix = spec.layer_prefix(i)
        attn: Any = layer.attn
        mlp: Any = layer.mlp
        sites = (attn.input_quantizer, attn.o_quantizer, mlp.input_quantizer, mlp.down_quantizer)
        out[prefix + "act_clip"] = _numpy(torch.cat([site.clip for site in sites]))
        out[prefix + "kv_clip"] = _numpy(torch.cat([attn.key_quantizer.clip, attn.value_quantizer.clip]))
        if a.qk_norm:
            out[prefix + "attn.q_norm"], out[prefix + "attn.k_norm"] = _numpy(attn.q_norm), _numpy(attn.k_norm)
    tables: list[tuple[str, Any]] = [(spec.EMBED, decoder.embed)]
    if a.tied_table:
        head_input: Any = decoder.head_input
        out[spec.FINAL_GAIN] = _numpy(head_input.gain)
        if head_input.signs is not None:
            out[spec.ROTATION_SIGNS] = _numpy(head_input.signs.to(torch.int8))
    else:
        tables.append((spec.HEAD, decoder.head))
    for name, table in tables:
        assert isinstance(table, QuantTable), name
        weight, scale = table.bake()
        out[name + ".weight"] = _numpy(weight)
        if scale is not None:
            out[name + ".scale"] = _numpy(scale)
    return out


@torch.no_grad()
def weight_hashes(decoder: Decoder) -> dict[str, str]:
    """SHA-256 of the float32 weights (N, K), scale times integer, that the training forward of each linear uses."""
    hashes = {}
    for name, linear in _linears(decoder):
        integers, scale = linear.quantizer(linear.weight)
        hashes[name] = hash_weights(_numpy(integers * scale[:, None]))
    return hashes


def hash_tensor(array: Array) -> str:
    """SHA-256 of an array's bytes in row-major order, as in a file's header."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def hashes(decoder: Decoder, tensors: Mapping[str, Array], tokenizer_json: bytes) -> dict[str, dict[str, str]]:
    """What a run remembers of its result: "weights" by linear, and "tensors" by name, tokenizer.json among them."""
    files = {**tensors, spec.TOKENIZER: np.frombuffer(tokenizer_json, np.uint8)}
    return {"weights": weight_hashes(decoder), "tensors": {name: hash_tensor(files[name]) for name in sorted(files)}}


def hash_weights(weights_NK: Array) -> str:
    """SHA-256 of float32 weights in row-major order, zeros taken as +0."""
    return hashlib.sha256(np.ascontiguousarray(weights_NK + np.float32(0)).data).hexdigest()


def baked_decoder(
    architecture: Architecture,
    quantization: Quantization,
    tensor: Callable[[str], Array],
    options: ComputeOptions | None = None,
) -> Decoder:
    """The quantized model with fixed weights, from a run's baked tensors or an open file (`file.tensor`); eval mode."""
    options = options or ComputeOptions()
    q = quantization
    parts = BakedParts(architecture=architecture, quantization=q, options=options, tensor=tensor)
    decoder = Decoder(architecture, tensor(spec.INV_FREQ), parts, r1=q.r1, r3=q.r3, r4=q.r4, options=options)
    with torch.no_grad():
        if architecture.tied_table:
            head_input: Any = decoder.head_input
            head_input.gain.copy_(torch.from_numpy(np.array(tensor(spec.FINAL_GAIN))))
            if q.r1:
                head_input.signs.copy_(torch.from_numpy(np.array(tensor(spec.ROTATION_SIGNS))))
        if architecture.qk_norm:
            for i, layer in enumerate(decoder.layers):
                for norm in ("q_norm", "k_norm"):
                    value = tensor(f"{spec.layer_prefix(i)}attn.{norm}")
                    getattr(layer.attn, norm).copy_(torch.from_numpy(np.array(value)))
    return decoder.requires_grad_(False).eval()
