"""`rcpconv export`: lossless, the same bytes each time, and nothing written when anything differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rcpconv.baking import baked_decoder
from rcpconv.errors import BadRun, ExportMismatch, RunNotFound
from rcpconv.export import export
from rcpconv.inspection import bars, code_counts, inspect_file, model_size
from rcpconv.proof import hash_decoded, hash_tensor, hash_weights
from rcpconv.quantizers import METHODS
from rcpconv.runs import BAKED, RECIPE, RECORD, RUNNING, TOKENIZER, WEIGHT_HASHES, Run, write_json
from rcpformat import OutputExists, Quantization, RcpFile, codec, pack_codes, spec
from rcpformat.accounting import account
from rcpformat.codec import PackedLinear
from rcpformat.errors import FormatError
from shapes import LLAMA_2_7B
from tiny_runs import make_student, make_tiny_run

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def original_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run("llama3", tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(original_run: Run, tmp_path: Path) -> Run:
    """A copy that a test may damage."""
    shutil.copytree(original_run.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_every_weight_decodes_to_what_was_trained(run: Run, tmp_path: Path) -> None:
    report = export(run, tmp_path / "model.rcp")
    with RcpFile.open(tmp_path / "model.rcp", verify=True) as file:
        for name in spec.linear_names(file.architecture):
            assert hash_weights(file.linear(name).weights()) == run.weight_hashes[name]
        for name in run.tensor_names():
            np.testing.assert_array_equal(file.tensor(name), run.tensor(name))
        assert file.tokenizer_json() == run.tokenizer_json
        assert file.metadata.tokenizer == run.tokenizer
        assert file.metadata.generation == run.generation == {"temperature": 0.6, "top_p": 0.9}
    assert report.nbytes == (tmp_path / "model.rcp").stat().st_size


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exported_without_loss(method: str, tmp_path: Path) -> None:
    """And the model made from the file computes what the model in training does, to the last bit."""
    run = make_tiny_run("llama3", tmp_path, method=method, group_size=64)
    export(run, tmp_path / "model.rcp")  # which compares the hashes
    student = make_student(str(tmp_path / "checkpoint"), method=method, group_size=64)
    tokens = torch.arange(24)[None]
    with RcpFile.open(tmp_path / "model.rcp") as file, torch.no_grad():
        assert file.quantization.method == method
        decoder = baked_decoder(file.architecture, file.quantization, file.tensor)
        assert torch.equal(decoder(tokens), student(tokens))


def test_same_run_gives_same_bytes(run: Run, original_run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "a.rcp")
    export(Run.open(original_run.folder), tmp_path / "b.rcp")
    assert (tmp_path / "a.rcp").read_bytes() == (tmp_path / "b.rcp").read_bytes()


def test_changed_weights_are_refused_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    tensors = load_file(run.folder / BAKED)
    tensors["layers.1.mlp.up.codes"][3, 5] ^= 0b01
    save_file(tensors, run.folder / BAKED)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportMismatch, match=r"layers\.1\.mlp\.up\.codes: the values are not those"):
        export(Run.open(run.folder), tmp_path / "out" / "model.rcp")
    assert list((tmp_path / "out").iterdir()) == []


def make_older(run: Run, **tensors: str) -> Run:
    """A run that does not say whether its tensors were decoded, with other hashes of some."""
    record = json.loads((run.folder / WEIGHT_HASHES).read_bytes())
    del record["decoded"]
    write_json(run.folder / WEIGHT_HASHES, record | {"tensors": record["tensors"] | tensors})
    return Run.open(run.folder)


def test_an_older_run_is_exported_to_the_same_bytes(run: Run, original_run: Run, tmp_path: Path) -> None:
    export(make_older(run), tmp_path / "a.rcp")
    export(original_run, tmp_path / "b.rcp")
    assert (tmp_path / "a.rcp").read_bytes() == (tmp_path / "b.rcp").read_bytes()


def test_weights_of_an_older_run_are_decoded(run: Run, tmp_path: Path) -> None:
    """Even where the tensors are as its record says."""
    tensors = load_file(run.folder / BAKED)
    changed = "layers.1.mlp.up.codes"
    tensors[changed][3, 5] ^= 0b01
    save_file(tensors, run.folder / BAKED)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportMismatch, match=r"layers\.1\.mlp\.up: the weights are not those"):
        export(make_older(run, **{changed: hash_tensor(tensors[changed])}), tmp_path / "out" / "model.rcp")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_ends_only_when_its_tensors_decode_to_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = codec.pack_codes
    monkeypatch.setattr(codec, "pack_codes", lambda codes: pack(codes ^ (np.arange(codes.shape[1]) == 9)))
    with pytest.raises(ExportMismatch, match=r"layers\.0\.attn\.q: codes, levels and scale decode to other weights"):
        make_tiny_run("llama3", tmp_path)
    assert not (tmp_path / "run" / BAKED).exists()


def test_export_needs_no_torch(run: Run, tmp_path: Path) -> None:
    """Importing it takes longer than writing the file of a small model."""
    command = ["export", "--run", str(run.folder), "--out", str(tmp_path / "model.rcp")]
    program = f"import sys\nsys.modules['torch'] = None\nfrom rcpconv.cli import main\nmain({command!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "formats")))}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert RcpFile.open(tmp_path / "model.rcp", verify=True).architecture == run.architecture


@pytest.mark.parametrize("k", [1, 5, 172])
def test_hash_of_packed_weights_is_that_of_the_weights(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcpconv.proof._HASHED_WEIGHTS", 4 * k)
    rng = np.random.default_rng(k)
    groups = -(-k // 64)
    linear = PackedLinear(
        name="l",
        shape=(7, k),
        group_size=64,
        codes=pack_codes(rng.integers(0, 4, (7, k), dtype=np.uint8)),
        levels=np.sort(rng.integers(-127, 128, (7, groups, 4), dtype=np.int8), axis=-1),
        scale=rng.random(7, dtype=np.float32),
    )
    assert hash_decoded(linear) == hash_weights(linear.weights())


def test_hashes_of_other_layers_are_refused(run: Run, tmp_path: Path) -> None:
    hashes = json.loads((run.folder / WEIGHT_HASHES).read_bytes())
    del hashes["weights"]["layers.0.attn.q"]
    write_json(run.folder / WEIGHT_HASHES, hashes)
    with pytest.raises(ExportMismatch, match=r"weights\.sha256\.json.*layers\.0\.attn\.q"):
        export(Run.open(run.folder), tmp_path / "model.rcp")


@pytest.mark.parametrize("name", ["layers.0.act_clip", "embed.scale", "embed.weight", "head.weight", "rope.inv_freq"])
def test_every_other_tensor_has_to_be_as_trained(run: Run, tmp_path: Path, name: str) -> None:
    tensors = load_file(run.folder / BAKED)
    tensors[name] = (
        np.nextafter(tensors[name], np.array(0, tensors[name].dtype)) if "weight" not in name else -tensors[name]
    )
    save_file(tensors, run.folder / BAKED)
    with pytest.raises(ExportMismatch, match=rf"{name}: the values are not those"):
        export(Run.open(run.folder), tmp_path / "model.rcp")
    assert not (tmp_path / "model.rcp").exists()


def test_another_tokenizer_is_refused(run: Run, tmp_path: Path) -> None:
    (run.folder / TOKENIZER).write_bytes(run.tokenizer_json + b"\n")
    with pytest.raises(ExportMismatch, match=r"tokenizer\.json: the values are not those"):
        export(Run.open(run.folder), tmp_path / "model.rcp")


@pytest.mark.parametrize("damage", ["cut", "missing"])
@pytest.mark.parametrize("name", [RECORD, RECIPE, TOKENIZER, BAKED, WEIGHT_HASHES])
def test_a_damaged_run_folder_is_refused(run: Run, tmp_path: Path, name: str, damage: str) -> None:
    content = (run.folder / name).read_bytes()
    (run.folder / name).unlink()
    if damage == "cut":
        (run.folder / name).write_bytes(content[: len(content) // 2] + b"\n[")  # TOML may be whole at any line's end
    refused = RunNotFound if (name, damage) == (RECORD, "missing") else (BadRun, FormatError)
    with pytest.raises(refused, match=re.escape(name)):
        export(Run.open(run.folder), tmp_path / "model.rcp")


@pytest.mark.parametrize("key", ["model", "architecture", "quantization", "tokenizer", "generation", "provenance"])
def test_a_record_without_an_entry_is_refused(run: Run, tmp_path: Path, key: str) -> None:
    write_json(run.folder / RECORD, {name: value for name, value in run.record.items() if name != key})
    with pytest.raises(BadRun, match=rf"run\.json: .* entry '?{key}.*; restore the file or run quantize again"):
        export(Run.open(run.folder), tmp_path / "model.rcp")


def test_existing_file_stays_without_force(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "model.rcp"
    out.write_text("mine")
    with pytest.raises(OutputExists):
        export(run, out)
    assert out.read_text() == "mine"
    export(run, out, force=True)
    RcpFile.open(out, verify=True)


def test_unfinished_run_is_refused(run: Run, tmp_path: Path) -> None:
    run.update(status=RUNNING)
    with pytest.raises(BadRun, match="not finished"):
        export(Run.open(run.folder), tmp_path / "model.rcp")


def test_file_tells_origin_and_recipe_but_no_local_path(run: Run, tmp_path: Path) -> None:
    settings = {"data": [str(tmp_path / "text.txt"), "hf:org/name"], "eval_data": str(tmp_path / "heldout.txt")}
    (run.folder / RECIPE).write_text(run.config.changed(**settings).to_toml())
    run.update(evaluation={"text": str(tmp_path / "heldout.txt"), "perplexity": {"original": 10.0}})
    run = Run.open(run.folder)
    export(run, tmp_path / "model.rcp")
    with RcpFile.open(tmp_path / "model.rcp") as file:
        provenance = file.metadata.provenance
    assert provenance["base_model"] == "checkpoint"
    assert provenance["recipe"]["loss"] == "cakld"
    assert provenance["recipe"]["data"] == ["text.txt", "hf:org/name"]
    assert provenance["evaluation"] == {"text": "heldout.txt", "perplexity": {"original": 10.0}}
    assert str(tmp_path) not in json.dumps(provenance)


def test_llama_2_7b_shrinks_at_least_6_2_times() -> None:
    sizes = account(LLAMA_2_7B, Quantization(method="ldp"), tokenizer_bytes=1_843_000)
    assert sizes.ratio >= 6.2, sizes.ratio
    assert sizes.fp16_bytes == 2 * 6_738_415_616


def test_size_counts_a_tied_checkpoint_once() -> None:
    tied = account(LLAMA_2_7B, Quantization(method="ldp"), tied_checkpoint=True)
    found = model_size(LLAMA_2_7B, Quantization(method="ldp"), {"parameters": tied.fp16_bytes // 2}, 0)
    assert found.fp16_bytes == tied.fp16_bytes == 2 * (6_738_415_616 - 32000 * 4096)
    untied = dataclasses.replace(LLAMA_2_7B, vocab_size=100)
    assert model_size(untied, Quantization(method="ldp"), {}, 0) == account(untied, Quantization(method="ldp"))


def test_inspection_counts_codes_levels_and_bytes(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "model.rcp")
    report = inspect_file(tmp_path / "model.rcp")
    json.dumps(report)
    assert [linear["name"] for linear in report["linears"]] == spec.linear_names(run.architecture)
    listed = sum(linear["bytes"] for linear in report["linears"]) + sum(t["bytes"] for t in report["other_tensors"])
    with RcpFile.open(tmp_path / "model.rcp") as file:
        assert listed == sum(entry.nbytes for entry in file.header_tensors.values())
        levels = file.tensor("layers.0.mlp.down.levels")
    down = report["linears"][6]
    assert report["sizes"]["bytes"] == report["file_bytes"] == (tmp_path / "model.rcp").stat().st_size
    assert sum(down["code_shares"]) == pytest.approx(1)
    assert down["level_shares"][0] == pytest.approx(np.mean(levels <= -113))
    assert down["level_shares"][8] == pytest.approx(np.mean(abs(levels) <= 7))


@pytest.mark.parametrize("k", [1, 5, 128, 172])
def test_code_counts_leave_out_padding(k: int) -> None:
    codes = np.random.default_rng(k).integers(0, 4, (7, k), dtype=np.uint8)
    np.testing.assert_array_equal(code_counts(pack_codes(codes), k), np.bincount(codes.ravel(), minlength=4))


def test_bars_show_every_bin_that_is_not_empty() -> None:
    assert bars([0, 1e-9, 0.5, 1]) == " ▁▄█"


def test_hash_is_of_the_weights_in_row_major_order() -> None:
    weights = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert hash_weights(weights) == hashlib.sha256(b"".join(w.tobytes() for w in weights.ravel())).hexdigest()
