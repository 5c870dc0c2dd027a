"""For tests of the runtime: a tokenizer with a token for every byte, and a backend that says what it is told to."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from rcpformat import TokenizerInfo
from rcprun.backends import MemoryUse

BOS, EOS, TURN = 0, 1, 2
FIRST_BYTE = 3
"""Ids 3 to 258 are the bytes 0 to 255."""
BYTE_VOCABULARY = FIRST_BYTE + 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level_json() -> bytes:
    """A tokenizer.json with a token for every byte: <s>, </s>, <|turn|>, then the bytes in order."""
    alphabet = {character: byte for byte, character in _byte_characters().items()}
    vocabulary = {character: FIRST_BYTE + byte for character, byte in alphabet.items()}
    special = ["<s>", "</s>", "<|turn|>"]
    library = Library(models.BPE(vocab={text: i for i, text in enumerate(special)} | vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True) for text in special])
    return library.to_str().encode()


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_ids(text: str | bytes) -> list[int]:
    """The ids that byte_level_json's tokenizer gives to text without special tokens."""
    return [FIRST_BYTE + byte for byte in (text.encode() if isinstance(text, str) else text)]


def info(**changes: Any) -> TokenizerInfo:
    """A TokenizerInfo for byte_level_json."""
    return TokenizerInfo(**({"bos_id": BOS, "eos_ids": (EOS, TURN), "add_bos": True} | changes))


class ScriptedBackend:
    """A backend whose most likely next token is the next one of a script, whatever it is given."""

    name = "scripted"

    def __init__(self, script: Sequence[int], context: int = 64) -> None:
        self.script, self.context, self.length = list(script), context, 0
        self.calls: list[int] = []
        """Tokens in each call of forward."""
        self.interrupt_at: int | None = None

    def forward(self, tokens: Sequence[int]) -> np.ndarray:
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        logits = np.zeros(BYTE_VOCABULARY, dtype=np.float32)
        logits[self.script[len(self.calls)]] = 50
        self.calls.append(len(tokens))
        self.length += len(tokens)
        assert self.length <= self.context
        return logits

    def forward_all(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        for token in tokens:
            yield self.forward([token])[None]

    def truncate(self, length: int) -> None:
        assert length <= self.length
        self.length = length

    def memory(self) -> MemoryUse:
        return MemoryUse(weights=0, kv_cache=0)
