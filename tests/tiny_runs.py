"""Makes finished runs of tiny checkpoints, as `rcpconv quantize` leaves them, but without training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rcpconv.checkpoint import load_source
from rcpconv.config import QuantizeConfig
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.prepare import Rotations, prepare, student_decoder
from rcpconv.quantize import keep_result
from rcpconv.runs import FINISHED, Run, created, now
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint


def make_student(model: str, *, one_table: bool = False, method: str = "ldp", **scheme: Any) -> Decoder:
    """A decoder as after a few steps of training; `scheme` goes to Quantization. The same one every time."""
    quantization = Quantization(method=method, **scheme)
    rotations = Rotations(**{name: getattr(quantization, name) for name in ("r1", "r2", "r3", "r4")})
    prepared = prepare(load_source(model), rotations=rotations, one_table=one_table)
    decoder = student_decoder(prepared, quantization, ComputeOptions())
    _disturb(decoder)
    return decoder


def _disturb(decoder: Decoder) -> None:
    """Move every trainable number a little, as optimizer steps would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(decoder.named_parameters()):
            parameter.add_(0.02 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))


def make_tiny_run(kind: str, folder: Path, *, one_table: bool = False, **scheme: Any) -> Run:
    """A finished run at folder/run of the checkpoint that is made at folder/checkpoint."""
    make_tiny_checkpoint(kind, folder / "checkpoint")
    return make_run(str(folder / "checkpoint"), folder / "run", one_table=one_table, **scheme)


def make_run(model: str, folder: Path, *, one_table: bool = False, method: str = "ldp", **scheme: Any) -> Run:
    """A finished run of any model that load_source takes."""
    source = load_source(model)
    decoder = make_student(model, one_table=one_table, method=method, **scheme)
    record = {
        "status": FINISHED,
        "model": model,
        "revision": None,
        "created": now(),
        "finished": now(),
        "architecture": decoder.architecture.to_json(),
        "quantization": Quantization(method=method, **scheme).to_json(),
        "tokenizer": source.tokenizer.info.to_json(),
        "generation": source.generation,
        "provenance": source.provenance,
    }
    recipe = QuantizeConfig(model=model, method=method, **scheme).to_toml()
    with created(folder, record, recipe, source.tokenizer.json) as run:
        keep_result(run, decoder.pieces(), source)
    return Run.open(folder)
