"""`rcp-run` and `rcp-run score`: what they print where, and what they return."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from byte_model import BOS, CHAT_TEMPLATE, TURN, byte_ids
from rcpformat.reader import RcpFile
from rcprun.backends.numpy.reference import ReferenceModel
from rcprun.cli import main
from rcprun.model import load

ROOT = Path(__file__).parents[2]
WriteModel = Callable[..., Path]


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fails(code: int, message: str, *arguments: object, stdin: str | bytes | None = None) -> None:
    """One line on standard error, nothing on standard output, this exit code."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.fixture
def path(write_model: WriteModel) -> Path:
    return write_model(chat_template=CHAT_TEMPLATE)


def test_text_goes_to_stdout_and_a_summary_to_stderr(path: Path) -> None:
    result = run(path, "--prompt", "abc", "-n", 8, "--temp", 0)
    assert result.exit_code == 0
    expected = load(path).generate("abc", max_tokens=8, temperature=0.0)
    assert result.stdout == expected.text + "\n"
    for part in (
        "[numpy] prefill 4 tokens",
        "decode 7 tokens",
        "tokens/s",
        "length",
        "weights",
        "KV cache",
        "peak RSS",
    ):
        assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_json(path: Path) -> None:
    result = run(path, "-p", "abc", "-n", 8, "--seed", 5, "--json")
    answer = json.loads(result.stdout)
    expected = load(path).generate("abc", max_tokens=8, seed=5)
    assert (answer["text"], answer["tokens"], answer["seed"]) == (expected.text, expected.tokens, 5)
    assert (answer["prompt_tokens"], answer["stop_reason"], answer["backend"]) == (4, expected.stop_reason, "numpy")
    assert answer["timings"]["decode_tokens"] == len(answer["tokens"]) - 1
    assert answer["memory"]["weights"] > 0


def test_prompt_from_file_and_stdin(path: Path, tmp_path: Path) -> None:
    options = ("-n", 5, "--temp", 0)
    expected = run(path, "--prompt", "é b", *options).stdout
    (tmp_path / "prompt.txt").write_text("é b", encoding="utf-8")
    assert run(path, "-f", tmp_path / "prompt.txt", *options).stdout == expected
    assert run(path, *options, stdin="é b").stdout == expected
    assert run(path, "-f", "-", *options, stdin="é b").stdout == expected


def test_sampling_options_reach_the_sampler(write_model: WriteModel) -> None:
    """The model's defaults hold until an option overrides them."""
    path = write_model(generation={"temperature": 0.0})
    greedy = run(path, "--prompt", "abc", "-n", 10).stdout
    assert run(path, "--prompt", "abc", "-n", 10, "--seed", 9).stdout == greedy
    assert run(path, "--prompt", "abc", "-n", 10, "--temp", 2, "--top-k", 0, "--seed", 9).stdout != greedy
    assert run(path, "--prompt", "abc", "-n", 10, "--temp", 2, "--top-k", 1).stdout == greedy
    assert run(path, "--prompt", "abc", "-n", 10, "--temp", 2, "--top-p", 0).stdout == greedy
    assert run(path, "--prompt", "abc", "-n", 10, "--temp", 2, "--min-p", 1).stdout == greedy
    assert run(path, "--prompt", "abc", "-n", 10, "--repeat-penalty", 100).stdout != greedy


def test_one_newline_at_the_end_of_a_file_is_dropped(path: Path, tmp_path: Path) -> None:
    def prompt_tokens(*arguments: object, stdin: bytes | None = None) -> int:
        return int(json.loads(run(path, "-n", 1, "--json", *arguments, stdin=stdin).stdout)["prompt_tokens"])

    (tmp_path / "prompt.txt").write_bytes(b"ab\r\n")
    assert prompt_tokens("-f", tmp_path / "prompt.txt") == prompt_tokens(stdin=b"ab\n") == 3
    assert prompt_tokens(stdin=b"ab\n\n") == prompt_tokens("--prompt", "ab\n") == 4
    fails(2, "the prompt is empty", path, stdin="\n")


