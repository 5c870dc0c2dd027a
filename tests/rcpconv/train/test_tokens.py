"""Tokenization, its cache, packing and order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcpconv.errors import BadTrainingData
from rcpconv.train import tokens
from rcpconv.train.chats import ChatRenderer
from rcpconv.train.texts import Piece, pieces
from rcpconv.train.tokens import Mixture, Sequences, cached, interleave, tokenize
from rcpformat.architecture import TokenizerInfo
from tiny_checkpoints import CHAT_TEMPLATE, byte_level_tokenizer

BOS, EOS, TURN = 0, 1, 2
TOKENIZER = byte_level_tokenizer(True, False)
INFO = TokenizerInfo(bos_id=BOS, eos_ids=(EOS, TURN), add_bos=True, chat_template=CHAT_TEMPLATE)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def documents(*all_texts: str) -> Iterator[Piece]:
    for text in all_texts:
        yield from pieces(text)


def test_documents_stand_between_bos_and_eos() -> None:
    assert list(tokenize(documents("Hello", "world"), TOKENIZER, INFO)) == [
        [BOS, *ids("Hello"), EOS],
        [BOS, *ids("world"), EOS],
    ]


def test_what_the_tokenizer_does_not_have_is_not_added() -> None:
    plain = TokenizerInfo(bos_id=BOS, eos_ids=(), add_bos=False)
    assert list(tokenize(documents("Hello"), TOKENIZER, plain)) == [ids("Hello")]


def test_a_document_in_pieces_has_one_bos_and_one_eos() -> None:
    parts = [Piece("Hel", True, False), Piece("lo", False, False), Piece("!", False, True)]
    assert list(tokenize(parts, TOKENIZER, INFO)) == [[BOS, *ids("Hel")], ids("lo"), [*ids("!"), EOS]]


def test_rendered_chats_keep_their_own_special_tokens() -> None:
    """The template writes BOS and the end of turn; neither is added again."""
    with ChatRenderer("m", TOKENIZER, INFO) as render:
        text = render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
    assert text is not None and text.startswith("<|begin|>user: hi<|turn|>\n")
    (row,) = tokenize(documents(text.rstrip("\n")), TOKENIZER, INFO)
    assert row == [BOS, *ids("user: hi"), TURN, *ids("\nassistant: yes"), TURN]


def test_streams_are_mixed_document_by_document() -> None:
    first = iter([Piece("a1", True, False), Piece("a2", False, True), Piece("b", True, True), Piece("c", True, True)])
    second = iter([Piece("x", True, True)])
    assert [piece.text for piece in interleave([first, second])] == ["a1", "a2", "x", "b", "c"]


def test_batches_do_not_change_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    all_texts = [f"Text number {i} of many." for i in range(50)]
    whole = list(tokenize(documents(*all_texts), TOKENIZER, INFO))
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 100)
    assert list(tokenize(documents(*all_texts), TOKENIZER, INFO)) == whole


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_cache_is_a_plain_npy_file_and_is_read_once_made(tmp_path: Path, vocab_size: int, dtype: Any) -> None:
    path = tmp_path / "tokens" / "train.npy"
    rows = [[1, 2, 3], [], [vocab_size - 1] * 5000]
    found = cached(path, lambda: rows, vocab_size, 10**6)
    assert found.dtype == dtype and found.tolist() == [1, 2, 3] + [vocab_size - 1] * 5000
    assert isinstance(found, np.memmap)
    assert np.array_equal(np.load(path), found)
    assert cached(path, lambda: pytest.fail("made again"), vocab_size, 5).tolist() == found.tolist()


def test_cache_reads_no_more_text_than_is_wanted(tmp_path: Path) -> None:
    def rows() -> Iterator[list[int]]:
        yield [1, 2, 3]
        yield [4, 5, 6]
        pytest.fail("read on")

    assert cached(tmp_path / "t" / "a.npy", rows, 100, 5).tolist() == [1, 2, 3, 4, 5]


def test_a_cache_is_whole_or_not_there(tmp_path: Path) -> None:
    def rows() -> Iterator[list[int]]:
        yield [1]
        raise BadTrainingData("broken")

    with pytest.raises(BadTrainingData):
        cached(tmp_path / "t" / "a.npy", rows, 100, 5)
    assert list((tmp_path / "t").iterdir()) == []


def test_sequences_cover_every_epoch_and_differ_between_epochs() -> None:
    sequences = Sequences(np.arange(47, dtype=np.uint16), 5, seed=3)
    assert sequences.per_epoch == 9
    first = sequences.batch(0, 9)
    assert sorted(first[:, 0].tolist()) == list(range(0, 45, 5))
    assert first.dtype == np.int64
    for row in sequences.batch(0, 27):
        assert np.array_equal(row, (row[0] + np.arange(5)) % 47)  # wraps around
    second = sequences.batch(9, 9)
    assert len(set(second.flatten().tolist())) == 45
    assert set(second[:, 0].tolist()).isdisjoint(first[:, 0].tolist())  # cut elsewhere


def test_order_depends_on_the_seed_alone() -> None:
    row = np.arange(1000, dtype=np.uint16)
    sequences = Sequences(row, 8, seed=1)
    assert np.array_equal(sequences.batch(200, 4), Sequences(row, 8, seed=1).batch(200, 4))
    assert np.array_equal(sequences.batch(200, 4)[1:], sequences.batch(201, 3))
    assert not np.array_equal(sequences.batch(0, 50), Sequences(row, 8, seed=2).batch(0, 50))
    assert sequences.batch(0, 4)[:, 0].tolist() == [744, 488, 600, 72]  # on every machine and in every version


def test_too_little_text_for_one_sequence() -> None:
    with pytest.raises(BadTrainingData, match=r"hold 7 tokens, but one sequence takes 8; give more text, or a smaller"):
        Sequences(np.arange(7, dtype=np.uint16), 8, seed=0)


@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 1.0])
def test_a_mixture_takes_each_source_in_its_own_order(share: float) -> None:
    first, second = Sequences(np.arange(60), 5, seed=1), Sequences(np.arange(1000, 1060), 5, seed=2)
    mixture = Mixture(first, second, share)
    found = mixture.batch(0, 20)
    ours = found[found[:, 0] < 1000]
    assert len(ours) == round(20 * share)
    assert np.array_equal(ours, first.batch(0, len(ours)))
    if share < 1:
        assert np.array_equal(found[found[:, 0] >= 1000], second.batch(0, 20 - len(ours)))
    assert np.array_equal(np.concatenate([mixture.batch(0, 7), mixture.batch(7, 13)]), found)
