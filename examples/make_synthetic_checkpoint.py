"""Writes a Hugging Face checkpoint of random weights in the shape of a known model, to try a conversion at full size.

    python examples/make_synthetic_checkpoint.py tinyllama-1.1b /tmp/tinyllama
    python examples/make_synthetic_checkpoint.py llama-2-7b /tmp/7b --layers 2

Sharded safetensors in bfloat16, config.json and a word-level tokenizer of the right size. A few rows a thread are in
memory at a time, and the disk is checked first. Equal seeds give equal bytes. Weights are drawn so that activations
stay near 1.
"""

import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "formats", ".")]

from rcpconv.checkpoint.hf import hf_name, outline_hf  # noqa: E402
from rcpconv.checkpoint.layout import HF_SAFETENSORS  # noqa: E402
from rcpconv.checkpoint.tensors import expected_shapes  # noqa: E402
from tiny_rcp import tiny_tokenizer  # noqa: E402

Config = dict[str, Any]
Shape = tuple[int, ...]


def _config(
    vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, context: int, theta: float, **more: Any
) -> Config:
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return settings | more


def _llama32(*shape: int) -> Config:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    return _config(128256, *shape, context=131072, theta=5e5, rope_scaling=scaling, tie_word_embeddings=True)


def _qwen25(*shape: int, tied: bool) -> Config:
    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return _config(*shape, context=32768, theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=tied, **names)


SHAPES = {
    "demo": _config(2048, 192, 480, 4, 6, 2, 1024, 1e4),
    "tinyllama-1.1b": _config(32000, 2048, 5632, 22, 32, 4, 2048, 1e4),
    "llama-3.2-1b": _llama32(2048, 8192, 16, 32, 8),
    "llama-3.2-3b": _llama32(3072, 8192, 28, 24, 8),
    "llama-2-7b": _config(32000, 4096, 11008, 32, 32, 32, 4096, 1e4),
    "llama-2-13b": _config(32000, 5120, 13824, 40, 40, 40, 4096, 1e4),
    "llama-3-8b": _config(128256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    "mistral-7b": _config(
        32768, 4096, 14336, 32, 32, 8, 32768, 1e6, model_type="mistral", architectures=["MistralForCausalLM"]
    )
    | {"sliding_window": None},
    "qwen2.5-0.5b": _qwen25(151936, 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen25(151936, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-7b": _qwen25(152064, 3584, 18944, 28, 28, 4, tied=False),
}
"""Name to config.json."""

_BYTES = 2
_SHARD_BYTES = 2_000_000_000
_BLOCK = 1 << 20
"""Weights that are drawn at a time."""
_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def _blocks(name: str, shape: Shape, layers: int, seed: int) -> Iterator[torch.Tensor]:
    """The rows of a tensor, by its canonical name, some at a time. Layers together add to the residual about 1."""
    if len(shape) == 1 and not name.endswith(".bias"):
        yield torch.ones(shape)
        return
    spread = 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[1])
    if ".attn.o." in name or ".mlp.down." in name:
        spread /= math.sqrt(2 * layers)
    rng = np.random.default_rng([seed, *name.encode()])
    rows = max(1, _BLOCK // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        block = (min(rows, shape[0] - start), *shape[1:])
        yield torch.from_numpy(rng.standard_normal(block, dtype=np.float32)) * spread


def _shards(shapes: Mapping[str, Shape], limit: int) -> list[dict[str, Shape]]:
    """The tensors in their order, cut where a shard would grow beyond the limit."""
    shards: list[dict[str, Shape]] = [{}]
    nbytes = 0
    for name, shape in shapes.items():
        size = _BYTES * math.prod(shape)
        if shards[-1] and nbytes + size > limit:
            shards.append({})
            nbytes = 0
        shards[-1][name] = shape
        nbytes += size
    return shards


def _begin_shard(path: Path, shapes: Mapping[str, Shape]) -> Iterator[tuple[Path, str, Shape, int]]:
    """Write a shard's header. Gives (path, name, shape, place in the file) of every tensor that is to come."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + _BYTES * math.prod(shape)
        header[hf_name(name)] = {"dtype": "BF16", "shape": shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        yield path, name, shape, 8 + len(text) + header[hf_name(name)]["data_offsets"][0]


def _write_tensor(path: Path, name: str, shape: Shape, place: int, *, layers: int, seed: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        for block in _blocks(name, shape, layers, seed):
            file.write(block.to(torch.bfloat16).view(torch.uint16).numpy().data)


def write_checkpoint(out: Path, config: Config, *, seed: int = 0, shard_bytes: int = _SHARD_BYTES) -> int:
    """Write a checkpoint of this config.json into a new folder; returns the bytes of its weights.

    Raises click.ClickException where there is something at `out`, or too little disk.
    """
    if out.exists():
        raise click.ClickException(f"{out}: expected a free path; choose another, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        architecture, tied = outline_hf(unfinished, HF_SAFETENSORS)
        shapes = expected_shapes(architecture, tied_embeddings=tied)
        nbytes = _BYTES * sum(map(math.prod, shapes.values()))
        free = shutil.disk_usage(unfinished).free
        if nbytes > free:
            raise click.ClickException(f"{out}: needs {nbytes:,} bytes of disk, {free:,} are free; make room")
        (unfinished / "tokenizer.json").write_bytes(tiny_tokenizer(architecture.vocab_size))
        (unfinished / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG))
        shards = _shards(shapes, shard_bytes)
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        begun = [
            tensor
            for file, shard in zip(files, shards, strict=True)
            for tensor in _begin_shard(unfinished / file, shard)
        ]
        write = partial(_write_tensor, layers=architecture.num_layers, seed=seed)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            deque(pool.map(write, *zip(*begun, strict=True)), maxlen=0)
        weight_map = {hf_name(name): file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return nbytes


@click.command(help=__doc__.split("\n")[0])
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Decoder layers.  [default: the model's]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(shape: str, out: Path, layers: int | None, seed: int) -> None:
    """Write the checkpoint and say how large it is."""
    torch.set_num_threads(1)  # tensors have a thread each
    config = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    click.echo(f"{out}: {write_checkpoint(out, config, seed=seed):,} bytes of weights")


if __name__ == "__main__":
    main()
