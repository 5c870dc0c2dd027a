"""What goes through a model: how large activations, keys and values are, and how far quantized outputs are off.

Knows nothing of plots, or of how the models came about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rcpconv.model import Decoder
from rcpformat import spec

SITES = (*spec.ACTIVATION_SITES, *spec.KV_SITES)
_Windows = Sequence[Sequence[int]]
_Hook = Callable[[nn.Module, Any, Any], None]


def _quantizers(layer: nn.Module) -> dict[str, nn.Module]:
    """What stands at each of SITES in a layer."""
    attn: Any = layer.attn
    mlp: Any = layer.mlp
    activations = (attn.input_quantizer, attn.o_quantizer, mlp.input_quantizer, mlp.down_quantizer)
    return dict(zip(SITES, (*activations, attn.key_quantizer, attn.value_quantizer), strict=True))


@contextmanager
def _hooked(hooks: Mapping[nn.Module, _Hook]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(decoder: Decoder, window: Sequence[int]) -> None:
    decoder.hidden(torch.tensor([window], device=decoder.inv_freq.device))


class SiteRange:
    """How large the values are that one quantizer of one layer sees, token by token (and head by head)."""

    def __init__(self) -> None:
        self._peaks: list[Tensor] = []
        self._crests: list[Tensor] = []

    def hook(self, module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        """Look at the values (..., token's values) that go into a module; one that is all zero is passed over."""
        x = inputs[0].float().flatten(0, -2)
        peak, rms = x.abs().amax(-1), x.square().mean(-1).sqrt()
        self._peaks.append(peak.cpu())
        self._crests.append((peak / rms)[rms > 0].cpu())

    @property
    def largest(self) -> float:
        """The largest magnitude of all."""
        return float(torch.cat(self._peaks).max())

    @property
    def typical(self) -> float:
        """The median over tokens of the largest magnitude of a token."""
        return float(torch.cat(self._peaks).median())

    @property
    def crest(self) -> float:
        """The median over tokens of largest magnitude over root mean square: what outliers cost a quantizer."""
        return float(torch.cat(self._crests).median())


@torch.inference_mode()
def ranges(decoder: Decoder, windows: _Windows) -> dict[str, list[SiteRange]]:
    """Site -> a range for each layer, of an unquantized decoder whose norms are folded."""
    found = {site: [SiteRange() for _ in decoder.layers] for site in SITES}
    hooks = {
        module: found[site][i].hook
        for i, layer in enumerate(decoder.layers)
        for site, module in _quantizers(layer).items()
    }
    with _hooked(hooks):
        for window in windows:
            _run(decoder, window)
    return found


def _outputs(decoder: Decoder) -> dict[str, nn.Module]:
    """Every linear by its name, and every layer, whose output is the residual stream, by "layers.N"."""
    modules = dict(decoder.named_modules())
    names = [*spec.linear_names(decoder.architecture), *(f"layers.{i}" for i in range(len(decoder.layers)))]
    return {name: modules[name] for name in names}


@torch.inference_mode()
def output_errors(reference: Decoder, quantized: Decoder, windows: _Windows) -> dict[str, float]:
    """‖quantized − reference‖ / ‖reference‖ of every linear's output ("layers.0.attn.q") and layer's ("layers.0").

    Each model runs on its own, so errors of earlier layers are in those of later ones.
    """
    kept: dict[str, Tensor] = {}
    wrong: dict[str, float] = {}
    whole: dict[str, float] = {}

    def keep(name: str) -> _Hook:
        return lambda _, __, output: kept.__setitem__(name, output)

    def compare(name: str) -> _Hook:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            expected = kept.pop(name)
            wrong[name] = wrong.get(name, 0.0) + float((output - expected).square().sum(dtype=torch.float64))
            whole[name] = whole.get(name, 0.0) + float(expected.square().sum(dtype=torch.float64))

        return hook

    keeping = {module: keep(name) for name, module in _outputs(reference).items()}
    comparing = {module: compare(name) for name, module in _outputs(quantized).items()}
    for window in windows:
        with _hooked(keeping):
            _run(reference, window)
        with _hooked(comparing):
            _run(quantized, window)
    return {name: (wrong[name] / max(whole[name], 1e-30)) ** 0.5 for name in wrong}
