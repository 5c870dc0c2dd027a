"""Models that are not in memory as a whole: the same bits, and no more memory for more layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rcpconv.prepare
from example_scripts import load_script
from rcpconv.baking import bake, baked_decoder, lazy_baked, weight_hashes
from rcpconv.checkpoint import load_source
from rcpconv.errors import NotSaved
from rcpconv.evaluate import lazy_perplexity, torch_perplexity
from rcpconv.layers import ComputeOptions
from rcpconv.prepare import lazy_original, original_decoder, prepare, student_decoder
from rcpconv.proof import hash_tensor
from rcpconv.quantize import quantize
from rcpconv.quantizers.base import channel_weights, to_groups
from rcpconv.quantizers.levels import LLOYD_MAX_STEPS, _gaussian_levels, assign, lloyd_max, sums_by_code
from rcpformat import spec
from tiny_checkpoints import make_tiny_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("kind", ["demo", "llama32", "qwen2", "qwen3", "llama_bias"])
def test_baked_piece_by_piece_is_what_the_whole_model_bakes_to(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rcpconv.prepare, "TABLE_ROWS", 100)
    model = kind
    if kind != "demo":
        model = str(tmp_path / "checkpoint")
        make_tiny_checkpoint(kind, Path(model), layout="sharded")
    run = quantize(model, {"steps": 0, "device": "cpu"}, out=tmp_path / "run")
    assert run is not None
    source = load_source(model)
    prepared = prepare(source, one_table=run.architecture.tied_table)
    student = student_decoder(prepared, run.quantization, ComputeOptions(), a_clip=run.config.a_clip)
    whole = bake(student)
    assert run.tensor_names() == sorted(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(run.tensor(name), array, err_msg=name)
    tokenizer = np.frombuffer(source.tokenizer.json, np.uint8)
    assert run.tensor_hashes == {
        name: hash_tensor(array) for name, array in (whole | {spec.TOKENIZER: tokenizer}).items()
    }
    assert run.weight_hashes == {
        name: found for piece in student.pieces() for name, found in weight_hashes(piece).items()
    }


@pytest.mark.parametrize("kind", ["llama32", "qwen3"])
def test_perplexity_layer_by_layer_is_that_of_the_whole_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_model = make_tiny_checkpoint(kind, tmp_path / "checkpoint")
    source = load_source(str(tmp_path / "checkpoint"))
    run = quantize(source.name, {"steps": 0, "device": "cpu"}, out=tmp_path / "run")
    assert run is not None
    a, q = run.architecture, run.quantization
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(source_model.config.vocab_size, (n,), generator=generator).tolist() for n in (40, 40, 7)]
    expected = torch_perplexity(original_decoder(source), windows, "")
    assert lazy_perplexity(lazy_original(source), windows, "") == expected
    monkeypatch.setattr("rcpconv.evaluate._STREAM_BYTES", 1)  # a window at a time
    assert lazy_perplexity(lazy_original(source), windows, "") == expected
    expected = torch_perplexity(baked_decoder(a, q, run.tensor), windows, "")
    assert lazy_perplexity(lazy_baked(a, q, run.tensor), windows, "") == expected


@torch.no_grad()
def test_lloyd_max_leaves_out_only_groups_that_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcpconv.quantizers.levels._BLOCK_WEIGHTS", 1000)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 200, generator=generator) ** 3
    weight[3] = 0
    for importance in (None, torch.rand(200, generator=generator)):
        grouped, counts = to_groups(weight, 64), channel_weights(200, 64, importance, weight.device)
        levels = _gaussian_levels(grouped, counts)
        for _ in range(LLOYD_MAX_STEPS):
            code = assign(grouped, levels)
            mass = sums_by_code(counts, code)
            centre = sums_by_code(grouped * counts, code) / mass.clamp(min=1e-30)
            levels = torch.where(mass > 0, centre, levels).sort(dim=-1).values
        assert torch.equal(lloyd_max(grouped, counts), levels)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_shard_is_mapped_only_as_long_as_its_tensors_are_held(tmp_path: Path) -> None:
    make_tiny_checkpoint("tinyllama", tmp_path)
    source = load_source(str(tmp_path))
    for name in source.tensors.names():
        source.tensors.get(name)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_disk_is_checked_before_the_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1000))
    make_tiny_checkpoint("llama1", tmp_path / "checkpoint")
    with pytest.raises(
        NotSaved, match=r"baked.safetensors: needs [\d,]+ bytes of disk, 1,000 are free in .*; make room"
    ):
        quantize(str(tmp_path / "checkpoint"), {"steps": 0, "device": "cpu"}, out=tmp_path / "run", force=True)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_synthetic_checkpoint.py")


SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "mistral-7b", "qwen2.5-7b"])
def test_synthetic_checkpoints_load_and_are_tame(script: ModuleType, shape: str, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        nbytes = script.write_checkpoint(folder, script.SHAPES[shape] | SMALL, seed=3, shard_bytes=50_000)
    assert len(list(folders[0].glob("*.safetensors"))) > 2
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    source = load_source(str(folders[0]))
    assert nbytes == 2 * source.provenance["parameters"]
    assert source.tied_embeddings == (shape == "llama-3.2-1b")
    decoder = original_decoder(source)
    assert 0.3 < decoder(torch.arange(3, 203)[None]).std().item() < 3


def test_every_synthetic_shape_is_one_that_can_be_converted(script: ModuleType, tmp_path: Path) -> None:
    sizes = {"tinyllama-1.1b": 1.1e9, "llama-3.2-1b": 1.24e9, "llama-2-7b": 6.74e9, "llama-3-8b": 8.03e9}
    for name, config in script.SHAPES.items():
        (tmp_path / "config.json").write_text(script.json.dumps(config))
        architecture, tied = script.outline_hf(tmp_path, script.HF_SAFETENSORS)
        shapes = script.expected_shapes(architecture, tied_embeddings=tied)
        parameters = sum(map(script.math.prod, shapes.values()))
        assert parameters == pytest.approx(sizes.get(name, parameters), rel=0.01), name


def test_a_synthetic_checkpoint_takes_no_place(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(script.main, ["llama-2-7b", str(tmp_path)])
    assert result.exit_code == 1 and "expected a free path" in result.output

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1000))
    result = CliRunner().invoke(script.main, ["llama-2-7b", str(tmp_path / "7b")])
    assert result.exit_code == 1 and "13,476,831,232 bytes of disk, 1,000 are free" in result.output
    assert not list(tmp_path.iterdir())


MEASURE = """
import pathlib, sys
from rcpconv.cli import main
try:
    main(sys.argv[1:])
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    print("PEAK", status.partition("VmHWM:")[2].split()[0])
"""  # getrusage's figure would begin with the parent's


def _peak(*arguments: str) -> int:
    """Bytes of memory that a command took at most, what was mapped of files included."""
    folders = (ROOT, ROOT / "formats", ROOT / "runtime")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", MEASURE, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return 1024 * int(result.stdout.rpartition("PEAK ")[2])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory figures")
def test_memory_does_not_grow_with_the_layers(script: ModuleType, tmp_path: Path) -> None:
    settings = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    layer = 4 * (3 * 512 * 2048 + 2 * 512 * 512 + 2 * 512 * 256)  # in float32
    peaks = {}
    for layers in (2, 16):
        checkpoint, run = tmp_path / f"checkpoint-{layers}", tmp_path / f"run-{layers}"
        config = script.SHAPES["llama-2-7b"] | settings | {"num_key_value_heads": 4, "num_hidden_layers": layers}
        script.write_checkpoint(checkpoint, config, shard_bytes=20_000_000)
        quantized = _peak("quantize", str(checkpoint), "--steps", "0", "--device", "cpu", "--out", str(run))
        exported = _peak("export", "--run", str(run), "--out", str(tmp_path / f"{layers}.rcp"))
        peaks[layers] = (quantized, exported)
    for few, many in zip(*peaks.values(), strict=True):
        assert many - few < 3 * layer, peaks
