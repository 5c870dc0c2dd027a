"""Turns a finished run into a `.rcp` file and proves that it holds what was trained. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpconv.config import DATA, OPTIONS, TRAINING
from rcpconv.errors import BadRun, ExportMismatch
from rcpconv.proof import hash_decoded
from rcpconv.runs import Run
from rcpconv.scheme import ComparisonQuantization
from rcpconv.train.texts import HUB_PREFIX
from rcpformat import spec
from rcpformat.metadata import RcpMetadata
from rcpformat.reader import RcpFile
from rcpformat.writer import WriteReport, write_rcp

_CHECKED_AT_A_TIME = 4
"""Tensors that are hashed side by side."""


def export(run: Run, out: Path, *, force: bool = False) -> WriteReport:
    """Write the run's model to `out`, two tensors in memory at a time; the same run gives the same bytes every time.

    Before the file takes its name, every tensor is read back from it and compared (SHA-256) with what the run recorded
    when it ended, which were then decoded and found to be what the training forward used. For older runs, which have no
    record of that, every linear weight is decoded from the file and compared now.

    Raises BadRun for one of a ComparisonQuantization, ExportMismatch where weights or tensors differ, OutputExists or
    OutputNotWritable for `out`; nothing is written then.
    """
    q = run.quantization
    if isinstance(q, ComparisonQuantization):
        raise BadRun(
            f"{run.folder}: trained with a_bits {q.a_bits} and kv_bits {q.kv_bits}, for comparison only; a file holds "
            f"4 or 8 of each: evaluate it with `rcpconv eval --run {run.folder}`, or train again with --a-bits and "
            "--kv-bits of 4 or 8"
        )
    metadata = RcpMetadata(
        architecture=run.architecture,
        quantization=run.quantization,
        tokenizer=run.tokenizer,
        generation=run.generation,
        provenance=provenance(run),
    )
    names = spec.expected_tensors(run.architecture, run.quantization)
    sources = {name: _source(run, name) for name in names}
    return write_rcp(out, metadata, sources, force=force, check=lambda path: check_lossless(path, run))


def provenance(run: Run) -> dict[str, Any]:
    """The file's `rcp.provenance`: origin, licence, recipe, perplexities; of local paths the last part only."""
    origin, config = run.provenance, run.config
    if origin.get("revision") is None:
        origin["base_model"] = Path(origin["base_model"]).name
    recipe = {
        name: getattr(config, name)
        for name, option in OPTIONS.items()
        if option.group in (DATA, TRAINING) and getattr(config, name) is not None
    }
    recipe["data"] = [_public(source) for source in config.data]
    evaluation = run.evaluation
    if config.eval_data is not None:
        recipe["eval_data"] = _public(config.eval_data)
        evaluation["text"] = _public(config.eval_data)
    return origin | {"recipe": recipe, "evaluation": evaluation}


def _public(text: str) -> str:
    """The name of a training text without the folders it lies in."""
    return text if text.startswith(HUB_PREFIX) else Path(text).name


def _source(run: Run, name: str) -> Callable[[], NDArray[Any]]:
    if name == spec.TOKENIZER:
        return lambda: np.frombuffer(run.tokenizer_json, dtype=np.uint8)
    return lambda: run.tensor(name)


def check_lossless(path: Path, run: Run) -> None:
    """Raise ExportMismatch unless the file at `path` holds exactly what the run trained."""
    with RcpFile.open(path) as file, ThreadPoolExecutor(_CHECKED_AT_A_TIME) as pool:
        linears = spec.linear_names(file.architecture)
        if missing := sorted(set(linears) ^ set(run.weight_hashes)):
            raise ExportMismatch(
                f"{run.folder}: weights.sha256.json does not list exactly the model's layers: {missing[0]}"
            )

        def compare(what: str, names: Iterable[str], found: Callable[[str], str], expected: Mapping[str, str]) -> None:
            names = list(names)
            for name, sha256 in zip(names, pool.map(found, names), strict=True):
                if sha256 != expected.get(name):
                    pool.shutdown(cancel_futures=True)
                    raise ExportMismatch(
                        f"{name}: the {what}, by SHA-256; the run folder was changed or damaged: run "
                        "`rcpconv quantize` again"
                    )

        compare(
            f"values are not those that {run.folder} ended with", file.header_tensors, file.sha256, run.tensor_hashes
        )
        if not run.decoded:
            compare(
                f"weights are not those that {run.folder} trained",
                linears,
                lambda name: hash_decoded(file.linear(name)),
                run.weight_hashes,
            )
