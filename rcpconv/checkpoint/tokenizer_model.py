"""Converts `tokenizer.model` files, sentencepiece's (LLaMA 1 and 2) and tiktoken's (LLaMA-3), to `tokenizers`.

Both are byte-pair encodings whose files hold pieces in the order of merging, but no merges: those are every way to
split a piece into two others. Knows nothing of checkpoints.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rcpconv.errors import BadTokenizer

_Piece = TypeVar("_Piece", str, bytes)

SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Piece types of sentencepiece_model.proto."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How LLaMA-3 cuts text before byte-pair encoding."""
_LLAMA3_SPECIALS = 256
_RESERVED = None
_LLAMA3_NAMES = (
    *("<|begin_of_text|>", "<|end_of_text|>", _RESERVED, _RESERVED, _RESERVED, _RESERVED),
    *("<|start_header_id|>", "<|end_header_id|>", _RESERVED, "<|eot_id|>"),
)
_LLAMA31_NAMES = (
    *("<|begin_of_text|>", "<|end_of_text|>", _RESERVED, _RESERVED, "<|finetune_right_pad_id|>", _RESERVED),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
STOP_TOKENS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""The tokens that end a LLaMA model's text, message or turn; none of them has all."""


def convert_tokenizer_model(path: Path, *, llama31: bool) -> Tokenizer:
    """A tokenizer that encodes any text like the given LLaMA tokenizer.model, and prepends BOS unless told not to.

    llama31: name LLaMA-3's special tokens as 3.1 and later do; sentencepiece models name their own.
    Raises BadTokenizer when the file is of neither kind.
    """
    with path.open("rb") as file:
        is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(4096))
    if is_tiktoken:
        return _convert_tiktoken(path, _LLAMA31_NAMES if llama31 else _LLAMA3_NAMES)
    return _convert_sentencepiece(path)


def _convert_sentencepiece(path: Path) -> Tokenizer:
    messages: Any = sentencepiece_model_pb2  # its classes are made at import, unseen by a type checker
    model = messages.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise BadTokenizer(f"{path}: neither a sentencepiece nor a tiktoken model; download it again") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for what, expected, found in (
        ("model type", trainer.BPE, trainer.model_type),
        ("byte_fallback", True, trainer.byte_fallback),
        ("remove_extra_whitespaces", False, normalizer.remove_extra_whitespaces),
        ("normalization rules", b"", normalizer.precompiled_charsmap),
    ):
        if found != expected:
            raise BadTokenizer(
                f"{path}: {what}: expected {expected!r}, as in LLaMA's sentencepiece models, found {found!r:.40}; "
                "add the tokenizer.json of this model"
            )
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    normal = [piece for piece in model.pieces if piece.type == _NORMAL]
    merges = _splits([p.piece for p in sorted(normal, key=lambda p: -p.score)], vocabulary)
    unknown = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend(SPACE)] if normalizer.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + ([decoders.Strip(" ", left=1)] if steps else []))
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
            for piece in model.pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return _with_bos(tokenizer, model.pieces[trainer.bos_id].piece)


def _convert_tiktoken(path: Path, special_names: Sequence[str | None]) -> Tokenizer:
    """The file holds ordinary tokens only; 256 special ones follow."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise BadTokenizer(f"{path}:{number}: expected a base64 token and its rank; download it again") from error
    pieces = sorted(ranks, key=ranks.__getitem__)
    letters = _byte_letters()
    spell: Callable[[bytes], str] = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    tokenizer = Tokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in _splits(pieces, ranks)],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = _llama3_specials(special_names)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return _with_bos(tokenizer, names[0])


def _splits(pieces: Iterable[_Piece], ids: dict[_Piece, int]) -> list[tuple[_Piece, _Piece]]:
    """Every pair of pieces that joins into one, in the order of the joined pieces, then of the parts."""
    merges: list[tuple[_Piece, _Piece]] = []
    for piece in pieces:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte: itself, or the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def _llama3_specials(names: Sequence[str | None]) -> list[str]:
    """The 256 special tokens: these names, and numbered reserved ones in the gaps and after them."""
    slots = [*names, *[_RESERVED] * (_LLAMA3_SPECIALS - len(names))]
    numbers = iter(range(_LLAMA3_SPECIALS))
    return [f"<|reserved_special_token_{next(numbers)}|>" if name is _RESERVED else name for name in slots]


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
