"""What models write: repetition against hand-counted cases, continuations, agreement with the teacher."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rcpconv import cached
from rcpconv.baking import baked_decoder
from rcpconv.cli import main
from rcpconv.errors import EvaluationFailed
from rcpconv.evaluate import evaluate, tokenize
from rcpconv.generation import PROMPT_TOKENS, GenerationResult, Repetition, Task, distinct, longest_repeat, verdict
from rcpconv.heldout import Text
from rcpconv.model import Decoder
from rcpconv.prepare import original_decoder
from rcpconv.runs import Run
from rcpformat.architecture import TokenizerInfo
from tiny_checkpoints import CORPUS
from tiny_runs import make_tiny_run

TEXT = Text("a text", " ".join(CORPUS * 3))
INFO = TokenizerInfo(bos_id=0, eos_ids=(1, 2), add_bos=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run("llama32", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def teacher(run: Run) -> Decoder:
    return original_decoder(run.source())


def task(run: Run, count: int = 3, tokens: int = 12) -> Task:
    return Task.cut(tokenize(run.tokenizer_json, TEXT.content), INFO, count=count, tokens=tokens, context=128)


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ([1, 2, 1, 2], 1, 2 / 4),
        ([1, 2, 1, 2], 2, 2 / 3),  # 12, 21, 12
        ([1, 2, 1, 2], 3, 1),
        ([7, 7, 7, 7, 7], 4, 1 / 2),
        ([1, 2, 3], 4, 1),  # none at all
    ],
)
def test_distinct(tokens: list[int], n: int, share: float) -> None:
    assert distinct(tokens, n) == share


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        ([], 0),
        ([5], 0),
        ([1, 2, 3], 0),
        ([1, 2, 1], 1),
        ([7, 7, 7, 7, 7], 4),  # overlapping
        ([1, 2, 3, 4, 9, 1, 2, 3, 8, 2, 3, 4], 3),
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 6),  # 123412 twice
    ],
)
def test_longest_repeat(tokens: list[int], length: int) -> None:
    assert longest_repeat(tokens) == length


def test_repetition_is_the_mean_over_texts() -> None:
    found = Repetition.of([[7, 7, 7, 7, 7], [1, 2, 3, 4, 5]])
    assert found.distinct == [(1 / 5 + 1) / 2, (1 / 4 + 1) / 2, (1 / 3 + 1) / 2, (1 / 2 + 1) / 2]
    assert (found.rate, found.longest_repeat) == (1 / 4, 2)


def test_prompts_are_cut_at_even_distances(run: Run) -> None:
    text = list(range(10, 110))
    cut = Task.cut(text, INFO, count=3, tokens=8, context=64)
    assert [prompt[:2] for prompt in cut.prompts] == [[0, 10], [0, 40], [0, 70]]
    assert all(len(prompt) == 1 + PROMPT_TOKENS for prompt in cut.prompts)
    assert cut.continuations[-1] == list(range(102, 110))
    with pytest.raises(EvaluationFailed, match=r"at most 31, .*context of 64.* found 32"):
        Task.cut(text, INFO, count=3, tokens=32, context=64)
    with pytest.raises(EvaluationFailed, match=r"at least 104 tokens to take 65 prompts from, found 100"):
        Task.cut(text, INFO, count=65, tokens=8, context=64)


def test_greedy_continuations_are_the_models_likeliest_tokens(run: Run, teacher: Decoder) -> None:
    asked = task(run)
    text = asked.prompts[0]
    with torch.inference_mode():
        for _ in range(asked.tokens):
            logits = teacher(torch.tensor([text]))[0, -1]
            logits[list(INFO.eos_ids)] = -torch.inf
            text = [*text, int(logits.argmax())]
    assert asked.write(teacher).greedy[0] == text[len(asked.prompts[0]) :]


def test_continuations_are_the_same_every_time_and_never_end(
    run: Run, teacher: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dataclasses.replace(task(run), never=tuple(range(250)))
    written = asked.write(teacher)
    assert asked.write(teacher) == written != asked.write(baked_decoder(run.architecture, run.quantization, run.tensor))
    assert written.greedy != written.sampled
    for texts in (written.greedy, written.sampled):
        assert [len(text) for text in texts] == [12, 12, 12]
        assert min(map(min, texts)) >= 250
    monkeypatch.setitem(cached._LARGEST_BATCH, "cpu", 2)
    assert asked.write(teacher).greedy == written.greedy


def test_a_model_agrees_with_its_own_greedy_text(run: Run, teacher: Decoder) -> None:
    asked = task(run)
    greedy = asked.write(teacher).greedy
    assert asked.agreement(teacher, greedy) == 1
    wrong = [[*text[:-3], *((token + 1) % 250 for token in text[-3:])] for text in greedy]
    assert asked.agreement(teacher, wrong) < 1 - 2 / 12


def test_the_command_prints_a_table_and_writes_json(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT.content)
    options = ["--text", str(tmp_path / "text.txt"), "--generations", "2", "--generation-tokens", "9"]
    target = tmp_path / "found.json"
    result = CliRunner().invoke(main, ["eval", "--run", str(run.folder), *options, "--json", str(target)])
    assert result.exit_code == 0, result.output
    assert "2 prompts of 32 tokens, continued by 9" in result.output
    assert "above that of original)" in result.output
    found = json.loads(target.read_text())["generations"]
    assert "collapse" in found["verdict"]
    kinds = [(row["name"], row["decoding"]) for row in found["results"]]
    both = ("greedy", "sampled")
    assert kinds == [("text itself", ""), *(("original", d) for d in both), *(("fake-quant", d) for d in both)]
    assert [row["teacher_agreement"] is None for row in found["results"]] == [True, True, True, False, True]
    assert all(len(row["repetition"]["distinct"]) == 4 for row in found["results"])


def result(name: str, decoding: str, rate: float) -> GenerationResult:
    return GenerationResult(
        name=name, decoding=decoding, repetition=Repetition(distinct=[1, 1, 1, 1 - rate], rate=rate, longest_repeat=9)
    )


def test_the_verdict_names_what_collapsed_and_by_which_criterion() -> None:
    criterion = r"repetition more than 10 percentage points above that of original"
    original = [result("text itself", "", 0), result("original", "greedy", 0.5), result("original", "sampled", 0.1)]
    fine = [result("ldp", "greedy", 0.6), result("ldp", "sampled", 0.05)]
    assert verdict([*original, *fine], "original") == f"no collapse ({criterion})"
    bad = [result("rtn", "greedy", 0.61), result("rtn", "sampled", 0.2), result("seq", "sampled", 0.9)]
    assert verdict([*original, *fine, *bad], "original") == (
        f"collapsed ({criterion}): rtn, greedy (61.0% against 50.0%); seq, sampled (90.0% against 10.0%)"
    )
    assert verdict([original[0], *fine], "original").startswith("not judged")
    assert verdict(original, "original").startswith("not judged")


def test_generations_without_a_number_are_64() -> None:
    options = {parameter.name: parameter for parameter in main.commands["eval"].params}  # type: ignore[attr-defined]
    assert options["generations"].flag_value == 64
    assert options["generation_tokens"].default == 256


def test_generations_need_a_torch_model(run: Run) -> None:
    with pytest.raises(EvaluationFailed, match="torch models"):
        evaluate(run=None, rcp=Path("model.rcp"), text=TEXT, generations=2)
