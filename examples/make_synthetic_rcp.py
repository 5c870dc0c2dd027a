"""Writes a full-size `.rcp` file of random weights in the shape of a known model: for measuring speed and memory.

    python examples/make_synthetic_rcp.py llama-2-7b /tmp/7b.rcp
    python examples/make_synthetic_rcp.py llama-2-7b /tmp/one.rcp --layers 1 --context 32768

One tensor is in memory at a time. The file is valid (`rcpconv verify` accepts it) and as large as a real one, but for
its tokenizer, a word-level one. Weights are drawn so that activations and logits stay near 1 in magnitude, through any
number of layers; equal seeds give equal bytes. RoPE has the model's base, without LLaMA 3.2's stretching.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "formats")]

from rcpformat import Architecture, Quantization, spec, write_rcp  # noqa: E402
from rcpformat.errors import OutputExists, OutputNotWritable  # noqa: E402
from rcpformat.writer import TensorSource, WriteReport  # noqa: E402
from shapes import DEMO, LLAMA_2_7B, LLAMA_2_13B, LLAMA_3_8B, LLAMA_32_1B, LLAMA_32_3B, TINYLLAMA, WIKI_22M  # noqa: E402
from tiny_rcp import random_metadata, tiny_tokenizer  # noqa: E402


def _one_table(architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, tied_table=True)


SHAPES = {
    "llama-2-7b": (LLAMA_2_7B, 1e4),
    "llama-2-13b": (LLAMA_2_13B, 1e4),
    "llama-3-8b": (LLAMA_3_8B, 5e5),
    "llama-3.2-1b": (_one_table(LLAMA_32_1B), 5e5),
    "llama-3.2-3b": (_one_table(LLAMA_32_3B), 5e5),
    "tinyllama-1.1b": (TINYLLAMA, 1e4),
    "wiki-llama-22m": (_one_table(WIKI_22M), 1e4),
    "demo": (_one_table(DEMO), 1e4),
}
"""Name to architecture and RoPE base."""

_LEVELS = np.array([-110, -33, 33, 110])
"""In the proportions of the best four levels of a normal distribution; each is moved by up to _JITTER."""
_JITTER = 16
_LEVELS_RMS = math.sqrt((_LEVELS**2).mean() + _JITTER * (_JITTER + 1) / 3)
_TABLE_RMS = math.sqrt(spec.LEVEL_LIMIT * (spec.LEVEL_LIMIT + 1) / 3)
_ADDED_TO_RESIDUAL = ("attn.o", "mlp.down")


def draw(
    name: str, form: spec.TensorSpec, architecture: Architecture, theta: float, rng: np.random.Generator
) -> NDArray[Any]:
    """One tensor. The residual has variance 1 after the embedding, and all layers together add about as much."""
    a = architecture
    owner, _, part = name.rpartition(".")
    shape = tuple(size or 0 for size in form.shape)

    def around(center: float) -> NDArray[np.float64]:
        return center * rng.uniform(0.75, 1.25, shape)

    if name == spec.TOKENIZER:
        return np.frombuffer(tiny_tokenizer(a.vocab_size), dtype=np.uint8)
    if name == spec.INV_FREQ:
        return theta ** (-np.arange(0, a.head_dim, 2) / a.head_dim)
    if part == "codes":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if part == "levels":
        return _LEVELS + rng.integers(-_JITTER, _JITTER + 1, shape, dtype=np.int8)
    if part == "weight":
        return rng.integers(-spec.LEVEL_LIMIT, spec.LEVEL_LIMIT + 1, shape, dtype=np.int8)
    if part == "scale" and owner in (spec.EMBED, spec.HEAD):
        return around(1 / (_TABLE_RMS * (math.sqrt(a.hidden_size) if owner == spec.HEAD else 1)))
    if part == "scale":
        kind = spec.linear_kind(owner)
        shrink = math.sqrt(2 * a.num_layers) if kind in _ADDED_TO_RESIDUAL else 1
        return around(1 / (_LEVELS_RMS * math.sqrt(spec.linear_shape(a, kind)[1]) * shrink))
    if part in ("act_clip", "kv_clip"):
        return around(0.8)
    if part == "gain":  # of either sign, or the embedding of the last token would decide the next
        return around(1 / math.sqrt(a.hidden_size)) * rng.choice([-1, 1], shape)
    assert part == "signs", name
    return rng.choice([-1, 1], shape)


def tensor_sources(
    architecture: Architecture, quantization: Quantization, theta: float, seed: int = 0
) -> dict[str, TensorSource]:
    """Name -> function that draws the tensor, the same one each time, for every tensor of the file."""

    def source(name: str, form: spec.TensorSpec) -> TensorSource:
        def tensor() -> NDArray[Any]:
            rng = np.random.default_rng([seed, *name.encode()])
            return draw(name, form, architecture, theta, rng).astype(spec.DTYPES[form.dtype], copy=False)

        return tensor

    expected = spec.expected_tensors(architecture, quantization)
    return {name: source(name, form) for name, form in expected.items()}


def write_synthetic(
    out: Path, architecture: Architecture, theta: float, *, seed: int = 0, force: bool = False
) -> WriteReport:
    """Write a file of this shape to `out`. Linear layers' widths are multiples of 4. Raises as write_rcp does."""
    quantization = Quantization(method="random")
    sources = tensor_sources(architecture, quantization, theta, seed)
    return write_rcp(out, random_metadata(architecture, quantization), sources, force=force)


@click.command(help=__doc__.split("\n")[0])
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Decoder layers.  [default: the model's]")
@click.option("--context", type=click.IntRange(1), help="Context length, in tokens.  [default: the model's]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def main(shape: str, out: Path, layers: int | None, context: int | None, seed: int, force: bool) -> None:
    """Write the file and say how large it is."""
    architecture, theta = SHAPES[shape]
    architecture = dataclasses.replace(
        architecture,
        num_layers=layers or architecture.num_layers,
        max_position_embeddings=context or architecture.max_position_embeddings,
    )
    try:
        report = write_synthetic(out, architecture, theta, seed=seed, force=force)
    except (OutputExists, OutputNotWritable) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {report.nbytes:,} bytes")


if __name__ == "__main__":
    main()