def test_several_prompts_are_answered_in_order(path: Path, tmp_path: Path) -> None:
    options = ("-n", 6, "--temp", 1.5, "--parallel", 4)
    prompts = ["abc", "a long one " * 5, "x"]
    alone = [run(path, "-p", each, *options, "--seed", 7 + n).stdout for n, each in enumerate(prompts)]
    repeated = [word for each in prompts for word in ("-p", each)]
    result = run(path, *repeated, *options, "--seed", 7)
    headings = ["abc", ("a long one " * 5)[:54], "x"]
    assert result.stdout == "".join(f"==> {h} <==\n{text}" for h, text in zip(headings, alone, strict=True))
    assert "[numpy] 3 prompts of 62 tokens, 1 at a time | 18 generated in " in result.stderr
    assert result.stderr.count("\n") == 1
    (tmp_path / "prompts.txt").write_text("\n".join(["", *prompts, ""]))
    assert run(path, "--prompt-file", tmp_path / "prompts.txt", *options, "--seed", 7).stdout == result.stdout
    lines = run(path, *repeated, *options, "--seed", 7, "--json").stdout.splitlines()
    assert [json.loads(line)["text"] + "\n" for line in lines] == alone
    assert [json.loads(line)["seed"] for line in lines] == [7, 8, 9]


def test_several_messages_are_a_chat_each(path: Path) -> None:
    chat = ("--chat", "--system", "S", "-n", 4, "--temp", 0, "--json")
    alone = [json.loads(run(path, *chat, "-p", each).stdout)["tokens"] for each in ("hi", "you")]
    lines = run(path, *chat, "-p", "hi", "-p", "you").stdout.splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == alone


def test_memory_of_a_gpu_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcprun.backends.numpy.NumpyBackend.memory_report", "GPU memory: all of it", raising=False)
    assert run(path, "-p", "a", "-n", 1).stderr.startswith("GPU memory: all of it\n")
    assert run("score", path, "--tokens", "-", stdin="[3]\n").stderr == "GPU memory: all of it\n"


def test_stop_strings(path: Path) -> None:
    whole = json.loads(run(path, "--prompt", "abc", "-n", 20, "--temp", 0, "--json").stdout)["text"]
    stop = whole[5:7]
    cut = json.loads(
        run(path, "--prompt", "abc", "-n", 20, "--temp", 0, "--json", "--stop", "never", "--stop", stop).stdout
    )
    assert (cut["text"], cut["stop_reason"]) == (whole[: whole.index(stop)], "stop")


def test_chat_with_a_prompt_is_one_turn(path: Path) -> None:
    answer = json.loads(run(path, "--chat", "--system", "S", "--prompt", "hi", "-n", 4, "--json", "--temp", 0).stdout)
    prompt = [BOS, *byte_ids("[system]S"), TURN, *byte_ids("[user]hi"), TURN, *byte_ids("[assistant]")]
    assert answer["prompt_tokens"] == len(prompt)
    assert answer["tokens"] == load(path).generate(prompt, max_tokens=4, temperature=0.0).tokens


def test_talking_turn_by_turn(path: Path) -> None:
    result = run(path, "--chat", "-n", 2, "--temp", 0, stdin="a\n\nb\n/clear\na\n/exit\nnot read\n")
    assert result.exit_code == 0
    replies = [line for line in result.stderr.splitlines() if "prefill" in line]
    assert len(replies) == 3
    model = load(path)
    first = model.chat([{"role": "user", "content": "a"}], max_tokens=2, temperature=0.0).text
    assert result.stdout.startswith(first + "\n")
    assert result.stdout.endswith(first + "\n")


def test_talk_goes_on_after_an_overflow(path: Path) -> None:
    result = run(path, "--chat", "-n", 1, stdin="x" * 70 + "\na\n")
    assert result.exit_code == 0
    assert "do not fit" in result.stderr and "/clear" in result.stderr
    assert result.stderr.count("prefill") == 1


def test_talk_goes_on_after_bytes_that_are_no_text(path: Path) -> None:
    result = run(path, "--chat", "-n", 1, stdin=b"caf\xe9\na\n")
    assert result.exit_code == 0
    assert "not UTF-8" in result.stderr
    assert result.stderr.count("prefill") == 1


def test_talk_that_cannot_work_fails_before_the_first_message(path: Path, write_model: WriteModel) -> None:
    fails(2, "top_p", path, "--chat", "--top-p", 2, stdin="a\n")
    result = run(write_model(), "--chat", stdin="a\n")
    assert (result.exit_code, result.stdout) == (7, "")
    assert result.stderr.startswith("rcp-run: this model has no chat template")


