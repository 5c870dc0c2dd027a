"""Tokenizers: the stored file encodes like the original, whatever form that had."""

from __future__ import annotations

import base64
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from rcpconv.checkpoint import TokenizerFiles, load_source
from rcpconv.checkpoint.tokenizer import read_hf_tokenizer
from rcpconv.checkpoint.tokenizer_model import LLAMA3_SPLIT, convert_tokenizer_model
from rcpconv.errors import BadTokenizer
from tiny_checkpoints import (
    BOS,
    CHAT_TEMPLATE,
    CORPUS,
    KINDS,
    make_sentencepiece_model,
    make_tiktoken_model,
    make_tiny_checkpoint,
    make_tiny_meta_checkpoint,
)


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Words, and random letters with odd spaces, line ends, and characters outside the vocabulary."""
    rng = random.Random(seed)
    words, letters = " ".join(CORPUS).split(), "".join(CORPUS) + "   \n\t日🙂\u0301"
    return [
        " ".join(rng.choices(words, k=6)) if i % 2 else "".join(rng.choices(letters, k=rng.randrange(40)))
        for i in range(count)
    ]


def loaded(files: TokenizerFiles) -> Tokenizer:
    return Tokenizer.from_str(files.json.decode())


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tokenizer_encodes_like_the_original(kind: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(kind, tmp_path)
    files = load_source(str(tmp_path)).tokenizer
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), loaded(files)
    for text in [*random_texts(20), f"a{BOS}b<|turn|>c"]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False).ids == expected
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
    assert files.info.add_bos == (theirs("a")["input_ids"][0] == 0 and kind not in ("qwen2", "qwen3"))
    assert files.info.bos_id == (None if kind.startswith("qwen") else 0)
    assert files.info.eos_ids == ((1, 2) if KINDS[kind].chat else (1,))
    assert (files.info.chat_template is not None) == KINDS[kind].chat


@pytest.mark.parametrize("kind", ["llama3", "mistral", "qwen3"])
def test_stored_tokenizer_encodes_like_auto_tokenizer(kind: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(kind, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), loaded(load_source(str(tmp_path)).tokenizer)
    for text in random_texts(20):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)


def test_sentencepiece_model_encodes_and_decodes_the_same(tmp_path: Path) -> None:
    make_sentencepiece_model(tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    converted = convert_tokenizer_model(tmp_path / "tokenizer.model", llama31=False)
    for text in ["", " ", "  two leading", "trailing  ", "\n", *random_texts(500)]:
        ids = original.encode(text)
        assert converted.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert converted.decode(ids) == original.decode(ids), repr(text)
        assert converted.encode(text).ids == [1, *ids]
    assert converted.encode("a</s>", add_special_tokens=False).ids[-1] == 2


def test_sentencepiece_model_encodes_like_transformers_conversion(tmp_path: Path) -> None:
    make_sentencepiece_model(tmp_path)
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    ours = convert_tokenizer_model(tmp_path / "tokenizer.model", llama31=False)
    # transformers 5 forgets sentencepiece's added space before a text that begins with one
    for text in (text for text in random_texts(200) if not text.startswith(" ")):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)


def test_tiktoken_model_encodes_and_decodes_the_same(tmp_path: Path) -> None:
    size = make_tiktoken_model(tmp_path)
    converted = convert_tokenizer_model(tmp_path / "tokenizer.model", llama31=True)
    vocabulary = converted.get_vocab(with_added_tokens=True)
    special = {token.content: id for id, token in converted.get_added_tokens_decoder().items()}
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in (tmp_path / "tokenizer.model").read_text().splitlines())
    }
    original = tiktoken.Encoding("test", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    for text in ["", " ", "\n\n x", *random_texts(500)]:
        ids = original.encode(text)
        assert converted.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert converted.decode(ids) == text
    assert len(vocabulary) == size
    assert len(special) == 256


@pytest.mark.parametrize(
    ("llama31", "names"),
    [
        (False, {6: "<|start_header_id|>", 8: "<|reserved_special_token_4|>", 9: "<|eot_id|>", 10: 5, 255: 250}),
        (True, {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>", 11: 3, 255: 247}),
    ],
)
def test_llama3_special_tokens(llama31: bool, names: dict[int, Any], tmp_path: Path) -> None:
    base = make_tiktoken_model(tmp_path) - 256
    tokenizer = convert_tokenizer_model(tmp_path / "tokenizer.model", llama31=llama31)
    assert tokenizer.encode("a").ids[0] == base
    for offset, name in ({0: "<|begin_of_text|>", 1: "<|end_of_text|>"} | names).items():
        expected = f"<|reserved_special_token_{name}|>" if isinstance(name, int) else name
        assert tokenizer.id_to_token(base + offset) == expected


@pytest.mark.parametrize(("version", "stops"), [(2, (2,)), (3, (301, 309)), (3.1, (301, 308, 309))])
def test_meta_tokenizers(version: float, stops: tuple[int, ...], tmp_path: Path) -> None:
    make_tiny_meta_checkpoint(tmp_path, 1, version)
    info = load_source(str(tmp_path)).tokenizer.info
    assert info.add_bos
    assert info.bos_id == (1 if version == 2 else 300)
    assert info.eos_ids == stops
    assert info.chat_template is None


def test_hugging_face_folder_with_a_sentencepiece_model_only(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama2", tmp_path, vocab_size=353)
    (tmp_path / "tokenizer.json").unlink()
    make_sentencepiece_model(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 352}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}')
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").unlink()
    files = read_hf_tokenizer(tmp_path, 353)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "The captain  counted 12 stones."
    assert loaded(files).encode(text, add_special_tokens=False).ids == original.encode(text)
    assert loaded(files).token_to_id("[PAD]") == 352
    assert (files.info.bos_id, files.info.add_bos, files.info.eos_ids) == (1, True, (1, 2))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    assert not read_hf_tokenizer(tmp_path, 353).info.add_bos
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 360}')
    with pytest.raises(BadTokenizer, match=r"\[PAD\].*360"):
        read_hf_tokenizer(tmp_path, 400)


def _set(folder: Path, name: str, **entries: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | entries))


def test_chat_templates_from_every_place(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama3", tmp_path)

    def template() -> str | None:
        return read_hf_tokenizer(tmp_path, 290).info.chat_template

    assert template() == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()
    assert template() is None
    _set(tmp_path, "chat_template.json", chat_template="from json")
    assert template() == "from json"
    _set(tmp_path, "tokenizer_config.json", chat_template="from config")
    assert template() == "from config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    _set(tmp_path, "tokenizer_config.json", chat_template=named)
    assert template() == "chat"


def test_stop_tokens_from_every_place(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama1", tmp_path)
    _set(tmp_path, "generation_config.json", eos_token_id=[5, 0])
    assert read_hf_tokenizer(tmp_path, 290).info.eos_ids == (5, 0, 1)
    (tmp_path / "generation_config.json").unlink()
    _set(tmp_path, "config.json", eos_token_id=7)
    assert read_hf_tokenizer(tmp_path, 290).info.eos_ids == (7, 1)


def test_padding_and_truncation_are_not_stored(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama1", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a" * 20
    assert len(loaded(load_source(str(tmp_path)).tokenizer).encode(text, add_special_tokens=False)) == 20


def test_added_tokens_without_an_embedding_are_dropped(tmp_path: Path) -> None:
    make_tiny_checkpoint("metamath", tmp_path)
    assert loaded(read_hf_tokenizer(tmp_path, 291)).token_to_id("[PAD]") == 290
    smaller = loaded(read_hf_tokenizer(tmp_path, 290))
    assert smaller.token_to_id("[PAD]") is None
    assert max(smaller.encode("x[PAD]").ids) < 290


def test_tokenizers_that_do_not_fit_or_cannot_be_read(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama1", tmp_path)
    with pytest.raises(BadTokenizer, match="289, the embedding has 280 rows"):
        read_hf_tokenizer(tmp_path, 280)
    _set(tmp_path, "generation_config.json", eos_token_id=1000)
    with pytest.raises(BadTokenizer, match="eos id is 1000"):
        read_hf_tokenizer(tmp_path, 290)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadTokenizer, match="cannot be read"):
        read_hf_tokenizer(tmp_path, 290)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadTokenizer, match=r"expected tokenizer\.json or tokenizer\.model"):
        read_hf_tokenizer(tmp_path, 290)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x01\x02 nonsense", "neither a sentencepiece nor a tiktoken"),
        (b"IQ== 0\nnot base64! 1\n", ":2: expected a base64 token"),
    ],
)
def test_broken_tokenizer_models(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadTokenizer, match=message):
        convert_tokenizer_model(tmp_path / "tokenizer.model", llama31=False)


def test_other_kinds_of_sentencepiece_model_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "tokenizer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=90, minloglevel=2
        )
    with pytest.raises(BadTokenizer, match="model type"):
        convert_tokenizer_model(tmp_path / "tokenizer.model", llama31=False)
