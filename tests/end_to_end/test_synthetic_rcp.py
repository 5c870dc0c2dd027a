"""examples/make_synthetic_rcp.py: files of random weights that are valid, reproducible and numerically tame."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from example_scripts import load_script
from rcpformat import RcpFile, spec
from rcprun.model import load


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_synthetic_rcp.py")


def test_file_is_valid_and_logits_stay_near_one(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "demo.rcp"
    result = CliRunner().invoke(script.main, ["demo", str(out), "--layers", "12", "--context", "300"])
    assert result.exit_code == 0, result.output
    assert f"{out.stat().st_size:,} bytes" in result.output
    with RcpFile.open(out, verify=True) as file:
        assert (file.architecture.num_layers, file.architecture.max_position_embeddings) == (12, 300)
    model = load(out)
    tokens = np.random.default_rng(0).integers(0, 2048, 64).tolist()
    logits = np.concatenate(list(model.backend.forward_all(tokens)))
    assert 0.5 < logits.std() < 2
    assert np.abs(logits).max() < 20
    assert len(set(logits.argmax(axis=1).tolist())) > 32
    assert model.generate("w5 w9", max_tokens=4, temperature=0).tokens


def test_equal_seeds_give_equal_bytes(script: ModuleType, tmp_path: Path) -> None:
    architecture = dataclasses.replace(script.SHAPES["demo"][0], num_layers=1, tied_table=False)
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        script.write_synthetic(file, architecture, 1e4, seed=seed)
    first, second, third = (file.read_bytes() for file in files)
    assert first == second != third


def test_an_existing_file_stays(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "demo.rcp"
    out.write_text("mine")
    result = CliRunner().invoke(script.main, ["demo", str(out), "--layers", "1"])
    assert (result.exit_code, out.read_text()) == (1, "mine")
    assert "--force" in result.output
    assert CliRunner().invoke(script.main, ["demo", str(out), "--layers", "1", "--force"]).exit_code == 0


def test_every_shape_packs_into_whole_bytes(script: ModuleType) -> None:
    for architecture, _ in script.SHAPES.values():
        widths = {spec.linear_shape(architecture, kind)[1] for kind in spec.LINEARS}
        assert all(width % spec.CODES_PER_BYTE == 0 for width in widths)
