"""Trains tiny models in this process or in a child, and compares what two trainings left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from rich.console import Console

from rcpconv.quantize import quantize
from rcpconv.runs import Run
from rcpconv.train.progress import read_metrics

STEPS = 20
SETTINGS: dict[str, Any] = {
    "seq_len": 24,
    "batch_size": 2,
    "grad_accum": 2,
    "steps": STEPS,
    "lr": 1e-3,
    "log_every": 1,
    "checkpoint_every": 4,
    "rotation_share": 0.0,
    "device": "cpu",
}
EVALUATED: dict[str, Any] = {"max_eval_tokens": 1000, "eval_every": 8}
"""With eval_data, what the run that others are compared with was evaluated by."""


def in_child(action: Callable[[], int], output: Path) -> int:
    """Fork, run the action with its output in a file, and return the child's process id; its exit code is the action's.

    Forking saves the import of torch, which takes seconds.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        with output.open("a") as sys.stdout, redirect_stderr(sys.stdout):
            code = action()
    finally:
        os._exit(code)


def train(checkpoint: Path, text: Path, out: Path, **settings: Any) -> Run:
    run = quantize(
        str(checkpoint),
        SETTINGS | {"data": (str(text),)} | settings,
        out=out,
        runs=out.parent,
        console=Console(quiet=True),
    )
    assert run is not None
    return run


def resume(folder: Path, **settings: Any) -> Run:
    run = quantize(None, settings, resume=str(folder), runs=folder.parent, console=Console(quiet=True))
    assert run is not None
    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def assert_same_result(run: Run, reference: Run) -> None:
    for name in ("baked.safetensors", "weights.sha256.json", "tokens/train.npy"):
        assert (run.folder / name).read_bytes() == (reference.folder / name).read_bytes(), name
    assert metrics(run.folder) == metrics(reference.folder)
    assert run.evaluation == reference.evaluation


def wait_for_line(folder: Path, count: int, child: int) -> None:
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended early"
        time.sleep(0.002)
