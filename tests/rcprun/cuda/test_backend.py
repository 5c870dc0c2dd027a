"""A whole model on the GPU against the NumPy backend: every architecture's features, every way a token can go."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcpformat import Quantization
from rcpformat.reader import RcpFile
from rcprun.backends.numpy import NumpyBackend
from tiny_rcp import LDP, TINY, write_random

pytestmark = pytest.mark.gpu

SMALL = dataclasses.replace(
    TINY, vocab_size=300, hidden_size=192, intermediate_size=480, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=32
)
MODELS = {
    "plain": (SMALL, LDP),
    "tiny": (TINY, LDP),
    "one table": (dataclasses.replace(SMALL, tied_table=True), LDP),
    "biases": (dataclasses.replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True), LDP),
    "norms of q and k": (dataclasses.replace(SMALL, qk_norm=True), LDP),
    "window": (dataclasses.replace(SMALL, attention_window=(5, None)), LDP),
    "8 bits": (SMALL, Quantization(method="ldp", a_bits=8, kv_bits=8)),
    "16-bit tables": (SMALL, Quantization(method="ldp", head_bits=16, embed_bits=16)),
    "groups of 64": (SMALL, Quantization(method="ldp", group_size=64)),
    "no rotation": (SMALL, Quantization(method="ldp", r1=False, r2=False, r3=False, r4=False)),
    "one table, no rotation": (dataclasses.replace(SMALL, tied_table=True), Quantization(method="ldp", r1=False)),
}


def backends(folder: Path, name: str) -> tuple[Any, NumpyBackend]:
    from rcprun.backends.cuda.backend import CudaBackend

    write_random(folder / "model.rcp", *MODELS[name])
    file = RcpFile.open(folder / "model.rcp")
    return CudaBackend(file, 64), NumpyBackend(file, 64)


def close(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each row: whether it is the same but for rounding. Where a code flipped it is not."""
    return np.abs(found - expected).max(axis=-1) < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_numpy_backend(tmp_path: Path, name: str) -> None:
    """Prefill of many and of few, then step by step. A flipped code moves a row and, through the cache, later ones."""
    ours, truth = backends(tmp_path, name)
    tokens = np.random.default_rng(1).integers(0, MODELS[name][0].vocab_size, 60).tolist()
    parts = [tokens[:30], tokens[30:35], *([token] for token in tokens[35:])]
    found = np.concatenate([np.concatenate(list(ours.forward_all(part))) for part in parts[:2]])
    found = np.concatenate([found, [ours.forward(part) for part in parts[2:]]])
    expected = np.concatenate([np.concatenate(list(truth.forward_all(part))) for part in parts])
    same = close(found, expected)
    error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    # With 8 bits codes flip 16 times as often, and move the result a sixteenth as far.
    assert same.mean() > 0.7 or error.max() < 0.03, (
        f"same rows: {same.astype(int)}, errors: {np.array2string(error, precision=6)}"
    )
    assert error.max() < 0.5, error
    assert ours.length == truth.length == 60


def test_strips_of_a_pass_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the bit: the transform of few tokens is computed in another order."""
    from rcprun.backends.cuda import backend

    tokens, found = list(range(60)), []
    for strip in (64, 25):
        monkeypatch.setattr(backend, "_ROUND_STRIP", strip)
        monkeypatch.setattr(backend, "_STRIP_BYTES", 1)
        folder = tmp_path / str(strip)
        folder.mkdir()
        found.append(np.concatenate(list(backends(folder, "plain")[0].forward_all(tokens))))
    same = close(found[1], found[0])
    assert same.mean() > 0.7, same.astype(int)


def test_the_same_bits_each_time(tmp_path: Path) -> None:
    ours, _ = backends(tmp_path, "one table")
    tokens = list(range(40))
    runs = []
    for _ in range(2):
        ours.truncate(0)
        runs.append([ours.forward(tokens[:20]), *(ours.forward([token]) for token in tokens[20:])])
    assert np.array_equal(runs[0], runs[1])


def test_decoding_greedily_on_the_gpu_is_decoding_step_by_step(tmp_path: Path) -> None:
    ours, _ = backends(tmp_path, "plain")
    logits, expected = ours.forward([1, 2, 3]), []
    for _ in range(20):
        expected.append(int(logits.argmax()))
        logits = ours.forward(expected[-1:])
    ours.truncate(0)
    ours.forward([1, 2, 3])
    assert ours.decode_greedy(12) == expected[:12]
    ours.truncate(10)
    assert ours.length == 10


def test_too_little_memory_is_said_before_anything_is_allocated(tmp_path: Path, monkeypatch) -> None:
    import cupy

    from rcprun.backends.cuda.backend import CudaBackend
    from rcprun.errors import OutOfMemory

    write_random(tmp_path / "model.rcp", *MODELS["plain"])
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (1000, 2000))
    with pytest.raises(OutOfMemory, match=r"GPU memory: needs .* GiB .* are free"):
        CudaBackend(RcpFile.open(tmp_path / "model.rcp"), 64)


def test_generating_with_sampling_on_the_gpu(tmp_path: Path) -> None:
    from rcprun.sampling import SamplingOptions

    ours, _ = backends(tmp_path, "plain")
    greedy, drawn = SamplingOptions(temperature=0), SamplingOptions(temperature=1.5, top_k=0, top_p=1, min_p=0)
    prompt, runs = [1, 2, 3], []
    for options, seed in ((greedy, 0), (greedy, 1), (drawn, 5), (drawn, 5), (drawn, 6)):
        ours.truncate(0)
        ours.forward(prompt)
        runs.append(list(ours.generate(options, seed, prompt, 20)))
    ours.truncate(0)
    logits, expected = ours.forward(prompt), []
    for _ in range(20):
        expected.append(int(logits.argmax()))
        logits = ours.forward(expected[-1:])
    assert runs[0] == runs[1] == expected
    assert runs[2] == runs[3] != runs[4]
    ours.truncate(0)
    ours.forward(prompt)
    stream = ours.generate(greedy, 0, prompt, 20)
    assert [next(stream) for _ in range(5)] == expected[:5]
    stream.close()
    assert ours.length == 7  # the prompt and four tokens; the fifth was never asked for as input
    assert int(ours.forward(expected[4:5]).argmax()) == expected[5]
