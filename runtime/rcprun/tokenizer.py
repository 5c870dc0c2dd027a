"""Text to token ids and back, by the model's own `tokenizer.json`. Knows nothing of models or chat templates.

Streaming needs care: a character may be spread over several tokens, a decoder may drop a leading space that belongs
there, and a stop string may begin in one token and end in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rcpformat.architecture import TokenizerInfo
from rcprun.errors import BadModelFile, BadRequest

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 4
"""Tokens of the prompt that a stream decodes with its first ones, so that spaces between them survive."""
LONGEST_CHARACTER = 4
"""Tokens that a character may be spread over: one for each byte."""
LONGEST_PENDING = 8
"""Tokens that a stream holds back at most: a character has at most 4 bytes, so more are no character at all."""
LONGEST_REASON = 500
"""Characters of the library's own words that an error message repeats."""


class Tokenizer:
    """Encodes and decodes with a Hugging Face `tokenizers` file; thin, so that ids are exactly the library's."""

    def __init__(self, json_bytes: bytes, info: TokenizerInfo) -> None:
        from tokenizers import Tokenizer as Library

        with _library_call("read it"):
            self._library = Library.from_buffer(json_bytes)
        self._library.no_truncation()
        self._library.no_padding()
        self.info = info

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt: special tokens in the text count as such, bos_id comes first when add_bos says so."""
        ids = self.encode_raw(text)
        if self.info.add_bos and self.info.bos_id is not None and ids[:1] != [self.info.bos_id]:
            ids.insert(0, self.info.bos_id)
        return ids

    def encode_raw(self, text: str) -> list[int]:
        """Ids of text that already holds its special tokens, as a chat template writes them; nothing is added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(f"the prompt is not Unicode text: {error.reason} at character {error.start}") from None
        with _library_call("encode a text with it"):
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of some ids. Bytes that are no UTF-8 become U+FFFD; ids without a token give nothing."""
        with _library_call("decode tokens with it"):
            text: str = self._library.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, token_id: int | None) -> str:
        """The token's literal text, such as "<s>"; empty for None and for ids without one."""
        if token_id is None:
            return ""
        with _library_call("look up a token in it"):
            found: str | None = self._library.id_to_token(token_id)
        return found or ""


@contextmanager
def _library_call(purpose: str) -> Iterator[None]:
    """Raise BadModelFile for whatever the library raises: bare Exception, and BaseException where its Rust panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error)[:LONGEST_REASON]
        raise BadModelFile(f"tokenizer.json: the tokenizers library cannot {purpose}: {reason}") from error


class TextStream:
    """Turns generated ids into text one at a time, emitting no half characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-(CONTEXT_TOKENS + LONGEST_CHARACTER - 1) :])
        self._shown = len(self._ids)
        self._start = self._character_start(max(0, len(self._ids) - CONTEXT_TOKENS))

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        before, after = self._texts()
        if after.endswith(REPLACEMENT) and len(self._ids) - self._shown < LONGEST_PENDING:
            return ""
        if len(after) > len(before):
            self._start = self._shown
        else:  # a token without text; the context stays, but not for ever
            self._start = max(self._start, self._character_start(len(self._ids) - LONGEST_PENDING))
        self._shown = len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end: the replacement characters of an unfinished character."""
        before, after = self._texts()
        self._start = self._shown = len(self._ids)
        return after[len(before) :]

    def _character_start(self, start: int) -> int:
        """`start`, or the token before it at which the character begins that `start` would cut.

        Half a character does more harm than its own loss: byte fallback gives up the whole run of bytes it is in.
        """
        for earlier in range(start, max(-1, start - LONGEST_CHARACTER), -1):
            if not self._tokenizer.decode(self._ids[earlier : self._shown]).startswith(REPLACEMENT):
                return earlier
        return start

    def _texts(self) -> tuple[str, str]:
        """The text of the context tokens alone, and with the pending tokens after them."""
        context, pending = self._ids[self._start : self._shown], self._ids[self._shown :]
        return self._tokenizer.decode(context), self._tokenizer.decode(context + pending)


class StopStrings:
    """Cuts a stream of text before the first stop string, even one that is spread over several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string was found). What may begin a stop string is held back."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string without being all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
