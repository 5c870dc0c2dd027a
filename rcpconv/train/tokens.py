"""Texts as tokens: tokenization into a memory-mapped cache, and packing into training sequences in a fixed order.

The cache is one long row of tokens, each document between BOS and EOS where the tokenizer has them. Sequence w of
epoch e is `seq_len` tokens of that row; the order depends on the seed alone. Knows nothing of models or files of text.

Shape suffixes: N tokens in the cache, B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rcpconv.errors import BadTrainingData
from rcpconv.runs import replacing
from rcpconv.train.texts import Piece
from rcpformat.architecture import TokenizerInfo

_BATCH_CHARACTERS = 4 << 20
"""Text tokenized at a time: enough for every core, and a bound on memory."""


def interleave(streams: list[Iterator[Piece]]) -> Iterator[Piece]:
    """One whole document of each stream in turn, until all are exhausted."""
    streams = list(streams)
    while streams:
        for stream in list(streams):
            for piece in stream:
                yield piece
                if piece.ends:
                    break
            else:
                streams.remove(stream)


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer, info: TokenizerInfo) -> Iterator[list[int]]:
    """Ids of each piece; documents begin with BOS where the tokenizer adds it, and end with EOS where it has one."""
    pieces = iter(pieces)
    while batch := list(_take(pieces, _BATCH_CHARACTERS)):
        encoded = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encoded, strict=True):
            ids = encoding.ids
            if piece.begins and info.add_bos and ids[:1] != [info.bos_id]:
                assert info.bos_id is not None, "TokenizerInfo: add_bos needs a bos_id"
                ids.insert(0, info.bos_id)
            if piece.ends and info.eos_ids and ids[-1:] and ids[-1] not in info.eos_ids:
                ids.append(info.eos_ids[0])
            yield ids


def _take(pieces: Iterator[Piece], characters: int) -> Iterator[Piece]:
    """Pieces until their text reaches this length."""
    for piece in pieces:
        yield piece
        characters -= len(piece.text)
        if characters <= 0:
            return


def write_cache(path: Path, rows: Iterable[list[int]], vocab_size: int, limit: int) -> None:
    """Write token rows one after another as an .npy file of at most `limit` tokens; it appears whole or not at all."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    with replacing(path) as temporary, temporary.open("wb") as file:
        _write_header(file, dtype, 0)
        count = 0
        for row in rows:
            kept = row[: limit - count]
            file.write(np.asarray(kept, dtype=dtype).data)
            count += len(kept)
            if count == limit:
                break
        file.seek(0)
        _write_header(file, dtype, count)  # as long as the first one: numpy leaves room for the length to grow


def _write_header(file: BinaryIO, dtype: np.dtype[Any], length: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def cached(path: Path, rows: Callable[[], Iterable[list[int]]], vocab_size: int, limit: int) -> NDArray[Any]:
    """The tokens in the cache, memory-mapped; made of `rows` when it is not there."""
    if not path.exists():
        write_cache(path, rows(), vocab_size, limit)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


class Sequences:
    """Training sequences cut from a row of tokens, in an order fixed by the seed; epochs follow without end.

    Every epoch cuts the row at another offset (it wraps around), so that sequences differ between epochs.
    Raises BadTrainingData when the row is shorter than one sequence.
    """

    def __init__(self, token_N: NDArray[Any], seq_len: int, seed: int) -> None:
        self.token_N, self.seq_len, self.seed = token_N, seq_len, seed
        self.per_epoch = len(token_N) // seq_len
        if not self.per_epoch:
            raise BadTrainingData(
                f"the training texts hold {len(token_N)} tokens, but one sequence takes {seq_len}; "
                "give more text, or a smaller --seq-len"
            )
        self._order = lru_cache(maxsize=2)(partial(_epoch_order, seed, self.per_epoch, seq_len))

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Sequences first .. first + count - 1 of the endless order, (B, T)."""
        return np.stack([self._sequence(index) for index in range(first, first + count)])

    def epoch(self, index: int) -> int:
        """How often the sequence of this index, or what it is cut from, has been there before."""
        return index // self.per_epoch

    def _sequence(self, index: int) -> NDArray[np.int64]:
        epoch, position = divmod(index, self.per_epoch)
        offset, order = self._order(epoch)
        start = offset + int(order[position]) * self.seq_len
        return self.token_N.take(range(start, start + self.seq_len), mode="wrap").astype(np.int64)


class Mixture:
    """Sequences of two sources, each in its own order: of the first one this share, evenly spread."""

    def __init__(self, first: Sequences, second: Sequences, share: float) -> None:
        self.first, self.second, self.share, self.seq_len = first, second, share, first.seq_len

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Sequences first .. first + count - 1 of the endless order, (B, T)."""
        return np.concatenate([self._one(index) for index in range(first, first + count)])

    def epoch(self, index: int) -> int:
        """As that of the source that the sequence of this index is from."""
        before, after = self._places(index)
        return self.first.epoch(before) if after > before else self.second.epoch(index - before)

    def _places(self, index: int) -> tuple[int, int]:
        """How many sequences before this index, and up to it, are of the first source."""
        return int(index * self.share), int((index + 1) * self.share)

    def _one(self, index: int) -> NDArray[np.int64]:
        before, after = self._places(index)
        return self.first.batch(before, 1) if after > before else self.second.batch(index - before, 1)


def _epoch_order(seed: int, count: int, seq_len: int, epoch: int) -> tuple[int, NDArray[np.int64]]:
    """(offset, permutation) of one epoch. The first epoch's offset is 0.

    From raw bits, whose stream numpy promises to keep, so that the order is the same in every version.
    """
    random = np.random.PCG64([seed, epoch])
    order = np.argsort(random.random_raw(count), kind="stable")
    return int(random.random_raw()) % seq_len if epoch else 0, order
