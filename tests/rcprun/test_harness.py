"""What the runtime answers lm-evaluation-harness, against sums over log-softmax; no harness is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from byte_model import BOS, EOS, ScriptedBackend, byte_ids
from rcprun.cli import main
from rcprun.errors import BadRequest
from rcprun.harness import Answers, rows, run_tasks, windows
from rcprun.model import Model, load


def ask(*questions: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=question) for question in questions]


def directly(model: Model, tokens: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` tokens, by the logits after every token."""
    model.backend.truncate(0)
    logits = np.concatenate(list(model.backend.forward_all(tokens))).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = range(len(tokens) - count, len(tokens))
    return sum(logprobs[i - 1, tokens[i]] for i in places), all(logits[i - 1].argmax() == tokens[i] for i in places)


def test_loglikelihoods_are_sums_over_the_continuation(model: Model) -> None:
    questions = [("ab", "cde"), ("ab", "x"), ("ab ", "cd"), ("", "xyz"), ("  ", "q"), ("a" * 80, "bc")]
    expected = [
        ([BOS, *byte_ids("abcde")], 3),
        ([BOS, *byte_ids("abx")], 1),
        ([BOS, *byte_ids("ab cd")], 3),  # the space is the continuation's
        ([BOS, *byte_ids("xyz")], 3),
        ([BOS, *byte_ids("  q")], 3),
        (byte_ids("a" * 62 + "bc"), 2),  # the context of 64 keeps the end
    ]
    found = Answers(model).loglikelihood(ask(*questions))
    for (logprob, greedy), (tokens, count) in zip(found, expected, strict=True):
        assert (logprob, greedy) == (pytest.approx(directly(model, tokens, count)[0], abs=1e-4), False)


def test_a_greedy_continuation_is_told(model: Model) -> None:
    likeliest = byte_ids("ab?") * 3  # after each token of BOS a b, of BOS a c, and of BOS a b
    answers = Answers(Model(model.file, ScriptedBackend(likeliest)))
    found = answers.loglikelihood(ask(("a", "b"), ("a", "c"), ("", "ab")))
    assert [greedy for _, greedy in found] == [True, False, True]


def test_a_text_is_scored_whole_in_windows_of_the_context(model: Model) -> None:
    text = "".join(chr(97 + i % 26) for i in range(150))
    tokens = [BOS, *byte_ids(text)]
    expected = [(tokens[:64], 63), (tokens[63:127], 63), (tokens[87:], 24)]
    found = Answers(model).loglikelihood_rolling(ask((text,), ("a",)))
    assert found[0] == pytest.approx(sum(directly(model, *window)[0] for window in expected), abs=1e-3)
    assert found[1] == pytest.approx(directly(model, [BOS, *byte_ids("a")], 1)[0], abs=1e-4)


def test_windows_are_those_of_the_harness() -> None:
    stream = ["BOS", *range(10)]
    assert [(list(tokens), n) for tokens, n in windows(stream, 5)] == [  # type: ignore[arg-type]
        (["BOS", 0, 1, 2, 3], 4),
        ([3, 4, 5, 6, 7], 4),
        ([5, 6, 7, 8, 9], 2),
    ]
    assert list(windows([7], 5)) == []


def test_windows_agree_with_the_harness() -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="the extra lm-eval is not installed")
    for length in range(1, 14):
        text = list(range(1, length + 1))
        expected = [
            ([*inputs, predicted[-1]], len(predicted))
            for inputs, predicted in utils.get_rolling_token_windows(text, 0, 4, 1)
        ]
        assert [(list(tokens), n) for tokens, n in windows([0, *text], 5)] == expected


def test_generations_end_where_the_task_says(model: Model) -> None:
    answers = Answers(model)
    whole = model.generate("once", max_tokens=12, temperature=0).text
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    assert answers.generate_until(ask(("once", settings))) == [whole]
    stop = whole[2:4]
    cut = answers.generate_until(ask(("once", settings | {"until": stop})))
    assert cut == [whole[: whole.index(stop)]]
    long = answers.generate_until(ask(("x" * 100, settings)))
    assert long == [model.generate(byte_ids("x" * 52), max_tokens=12, temperature=0).text]
    drawn = settings | {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
    assert answers.generate_until(ask(("once", drawn))) == answers.generate_until(ask(("once", drawn)))
    with pytest.raises(BadRequest, match="repetition_penalty"):
        answers.generate_until(ask(("once", settings | {"repetition_penalty": 1.2})))


def test_without_bos_a_text_begins_after_eos_or_not_at_all(write_model: Callable[..., Path]) -> None:
    after_eos = load(write_model(bos_id=None, add_bos=False))
    expected = directly(after_eos, [EOS, *byte_ids("ab")], 2)[0]
    assert Answers(after_eos).loglikelihood(ask(("", "ab")))[0][0] == pytest.approx(expected, abs=1e-4)
    nothing = load(write_model(bos_id=None, add_bos=False, eos_ids=()))
    with pytest.raises(BadRequest, match="neither BOS nor EOS"):
        Answers(nothing).loglikelihood_rolling(ask(("ab",)))
    with pytest.raises(BadRequest, match="continuation of 64 tokens"):
        Answers(after_eos).loglikelihood(ask(("a", "b" * 64)))


def test_without_the_harness_the_command_says_what_to_install(
    write_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(
        main, ["eval", str(write_model()), "--tasks", "arc_easy", "--json", f"{tmp_path}/r.json"]
    )
    assert result.exit_code == 2
    assert "pip install 'rcpconv[lm-eval]'" in result.output
    assert not (tmp_path / "r.json").exists()


def test_unknown_tasks_are_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    known = SimpleNamespace(all_tasks=["arc_easy"])  # finding them all takes many seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: known)
    with pytest.raises(BadRequest, match="'none': lm-evaluation-harness knows no such task"):
        run_tasks(model, ["arc_easy", "none"], num_fewshot=None, limit=None)


def test_rows_have_the_standard_error_where_there_is_one() -> None:
    measured = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25, "em_stderr,strict": "N/A"}
    assert list(rows({"t": measured})) == [("t", "acc", 0.5, 0.1), ("t", "em (strict)", 0.25, None)]