def test_verify_checks_hashes(path: Path) -> None:
    assert run(path, "--verify", "--prompt", "a", "-n", 1).exit_code == 0
    damaged = bytearray(path.read_bytes())
    entry = RcpFile.open(path).header_tensors["layers.0.attn.q.codes"]
    damaged[len(damaged) - max(e.end for e in RcpFile.open(path).header_tensors.values()) + entry.begin] ^= 1
    path.write_bytes(damaged)
    assert run(path, "--prompt", "a", "-n", 1).exit_code == 0
    fails(3, "SHA-256", path, "--verify", "--prompt", "a", "-n", 1)


def test_bad_files(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "other.rcp"
    other.write_bytes(b"GGUF" + bytes(100))
    cut = tmp_path / "cut.rcp"
    cut.write_bytes(path.read_bytes()[:-10])
    fails(3, "no such file", tmp_path / "missing.rcp", "--prompt", "a")
    fails(3, "other.rcp", other, "--prompt", "a")
    fails(3, "cut.rcp", cut, "--prompt", "a")
    assert run(cut, "--prompt", "a").stderr.count("cut.rcp") == 1
    fails(3, "name too long", "x" * 5000, "--prompt", "a")
    fails(3, "folder", tmp_path, "--prompt", "a")


def test_bad_prompts(path: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    fails(2, "the prompt is empty", path, "--prompt", "")
    fails(2, "the prompt is empty", path, stdin="")
    fails(2, "not UTF-8", path, "-f", tmp_path / "latin")
    fails(2, "not both", path, "--prompt", "a", "-f", tmp_path / "latin")
    fails(2, "not both", path, "--prompt", "a", "--prompt-file", tmp_path / "latin")
    fails(2, "the prompt is empty", path, "-p", "a", "-p", "")
    fails(2, "file of prompts is empty", path, "--prompt-file", "-", stdin="\n \n")
    fails(4, "do not fit into the context of 64", path, "-p", "a", "-p", "x" * 64)
    fails(4, "do not fit into the context of 64", path, "--prompt", "x" * 64)
    fails(4, "do not fit into the context of 8", path, "-c", 8, "--prompt", "x" * 8)


def test_bad_options(path: Path) -> None:
    fails(2, "temperature: expected a number of 0 or more", path, "--prompt", "a", "--temp", -1)
    fails(2, "top_p: expected a number from 0 to 1", path, "--prompt", "a", "--top-p", 2)
    fails(2, "top_p: expected a number from 0 to 1", "missing.rcp", "--prompt", "a", "--top-p", 2)
    fails(2, "from 1 to 64 tokens", path, "-c", 65, "--prompt", "a")
    fails(2, "--system goes with --chat", path, "--system", "S", "--prompt", "a")
    fails(2, "--json", path, "--chat", "--json")
    fails(2, "--parallel", path, "--chat", "--parallel", 2)
    assert run(path, "--prompt", "a", "-n", 0).exit_code == 2
    assert run().exit_code == 2


def test_no_gpu(path: Path) -> None:
    fails(5, "--backend numpy", path, "--prompt", "a", "--backend", "cuda")


def test_chat_templates_that_fail(write_model: WriteModel) -> None:
    fails(7, "no chat template", write_model(), "--chat", "--prompt", "a")
    fails(7, "TemplateSyntaxError", write_model(chat_template="{% if %}"), "--chat", "--prompt", "a")
    assert len(run(write_model(chat_template="{{ raise_exception('x' * 9999) }}"), "--chat", "-p", "a").stderr) < 600
    refusing = write_model(chat_template="{{ raise_exception('only\n for assistants') }}")
    fails(7, "only for assistants", refusing, "--chat", "--prompt", "a")


def test_out_of_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("rcprun.backends.create", explode)
    fails(8, "not enough memory", path, "--prompt", "a")


def test_help_names_the_exit_codes() -> None:
    for arguments in (["--help"], ["score", "--help"]):
        text = run(*arguments).stdout
        assert all(f"  {code}  " in text for code in (0, 2, 3, 4, 5, 6, 7, 8, 9, 130))
    assert "Usage: main [OPTIONS] MODEL" in run("--help").stdout
    for command in ([], ["score"], ["bench"]):
        assert run(*command, "-h").stdout == run(*command, "--help").stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("rcp-run, version ")


def test_exit_codes_are_those_of_the_readme() -> None:
    from rcprun import errors

    text = (ROOT / "runtime" / "README.md").read_text(encoding="utf-8")
    codes = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and c.__name__ != "RcpRunError"}
    for code in codes - {1} | {0, errors.INTERRUPTED_EXIT_CODE}:
        assert f"| {code} |" in text


def test_ctrl_c_ends_cleanly(write_model: WriteModel) -> None:
    """The text so far and the summary are printed, and the exit code is 130."""
    from dataclasses import replace

    from tiny_rcp import TINY

    path = write_model(architecture=replace(TINY, max_position_embeddings=1 << 20), eos_ids=())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "rcprun", str(path), "--prompt", "a", "-n", "1000000", "--temp", "2"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    assert child.stdout.read(20)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"| interrupted |" in stderr and b"Traceback" not in stderr


def test_score(path: Path, tmp_path: Path) -> None:
    sequences = [byte_ids("hello"), [7], byte_ids("a longer sequence")]
    lines = f"{json.dumps(sequences[0])}\n\n{json.dumps({'tokens': sequences[1]})}\n{json.dumps(sequences[2])}\n"
    (tmp_path / "tokens.jsonl").write_text(lines)
    arguments = ("score", path, "--tokens", tmp_path / "tokens.jsonl", "--top1", "--logits", tmp_path / "l.npy")
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    logits = np.load(tmp_path / "l.npy")
    assert (logits.shape, logits.dtype) == ((sum(map(len, sequences)), 259), np.float32)
    row = 0
    for line, tokens in zip(result.stdout.splitlines(), sequences, strict=True):
        answer = json.loads(line)
        own = logits[row : row + len(tokens)]
        row += len(tokens)
        np.testing.assert_allclose(own, ReferenceModel(RcpFile.open(path)).logits(tokens), atol=1e-4)
        log_softmax = own - np.log(np.exp(own.astype(np.float64)).sum(axis=1, keepdims=True))
        expected = [log_softmax[i, token] for i, token in enumerate(tokens[1:])]
        assert answer["n"] == len(tokens)
        assert answer["token_logprobs"] == pytest.approx(expected, abs=1e-5)
        assert answer["logprob"] == pytest.approx(sum(expected), abs=1e-4)
        assert answer["top1"] == own.argmax(axis=1).tolist()


def test_score_writes_a_file_and_overwrites_only_when_told(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("score", path, "--tokens", "-", "--out", out)
    assert run(*arguments, stdin="[3, 4]\n").exit_code == 0
    written = out.read_text()
    assert "top1" not in json.loads(written)
    fails(2, "--force", *arguments, stdin="[3]\n")
    assert out.read_text() == written
    assert run(*arguments, "--force", stdin="[3]\n").exit_code == 0
    assert json.loads(out.read_text())["n"] == 1
    assert {file.name for file in tmp_path.iterdir()} == {"m.rcp", "out.jsonl"}


@pytest.mark.parametrize(
    ("code", "message", "lines"),
    [
        (2, "line 2: not JSON", "[3]\n[3,\n"),
        (2, "line 1: expected a list of token ids", '{"ids": [3]}\n'),
        (2, "line 1: token 1: expected an id from 0 to 258, found 259", "[3, 259]\n"),
        (2, "line 1: token 0: expected an id", '["a"]\n'),
        (2, "line 1: the prompt is empty", "[]\n"),
        (2, "line 1: not JSON", b"[3, \xe9]\n"),
        (2, "line 1: not JSON", f"[{'9' * 5000}]\n"),
        (2, "line 1: not a list of token ids: nested too deeply", "[" * 100_000 + "\n"),
        (4, "line 1: 65 tokens do not fit", f"{[3] * 65}\n"),
    ],
)
def test_score_refuses_bad_lines(path: Path, code: int, message: str, lines: str | bytes) -> None:
    fails(code, message, "score", path, "--tokens", "-", stdin=lines)


@pytest.mark.parametrize("option", ["--out", "--logits"])
def test_score_into_a_folder_that_is_not_there(path: Path, tmp_path: Path, option: str) -> None:
    fails(9, "not a folder", "score", path, "--tokens", "-", option, tmp_path / "no" / "x", stdin="[3]\n")


def test_score_of_weights_that_overflow(write_model: WriteModel) -> None:
    path = write_model(scale=3e38)
    fails(3, "not finite", "score", path, "--tokens", "-", stdin="[3, 4]\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "rcprun", str(path), "--prompt", "a", "-n", "4"]
    with open("/dev/full", "wb") as full:
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert child.returncode == 9
    assert child.stderr.startswith(b"rcp-run: ") and child.stderr.count(b"\n") == 1
