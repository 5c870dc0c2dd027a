"""What a user types, from a checkpoint folder to generated text: quantize, export, verify, run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import rcpconv.cli
import rcprun.cli
from rcpconv.runs import newest_finished
from rcpformat import RcpFile
from tiny_checkpoints import CORPUS, make_tiny_checkpoint


def run(*arguments: str) -> str:
    main = rcpconv.cli.main if arguments[0] == "rcpconv" else rcprun.cli.main
    result = CliRunner().invoke(main, arguments[1:])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("bits", [4, 8])
def test_from_a_checkpoint_to_text(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With activations and KV cache of so many bits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RCPCONV_RUNS", raising=False)
    make_tiny_checkpoint("llama32", tmp_path / "tiny")
    Path("text.txt").write_text("\n\n\n".join(CORPUS * 4), encoding="utf-8")
    training = ("--data", "text.txt", "--eval-data", "text.txt", "--steps", "2", "--seq-len", "32", "--batch-size", "2")
    scheme = () if bits == 4 else ("--a-bits", str(bits), "--kv-bits", str(bits))
    run("rcpconv", "quantize", "tiny", *training, *scheme, "--lr", "1e-3", "--device", "cpu")
    run("rcpconv", "export", "--out", "model.rcp")
    run("rcpconv", "verify", "model.rcp")
    with RcpFile.open("model.rcp") as file:
        assert file.architecture.tied_table
        assert (file.quantization.a_bits, file.quantization.kv_bits) == (bits, bits)
        measured = file.metadata.provenance["evaluation"]["perplexity"]
    run("rcpconv", "eval", "--rcp", "model.rcp", "--text", "text.txt", "--json", "eval.json", "--device", "cpu")
    rows = {row["name"]: row["perplexity"] for row in json.loads(Path("eval.json").read_text())["models"]}
    assert rows["fake-quant"] == pytest.approx(measured["fake-quant"], rel=1e-5)
    assert rows["original"] == pytest.approx(measured["original"], rel=1e-5)
    assert rows["rcp"] == pytest.approx(rows["fake-quant"], rel=0.02)
    assert newest_finished(Path("rcp-runs")).record["model"] == str(tmp_path / "tiny")

    options = ("model.rcp", "--prompt", "The rain had", "-n", "8", "--json")
    greedy = [json.loads(run("rcp-run", *options, "--temp", "0")) for _ in range(2)]
    assert greedy[0]["text"] == greedy[1]["text"]
    seeded = [json.loads(run("rcp-run", *options, "--seed", "1")) for _ in range(2)]
    assert seeded[0]["text"] == seeded[1]["text"]
