"""`rcpconv eval`: windows, perplexities of three models on the same text, and agreement between backends."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from loopback_hub import serve_hub
from rcpconv import evaluate as module
from rcpconv.cli import main
from rcpconv.errors import EvaluationFailed
from rcpconv.evaluate import Evaluation, Runtime, cut, evaluate, tokenize
from rcpconv.export import export
from rcpconv.heldout import Text, default_text, read_text
from rcpconv.runs import BAKED, Run
from tiny_checkpoints import CORPUS, make_tiny_checkpoint
from tiny_runs import make_tiny_run

TEXT = Text("a text", " ".join(CORPUS * 3))
WINDOW = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run("qwen3", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def rcp(run: Run) -> Path:
    path = run.folder.parent / "model.rcp"
    export(run, path)
    return path


@pytest.fixture(scope="module")
def evaluation(run: Run, rcp: Path) -> Evaluation:
    return evaluate(run=run, rcp=rcp, text=TEXT, window=WINDOW, compare=True, device="cpu")


def test_windows_do_not_overlap_and_drop_a_shorter_rest() -> None:
    assert cut(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(10), 4, max_tokens=9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(10), 4, max_tokens=7) == [[0, 1, 2, 3]]
    assert cut(range(3), 4) == [[0, 1, 2]]
    assert cut(range(1), 4) == []


def test_text_is_one_stream_without_special_tokens(run: Run) -> None:
    tokens = tokenize(run.tokenizer_json, TEXT.content)
    assert len(tokens) > 2 * WINDOW
    assert not set(tokens) & {0, 1, 2}


def test_original_perplexity_is_that_of_transformers(run: Run, evaluation: Evaluation, tmp_path: Path) -> None:
    model = make_tiny_checkpoint("qwen3", tmp_path)
    windows = torch.tensor(cut(tokenize(run.tokenizer_json, TEXT.content), WINDOW))
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1]
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())
    original = evaluation.models[0]
    assert (original.name, original.ratio) == ("original", 1)
    assert original.perplexity == pytest.approx(expected, rel=1e-5)
    assert original.bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert evaluation.tokens == windows[:, 1:].numel()


def test_file_scores_as_the_trained_model(evaluation: Evaluation, rcp: Path) -> None:
    original, trained, file = evaluation.models
    assert file.perplexity == pytest.approx(trained.perplexity, rel=0.02)
    assert abs(file.perplexity - trained.perplexity) < abs(trained.perplexity - original.perplexity)
    assert file.bytes == rcp.stat().st_size
    assert file.ratio == pytest.approx(original.bytes / file.bytes)  # type: ignore[operator]


def test_agreement_is_measured_beside_float64s(evaluation: Evaluation) -> None:
    runtime, single, double = "runtime", "torch float32", "torch float64"
    assert set(evaluation.agreement) == {f"{runtime} vs. {single}", f"{runtime} vs. {double}", f"{single} vs. {double}"}
    for difference in evaluation.agreement.values():
        assert difference.top1_agreement > 0.97
        assert 0 <= difference.mean_kl < 0.01
    json.dumps(dataclasses.asdict(evaluation))


def test_margins_of_agreement_have_standard_errors_over_windows() -> None:
    ours, unavoidable = module._DifferenceMeter(), module._DifferenceMeter()
    ours.windows = [(10, 8, 1.0), (10, 6, 3.0), (20, 16, 2.0)]
    unavoidable.windows = [(10, 9, 0.5), (10, 8, 0.5), (20, 16, 1.0)]
    found = ours.result(unavoidable)
    assert (found.top1_agreement, found.mean_kl) == (30 / 40, 6 / 40)
    assert (found.top1_margin, found.mean_kl_margin) == (-3 / 40, 4 / 40)
    # A ratio's standard error: of what is left of the windows' margins without the mean's share of their positions.
    rest = [-1 + 0.75, -2 + 0.75, 0 + 1.5]
    assert found.top1_margin_error == pytest.approx(math.sqrt(sum(r * r for r in rest) * 3 / 2) / 40)
    itself = unavoidable.result(unavoidable)
    assert (itself.top1_margin, itself.top1_margin_error, itself.mean_kl_margin_error) == (0, 0, 0)


def test_logits_come_in_files_of_bounded_size(rcp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    together = list(Runtime(rcp).logits(windows))
    assert [len(logits) for logits in together] == [3, 2, 4]
    monkeypatch.setattr(module, "LOGIT_FILE_BYTES", 1)
    for a, b in zip(together, Runtime(rcp).logits(windows), strict=True):
        assert (a == b).all()


def test_models_can_be_left_out(run: Run, rcp: Path) -> None:
    only = evaluate(run=run, rcp=rcp, text=TEXT, window=WINDOW, skip=("original", "rcp"))
    assert [model.name for model in only.models] == ["fake-quant"]
    only = evaluate(run=None, rcp=rcp, text=TEXT, max_tokens=100)
    assert [model.name for model in only.models] == ["rcp"]
    assert only.window == 128, "the model's context"
    with pytest.raises(EvaluationFailed, match="nothing to evaluate"):
        evaluate(run=run, rcp=None, text=TEXT, skip=("original", "fake-quant"))
    with pytest.raises(EvaluationFailed, match="--rcp"):
        evaluate(run=run, rcp=None, text=TEXT, compare=True)


def test_a_file_of_another_run_is_refused(rcp: Path, tmp_path: Path) -> None:
    other = make_tiny_run("qwen3", tmp_path, kv_bits=8)
    with pytest.raises(EvaluationFailed, match="not exported from"):
        evaluate(run=other, rcp=rcp, text=TEXT)


@pytest.mark.parametrize("name", ["layers.1.mlp.down.levels", "layers.1.attn.o.scale", "embed.weight"])
def test_a_file_of_a_run_that_differs_anywhere_is_refused(run: Run, rcp: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    tensors = load_file(run.folder / BAKED)
    tensors[name] = np.roll(tensors[name], 1, axis=0)
    save_file(tensors, tmp_path / "run" / BAKED)
    with pytest.raises(EvaluationFailed, match="not exported from"):
        evaluate(run=Run.open(tmp_path / "run"), rcp=rcp, text=TEXT)


def test_what_the_runtime_says_reaches_the_user(rcp: Path) -> None:
    with pytest.raises(EvaluationFailed, match=r"could not score.*context"):
        Runtime(rcp).perplexity([[5] * 200], "rcp")


@pytest.mark.parametrize("skip", [(), ("original", "rcp")])
def test_a_window_beyond_the_context_is_refused(run: Run, rcp: Path, skip: tuple[str, ...]) -> None:
    with pytest.raises(EvaluationFailed, match=r"window: expected at most 128 tokens.*found 129"):
        evaluate(run=run, rcp=rcp, text=TEXT, window=129, skip=skip)


@pytest.mark.parametrize("target", ["nowhere/results.json", "."])
def test_the_place_for_results_is_checked_first(tmp_path: Path, target: str) -> None:
    result = CliRunner().invoke(main, ["eval", "--rcp", "none.rcp", "--json", str(tmp_path / target)])
    assert result.exit_code == 1
    assert "expected a place for the results" in result.output


def test_text_has_to_be_text(tmp_path: Path, run: Run) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationFailed, match="UTF-8"):
        read_text(tmp_path / "text")
    for path in (tmp_path / "nope", tmp_path):
        with pytest.raises(EvaluationFailed, match=f"{path}: expected a readable text file, found"):
            read_text(path)
    assert len(default_text("demo").content) > 50_000
    with pytest.raises(EvaluationFailed, match="two tokens"):
        evaluate(run=run, rcp=None, text=Text("empty", ""))


def test_default_text_is_wikitext_2_joined_by_blank_lines(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("wikitext-2-raw/wiki.test.raw", " \n = A = \n \n One line . \n")
    code = (
        "from rcpconv.heldout import default_text; from rcpconv.errors import DownloadFailed\n"
        "try: print(repr(default_text('org/model').content))\n"
        "except DownloadFailed as error: print(error)\n"
    )
    with serve_hub() as hub:
        hub.add("datasets/ggml-org/ci", {"wikitext-2-raw-v1.zip": archive.getvalue()})
        online = hub.environment(tmp_path / "a") | {"PYTHONPATH": ":".join(sys.path)}
        offline = hub.environment(tmp_path / "b") | {"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"}
        children = [
            subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
            for env in (online, offline)
        ]
        outputs = [child.communicate()[0] for child in children]
    assert outputs[0] == repr("\n\n = A = \n\n\n\n\n One line . \n") + "\n"
    assert "--text FILE" in outputs[1]
