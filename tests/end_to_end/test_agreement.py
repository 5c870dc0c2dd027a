"""How far torch and the NumPy runtime may differ on a real model and real text: layer, model, and run to run.

Integer sums, and codes of equal floats, are test_architectures.py's; here rounding gets its chance to flip a code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from rcpconv.baking import baked_decoder
from rcpconv.evaluate import evaluate
from rcpconv.export import export
from rcpconv.heldout import Text, default_text
from rcpconv.layers import FixedClip
from rcpconv.model import Decoder
from rcpformat import arithmetic
from rcpformat.reader import RcpFile
from rcpformat.spec import ACTIVATION_SITES
from rcprun.backends.numpy import NumpyBackend
from tiny_runs import make_run

YARDSTICK = os.environ.get("RCPCONV_YARDSTICK", str(Path(__file__).parents[3] / "shared/models/wiki-llama-22m"))
"""A checkpoint that is not bundled, for `make test-slow`; skipped, with this name, where it is not there."""
MODELS = [
    "demo",
    pytest.param(
        YARDSTICK,
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not Path(YARDSTICK).is_dir(), reason=f"no folder {YARDSTICK}: set RCPCONV_YARDSTICK"),
        ],
    ),
]
TOKENS = 512
LAYER_TOKENS = 256
"""No more than the cache has room for at first."""


@dataclass
class Subject:
    run: Any
    file: RcpFile
    decoder: Decoder
    tokens: list[int]


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("agreement")
    run = make_run(request.param, folder / "run", one_table=True)
    export(run, folder / "model.rcp")
    with RcpFile.open(folder / "model.rcp") as file:
        text = default_text("demo").content[:8000]
        tokens = Tokenizer.from_str(file.tokenizer_json().decode()).encode(text, add_special_tokens=False).ids
        yield Subject(run, file, baked_decoder(file.architecture, file.quantization, file.tensor), tokens[:TOKENS])


def torch_codes(decoder: Decoder, index: int, x_MD: np.ndarray) -> list[np.ndarray]:
    """The activation codes at the four sites of one layer, given the residual stream before it."""
    found: dict[torch.nn.Module, np.ndarray] = {}
    layer = decoder.layers[index]
    sites = [module for module in layer.modules() if isinstance(module, FixedClip) and module.kind == "activation"]
    handles = [
        site.register_forward_hook(lambda module, _, y: found.__setitem__(module, y.codes[0].numpy().copy()))
        for site in sites
    ]
    layer(torch.from_numpy(x_MD)[None], *decoder.rope(len(x_MD)), decoder.options)
    for handle in handles:
        handle.remove()
    return [found[site] for site in sites]


@torch.inference_mode()
def test_a_layer_given_the_same_floats_makes_the_same_codes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under 1 in 10⁴ activation codes differ, each within 1e-5 of a rounding boundary.

    The boundary is asked of the sites up to the first in a layer where a code differs: behind it the floats differ too.
    """
    recorded: list[tuple[np.ndarray, np.ndarray]] = []
    quantize = arithmetic.quantize_activations

    def record(x_MK: np.ndarray, clip: np.float32, bits: int) -> tuple[np.ndarray, np.ndarray]:
        codes, scale = quantize(x_MK, clip, bits)
        recorded.append((x_MK / scale, codes))
        return codes, scale

    monkeypatch.setattr(arithmetic, "quantize_activations", record)
    backend = NumpyBackend(subject.file, TOKENS)
    factor = subject.file.architecture.rope_attention_factor
    rope = arithmetic.rope_tables(np.arange(LAYER_TOKENS), backend._inv_freq, factor)
    x_MD = backend._embed(np.array(subject.tokens[:LAYER_TOKENS]))
    different = total = 0
    for index, layer in enumerate(backend._layers):
        others = torch_codes(subject.decoder, index, x_MD)
        recorded.clear()
        x_MD = layer(x_MD, rope, backend._cache, 0)
        assert len(recorded) == len(others) == len(ACTIVATION_SITES)
        same = True
        for (scaled_MK, codes_MK), other_MK in zip(recorded, others, strict=True):
            flipped = codes_MK != other_MK
            different, total = different + int(flipped.sum()), total + flipped.size
            if same and flipped.any():
                distance = np.abs(scaled_MK[flipped] % 1 - 0.5).max()
                assert distance < 1e-5, f"layer {index}: a code differs, {distance} from a rounding boundary"
            same = same and not flipped.any()
    print(f"{different} of {total} activation codes differ")
    assert different < 1e-4 * total


def test_the_runtime_gives_the_same_bits_twice(subject: Subject) -> None:
    first, second = (
        np.concatenate(list(NumpyBackend(subject.file, TOKENS).forward_all(subject.tokens))) for _ in range(2)
    )
    assert np.array_equal(first.view(np.uint32), second.view(np.uint32))


@pytest.mark.slow
def test_the_whole_model_agrees_over_100_000_tokens(tmp_path: Path) -> None:
    """Perplexity within 0.3%; top-1 and KL no worse than torch float32 against float64."""
    run = make_run("demo", tmp_path / "run", one_table=True)
    export(run, tmp_path / "model.rcp")
    train = (Path(__file__).parents[2] / "rcpconv/demo/train.txt").read_text(encoding="utf-8")
    text = Text("held-out and training text", default_text("demo").content + train)
    result = evaluate(run=run, rcp=tmp_path / "model.rcp", text=text, window=512, skip=("original",), compare=True)
    assert result.tokens > 100_000
    fake, rcp = (next(m.perplexity for m in result.models if m.name == name) for name in ("fake-quant", "rcp"))
    print(f"perplexity: fake-quant {fake:.3f}, rcp {rcp:.3f}; {result.agreement}")
    assert abs(rcp / fake - 1) < 0.003
    ours, floor = (result.agreement[f"{name} vs. torch float64"] for name in ("runtime", "torch float32"))
    for found in (ours, result.agreement["runtime vs. torch float32"]):
        assert found.top1_agreement >= floor.top1_agreement
        assert found.mean_kl <= floor.mean_kl
