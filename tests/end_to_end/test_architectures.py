"""Each supported family all the way: checkpoint, rotation, quantized model, file, and the runtime that runs it.

Tiny random models, so every difference between torch and the runtime that is not rounding shows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rcpconv.baking import baked_decoder
from rcpconv.checkpoint import load_source
from rcpconv.export import export
from rcpconv.layers import BakedLinear, FixedClip
from rcpconv.model import Decoder
from rcpconv.prepare import prepare, rotated_decoder
from rcpformat import arithmetic
from rcpformat.reader import RcpFile
from rcprun.backends import create
from rcprun.backends.numpy.layers import Linear
from tiny_checkpoints import KINDS, make_tiny_checkpoint
from tiny_runs import make_student, make_tiny_run

LENGTH = 48
SEQUENCES = 4
ONE_TABLE = ("llama32", "qwen2")
"""Kinds with tied embeddings, which keep one table here."""
SCHEMES: dict[str, dict[str, Any]] = {
    "llama1": {"group_size": 64, "head_bits": 16, "embed_bits": 16},
    "metamath": {"a_bits": 8, "kv_bits": 8},
    "tinyllama": {"r1": False, "r2": False, "r3": False, "r4": False},
}
"""What differs from the default scheme, so that every option of the file is run somewhere."""


def random_tokens(vocabulary: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, LENGTH)]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rotated_model_has_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    original = make_tiny_checkpoint(kind, tmp_path)
    source = load_source(str(tmp_path))
    tokens = torch.tensor([random_tokens(source.architecture.vocab_size, seed) for seed in range(SEQUENCES)])
    expected = original(tokens).logits
    assert expected.std() > 0.5
    for one_table in (False, True) if source.tied_embeddings else (False,):
        difference = (rotated_decoder(prepare(source, one_table=one_table))(tokens) - expected).abs().max()
        assert difference < 1e-3, f"one_table={one_table}: {difference}"


@dataclass
class Exported:
    """The same quantized model as it was trained, in the file, and as torch reads it from the file."""

    student: Decoder
    file: RcpFile
    baked: Decoder

    @property
    def sequences(self) -> list[list[int]]:
        return [random_tokens(self.file.architecture.vocab_size, seed) for seed in range(SEQUENCES)]


@pytest.fixture(params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Exported]:
    scheme = SCHEMES.get(request.param, {}) | {"one_table": request.param in ONE_TABLE}
    run = make_tiny_run(request.param, tmp_path, **scheme)
    export(run, tmp_path / "model.rcp")
    with RcpFile.open(tmp_path / "model.rcp", verify=True) as file:
        student = make_student(run.record["model"], **scheme).eval()
        yield Exported(student, file, baked_decoder(file.architecture, file.quantization, file.tensor))


@torch.inference_mode()
def test_file_is_the_trained_model_and_the_runtime_agrees(exported: Exported) -> None:
    tokens = torch.tensor(exported.sequences)
    trained, baked = exported.student(tokens), exported.baked(tokens)
    assert torch.equal(trained, baked)

    backend = create("numpy", exported.file, LENGTH)
    same, differences = [], []
    for sequence, expected in zip(exported.sequences, baked.numpy(), strict=True):
        backend.truncate(0)
        found = np.concatenate(list(backend.forward_all(sequence)))
        same.append(found.argmax(1) == expected.argmax(1))
        differences.append(np.abs(found - expected).max(1))
    # Rounding alone moves logits by about 1e-6. Where it flips a code, which then stays in the cache, they move by
    # much more; in models this small a flip reaches many later positions, but few sequences.
    assert np.median(differences) < 1e-4, np.median(differences, axis=1)
    assert np.mean(same) >= 0.97, np.mean(same, axis=1)


@torch.inference_mode()
def test_every_operation_gives_equal_codes_and_sums(exported: Exported) -> None:
    """Same floats in: the same codes, scales, sums and cache entries out of torch and of the runtime."""
    quantized: list[tuple[FixedClip, torch.Tensor, Any]] = []
    linears: dict[str, tuple[Any, torch.Tensor]] = {}
    for name, module in exported.baked.named_modules():
        if isinstance(module, FixedClip):
            module.register_forward_hook(lambda module, inputs, output: quantized.append((module, inputs[0], output)))
        elif isinstance(module, BakedLinear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: linears.update({name: (inputs[0], output)})
            )
    exported.baked(torch.tensor(exported.sequences[:1]))

    source_of_codes = {}
    for module, x, output in quantized:
        clip = module.clip.numpy()[0]
        if module.kind == "kv":
            entry = arithmetic.quantize_kv(x.numpy(), clip, module.bits)
            np.testing.assert_array_equal(output.numpy(), entry.dequantize())
        else:
            codes, scale = arithmetic.quantize_activations(x.numpy(), clip, module.bits)
            np.testing.assert_array_equal(output.codes.numpy(), codes)
            np.testing.assert_array_equal(output.scale.numpy(), scale)
            source_of_codes[id(output.codes)] = (x[0].numpy(), clip)
    assert len(linears) == 7 * exported.file.architecture.num_layers
    for name, (inputs, output) in linears.items():
        x, clip = source_of_codes[id(inputs.codes)]
        np.testing.assert_array_equal(output[0].numpy(), Linear(exported.file, [name])(x, clip), err_msg=name)
