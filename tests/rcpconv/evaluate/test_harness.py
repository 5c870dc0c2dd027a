"""lm-evaluation-harness on torch models: answers against sums over log-softmax, and its tasks on all three models."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lm_tasks import CHOICES, NAMES, TEXTS, write_tasks
from rcpconv import harness
from rcpconv.baking import baked_decoder
from rcpconv.cli import main
from rcpconv.errors import EvaluationFailed
from rcpconv.export import export
from rcpconv.harness import Answers, Tasks, task_table, windows
from rcpconv.prepare import original_decoder
from rcpconv.runs import Run
from rcpformat.architecture import TokenizerInfo
from tiny_runs import make_tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run("llama32", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def answers(run: Run) -> Answers:
    return Answers(original_decoder(run.source()), run.tokenizer_json, run.tokenizer)


def ask(*questions: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=question) for question in questions]


@torch.inference_mode()
def directly(answers: Answers, tokens: list[int], count: int) -> float:
    logprobs = answers.decoder(torch.tensor([tokens]))[0].double().log_softmax(-1)
    return sum(logprobs[i - 1, tokens[i]].item() for i in range(len(tokens) - count, len(tokens)))


def encode(answers: Answers, text: str) -> list[int]:
    ids: list[int] = answers.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_loglikelihoods_are_sums_over_the_continuation(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    bos = answers.info.bos_id
    assert answers.info.add_bos and bos is not None
    begin, both = encode(answers, "The rain"), encode(answers, "The rain had stopped")
    long = encode(answers, " x" * 100 + " y")
    assert len(long) > 128
    expected = [
        directly(answers, [bos, *both], len(both) - len(begin)),
        directly(answers, [bos, *both], len(both) - len(begin)),  # the space is the continuation's
        directly(answers, [bos, *both], len(both)),
        directly(answers, long[-128:], len(long) - len(encode(answers, " x" * 100))),
    ]
    questions = [("The rain", " had stopped"), ("The rain ", "had stopped"), ("", "The rain had stopped")]
    questions.append((" x" * 100, " y"))
    for side_by_side in (harness._BATCH_TOKENS, 1):
        monkeypatch.setattr(harness, "_BATCH_TOKENS", side_by_side)
        found = answers.loglikelihood(ask(*questions))
        assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(EvaluationFailed, match="does not fit into the context of 128"):
        answers.loglikelihood(ask(("a", " x" * 200)))


@torch.inference_mode()
def test_a_greedy_continuation_is_told(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [5, 6]
    tokens.append(int(answers.decoder(torch.tensor([tokens]))[0, -1].argmax()))
    pieces = {"greedy": (tokens, 1), "other": ([5, 6, tokens[2] ^ 1], 1)}
    monkeypatch.setattr(Answers, "_pair", lambda _, context, continuation: pieces[continuation])
    assert [greedy for _, greedy in answers.loglikelihood(ask(("", "greedy"), ("", "other")))] == [True, False]


def test_a_text_is_scored_whole_in_windows_of_the_context(answers: Answers) -> None:
    text = " x y" * 90
    tokens = [answers.info.bos_id, *encode(answers, text)]
    pieces = list(windows(tokens, 128))  # type: ignore[arg-type]
    assert len(pieces) > 2 and sum(count for _, count in pieces) == len(tokens) - 1
    expected = sum(directly(answers, list(piece), count) for piece, count in pieces)
    found = answers.loglikelihood_rolling(ask((text,), ("",), ("The",)))
    short = [tokens[0], *encode(answers, "The")]
    assert found == pytest.approx([expected, 0, directly(answers, short, len(short) - 1)], abs=1e-2)  # type: ignore[arg-type]


def test_windows_are_those_of_the_harness() -> None:
    assert [(list(tokens), n) for tokens, n in windows(range(11), 5)] == [
        ([0, 1, 2, 3, 4], 4),
        ([4, 5, 6, 7, 8], 4),
        ([6, 7, 8, 9, 10], 2),
    ]


@torch.inference_mode()
def test_generations_are_greedy_and_end_where_the_task_says(answers: Answers) -> None:
    def greedy(prompt: str, count: int) -> str:
        tokens = [answers.info.bos_id, *encode(answers, prompt)]
        begin = len(tokens)
        while len(tokens) < begin + count and (len(tokens) == begin or tokens[-1] not in answers.info.eos_ids):
            tokens.append(int(answers.decoder(torch.tensor([tokens]))[0, -1].argmax()))
        ids = tokens[begin:-1] if tokens[-1] in answers.info.eos_ids else tokens[begin:]
        text: str = answers.tokenizer.decode(ids)
        return text

    settings = {"until": ["\0"], "max_gen_toks": 8, "do_sample": False}
    prompts = ["The rain had", "He", "Are you certain?” she asked; the captain"]
    expected = [greedy(prompt, 8) for prompt in prompts]
    assert answers.generate_until(ask(*((prompt, settings) for prompt in prompts))) == expected
    stop = expected[0][2:4]
    cut = answers.generate_until(ask((prompts[0], settings | {"until": stop}), (prompts[1], settings)))
    assert cut == [expected[0][: expected[0].index(stop)], expected[1]]
    assert len(answers.generate_until(ask((" x" * 200, settings)))) == 1  # the end of the prompt is kept
    for refused, reason in (({"do_sample": True}, "sampled"), ({"repetition_penalty": 1.2}, "repetition_penalty")):
        with pytest.raises(EvaluationFailed, match=reason):
            answers.generate_until(ask(("He", settings | refused)))


def test_a_model_without_bos_and_eos_cannot_begin(run: Run) -> None:
    decoder = baked_decoder(run.architecture, run.quantization, run.tensor)
    answers = Answers(decoder, run.tokenizer_json, TokenizerInfo(bos_id=None, eos_ids=(), add_bos=False))
    with pytest.raises(EvaluationFailed, match="neither BOS nor EOS"):
        answers.loglikelihood_rolling(ask(("ab",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "arc_easy"], "pip install 'rcpconv[lm-eval]'"),
        (["--tasks", "arc_easy", "--agreement"], "--agreement"),
        (["--tasks", "arc_easy", "--window", "8"], "--window"),
        (["--limit", "3"], "go with --tasks"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Run, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(main, ["eval", "--run", str(run.folder), *options])
    assert result.exit_code == 1
    assert message in result.output


def test_the_table_has_a_column_for_every_model() -> None:
    found = {
        name: {"results": {"t": {"acc,none": value, "acc_stderr,none": 0.1}}} for name, value in (("a", 0.5), ("b", 1))
    }
    table = task_table(found)
    assert [list(column.cells) for column in table.columns] == [
        ["t"],
        ["acc"],
        ["0.5000 ± 0.1000"],
        ["1.0000 ± 0.1000"],
    ]


def test_tasks_of_local_files_on_original_run_and_file(run: Run, answers: Answers, tmp_path: Path) -> None:
    """A multiple-choice task, a perplexity and a generation, as somebody without a network would run them."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed: pip install 'rcpconv[lm-eval]'")
    export(run, tmp_path / "model.rcp")
    command = [sys.executable, "-m", "rcpconv", "eval", "--run", str(run.folder), "--rcp", str(tmp_path / "model.rcp")]
    command += ["--tasks", NAMES, "--tasks-path", str(write_tasks(tmp_path / "tasks")), "--num-fewshot", "0"]
    environment = os.environ | {
        "PYTHONPATH": ":".join(sys.path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    target = tmp_path / "found.json"
    result = subprocess.run([*command, "--json", str(target)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = {name: results["results"] for name, results in json.loads(target.read_text()).items()}
    assert list(found) == ["original", "fake-quant", "rcp"]

    right = 0
    for question in CHOICES:
        scores = answers.loglikelihood(ask(*((question["question"], choice) for choice in question["choices"])))
        right += max(range(len(scores)), key=lambda i: scores[i][0]) == question["answer"]
    assert found["original"]["tiny_choice"]["acc,none"] == right / len(CHOICES)
    total = sum(
        directly(answers, list(piece), count)
        for text in TEXTS
        for piece, count in windows([answers.info.bos_id, *encode(answers, text)], 128)  # type: ignore[list-item]
    )
    perplexity = math.exp(-total / sum(len(text.encode()) for text in TEXTS))
    assert found["original"]["tiny_text"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    trained, file = (found[name]["tiny_text"]["byte_perplexity,none"] for name in ("fake-quant", "rcp"))
    assert file == pytest.approx(trained, rel=0.02)
    assert trained != found["original"]["tiny_text"]["byte_perplexity,none"]
    assert all("exact_match,none" in results["tiny_generate"] for results in found.values())


def test_what_the_runtime_says_reaches_the_user(run: Run, tmp_path: Path) -> None:
    (tmp_path / "no.rcp").write_bytes(b"no file")
    with pytest.raises(EvaluationFailed, match=r"no\.rcp: rcp-run could not evaluate it: rcp-run: "):
        Tasks(names=("arc_easy",)).run_file(tmp_path / "no.rcp")
