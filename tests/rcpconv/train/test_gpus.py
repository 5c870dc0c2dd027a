"""Training on two GPUs over NCCL: losses and rotations as on one. Also over gloo; test_distributed.py has more."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rcpconv.rotations import LearnedRotations
from rcpconv.runs import ROTATIONS
from rcpconv.train.progress import read_metrics
from tiny_checkpoints import make_tiny_checkpoint

STEPS = 4


def train(checkpoint: Path, out: Path, gpus: int, device: str, **settings: Any) -> list[float]:
    """Losses of a training by the command line, in processes of its own."""
    settings = {"steps": STEPS, "seq_len": 24, "lr": 1e-3, "log_every": 1, "checkpoint_every": 2} | settings
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    text = out.with_suffix(".txt")
    text.write_text("".join(f"{i} is the number after {i - 1}, and before {i + 1}. " for i in range(400)))
    command = ["quantize", checkpoint, "--out", out, "--data", text, "--gpus", gpus, "--device", device, *options]
    done = subprocess.run([sys.executable, "-m", "rcpconv", *map(str, command)], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl")]


on_two_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)


def require_two(device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@on_two_devices
@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32", "compile": "off", "batch_size": 4, "grad_accum": 1},
        {"precision": "fp32", "compile": "off", "batch_size": 1, "grad_accum": 4},
        {"precision": "fp32", "compile": "off", "batch_size": 4, "grad_accum": 1, "start": "data"},
    ],
    ids=["stage 2", "stage 1", "stage 3"],
)
def test_two_gpus_train_as_one(tmp_path: Path, device: str, settings: dict[str, Any]) -> None:
    require_two(device)
    make_tiny_checkpoint("llama32", tmp_path / "tiny")
    one = train(tmp_path / "tiny", tmp_path / "one", 1, device, **settings)
    two = train(tmp_path / "tiny", tmp_path / "two", 2, device, **settings)
    assert len(one) == STEPS and two == pytest.approx(one, rel=2e-3)


@on_two_devices
def test_two_gpus_learn_the_rotations_of_one(tmp_path: Path, device: str) -> None:
    """To roundings, which later flip codes: so losses agree at first alone. In float32, products in TF32 on a GPU."""
    require_two(device)
    make_tiny_checkpoint("llama32", tmp_path / "tiny")
    settings = {"precision": "fp32", "compile": "off", "batch_size": 4, "grad_accum": 1, "rotation_steps": 3}
    losses = [train(tmp_path / "tiny", tmp_path / str(gpus), gpus, device, **settings) for gpus in (1, 2)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-2)
    one, two = (LearnedRotations.load(tmp_path / str(gpus) / ROTATIONS) for gpus in (1, 2))
    for a, b in ((one.r1_CC, two.r1_CC), (one.r2_LDD, two.r2_LDD)):
        assert a is not None and b is not None
        moved = (a - torch.eye(a.shape[-1])).norm()
        assert moved > 0.1 and (a - b).norm() < (1e-5 if device == "cpu" else 1e-2) * moved
