"""Conversations through a checkpoint's chat template: as transformers renders them, and within limits."""

import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rcpconv.checkpoint import load_source
from rcpconv.errors import BadTrainingData
from rcpconv.train import chats
from rcpconv.train.chats import ChatRenderer
from rcpformat.architecture import TokenizerInfo
from tiny_checkpoints import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer(True, False)
HI = [{"role": "user", "content": "hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def renderer(template: str | None) -> ChatRenderer:
    return ChatRenderer(
        "org/name", TOKENIZER, TokenizerInfo(bos_id=0, eos_ids=(1,), add_bos=True, chat_template=template)
    )


@pytest.mark.parametrize("model", ["demo", "tiny"])
def test_renders_what_transformers_renders(model: str, checkpoint: Path) -> None:
    source = load_source("demo" if model == "demo" else str(checkpoint))
    library = PreTrainedTokenizerFast.from_pretrained(source.folder)
    tokenizer = Tokenizer.from_str(source.tokenizer.json.decode())
    conversations = [
        [*HI, {"role": "assistant", "content": " Yes & <b>no</b>.\n"}, {"role": "user", "content": "naïve 🙂"}],
        [{"role": "system", "content": "Be brief."}, *HI],
        [{"role": "user", "content": ""}],
    ]
    with ChatRenderer(model, tokenizer, source.tokenizer.info) as render:
        for messages in conversations:
            assert render(messages) == library.apply_chat_template(messages, tokenize=False)


def test_one_process_renders_all_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(1) or original(*a, **k))
    with renderer("{{ messages[0].content }}{{ eos_token }}") as render:
        texts = [render([{"role": "user", "content": f"{i}"}]) for i in range(200)]
    assert texts == [f"{i}{TOKENIZER.id_to_token(1)}" for i in range(200)]
    assert len(started) == 1


def test_without_a_template() -> None:
    with renderer(None) as render:
        assert render(HI) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, r"took longer than 1 s and was stopped"),
        ("{{ raise_exception('only users, please') }}", r"failed: TemplateError: only users, please"),
        ("{% for %}", r"TemplateSyntaxError"),
        ("{{ 'a' * 10 ** 9 }}", r"too long"),
    ],
    ids=["endless", "refusing", "broken", "huge"],
)
def test_a_template_that_fails_is_named_with_the_remedy(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "SECONDS", 1)
    with (
        pytest.raises(
            BadTrainingData, match=rf"^org/name: the model's chat template .*{message}.*; give plain text .* fix"
        ),
        renderer(template) as render,
    ):
        render(HI)


def test_many_slow_conversations_are_too_slow_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "SECONDS", 0.5)
    monkeypatch.setattr(chats, "MEAN_SECONDS", 0.0)
    clock = iter(range(100))
    monkeypatch.setattr(chats.time, "perf_counter", lambda: next(clock) * 0.2)
    monkeypatch.setattr(ChatRenderer, "_ask", lambda self, line: {"text": "x"})
    with renderer("x") as render:
        assert render(HI) == render(HI) == "x"
        with pytest.raises(BadTrainingData, match="longer than 0 s for a conversation"):
            render(HI)
