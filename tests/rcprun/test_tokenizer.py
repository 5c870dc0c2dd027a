"""Encoding, streaming of text without half characters, and stop strings."""

import json
import random

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Library

from byte_model import BOS, EOS, FIRST_BYTE, TURN, byte_ids, byte_level_json, info
from rcprun.errors import BadModelFile, BadRequest
from rcprun.tokenizer import StopStrings, TextStream, Tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As LLaMA 2's: words with ▁ for spaces, a leading space that the decoder strips, and <0xXX> for other bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in ("▁", "▁Hello", "▁world", "▁w", "or", "ld", "!"):
        vocabulary[word] = len(vocabulary)
    library = Library(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return Tokenizer(library.to_str().encode(), info())


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    text = TextStream(tokenizer, prompt or [])
    return [*(text.push(token) for token in ids), text.flush()]


def test_plain_prompts_begin_with_bos_once(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hi") == [BOS, *byte_ids("hi")]
    assert tokenizer.encode("<s>hi") == [BOS, *byte_ids("hi")]
    assert tokenizer.encode_raw("hi<|turn|>") == [*byte_ids("hi"), TURN]
    assert Tokenizer(byte_level_json(), info(add_bos=False)).encode("hi") == byte_ids("hi")


def test_token_text(tokenizer: Tokenizer) -> None:
    assert (tokenizer.token(EOS), tokenizer.token(None), tokenizer.token(10**6)) == ("</s>", "", "")


def test_unreadable_tokenizer() -> None:
    with pytest.raises(BadModelFile, match=r"tokenizer\.json"):
        Tokenizer(b'{"model": {}}', info())


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    ],
)
def test_panics_of_the_library_are_errors_of_the_file(part: dict[str, object]) -> None:
    with pytest.raises(BadModelFile, match=r"tokenizer\.json: the tokenizers library cannot"):
        Tokenizer(json.dumps(json.loads(byte_level_json()) | part).encode(), info()).encode("hello")


def test_truncation_and_padding_of_the_file_are_not_done() -> None:
    library = Library.from_str(byte_level_json().decode())
    library.enable_truncation(3)
    library.enable_padding(length=40)
    assert Tokenizer(library.to_str().encode(), info()).encode_raw("hello") == byte_ids("hello")


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="not Unicode"):
        tokenizer.encode("a\udce9")


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, byte_ids("aé🙂z")) == ["a", "", "é", "", "", "", "🙂", "z", ""]


def test_unfinished_character_comes_as_replacement(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, byte_ids(b"ok\xf0\x9f"))) == "ok\N{REPLACEMENT CHARACTER}"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, [BOS, *byte_ids("a"), TURN, *byte_ids("é"), EOS])) == "aé"
    assert "".join(stream(tokenizer, [TURN] * 50 + byte_ids("é"))) == "é"


def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    """Random text of one to four bytes a character, however it is cut into tokens."""
    rng = random.Random(0)
    text = "".join(rng.choice("aé€🙂 \n") for _ in range(500))
    assert "".join(stream(tokenizer, byte_ids(text))) == text


def test_garbage_does_not_hold_the_stream_up(tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, [FIRST_BYTE + 0xFF] * 40)
    assert any(pieces[:10])
    assert "".join(stream(tokenizer, [FIRST_BYTE + 0xFF] * 40 + byte_ids("end"))).endswith("end")


def test_byte_fallback_characters(byte_fallback: Tokenizer) -> None:
    ids = [3 + byte for byte in "你好🙂".encode()]
    assert [piece for piece in stream(byte_fallback, ids) if piece] == ["你", "好", "🙂"]


def test_space_between_prompt_and_reply_survives(byte_fallback: Tokenizer) -> None:
    """The decoder strips a leading space, which is none when there is a prompt before it."""
    prompt = byte_fallback.encode("Hello")
    reply = byte_fallback.encode_raw("world")
    assert "".join(stream(byte_fallback, reply, prompt)) == " world"
    assert "".join(stream(byte_fallback, reply)) == "world"


def test_characters_of_the_prompt_do_not_garble_the_reply(byte_fallback: Tokenizer) -> None:
    """Half a character in the decoded context would make the whole run of bytes after it replacement characters."""
    rng = random.Random(0)
    for _ in range(200):
        prompt, reply = ("".join(rng.choices("! é你🙂", k=6)) for _ in range(2))
        before, after = byte_fallback.encode_raw("!" + prompt), byte_fallback.encode_raw("!" + prompt + reply)
        assert after[: len(before)] == before
        assert "".join(stream(byte_fallback, after[len(before) :], before)) == reply


def test_characters_around_tokens_without_text_survive(byte_fallback: Tokenizer) -> None:
    special = 1
    for count in range(12):
        ids = [*byte_fallback.encode_raw("你好"), *[special] * count, *byte_fallback.encode_raw("é!")[1:]]
        assert "".join(stream(byte_fallback, ids)) == "你好é!"


def feed(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """Pieces shown, and whether a stop string was found; pieces after that are not fed."""
    matcher, shown = StopStrings(stops), []
    for piece in pieces:
        text, found = matcher.push(piece)
        shown.append(text)
        if found:
            return shown, True
    return [*shown, matcher.flush()], False


def test_stop_string_over_several_pieces() -> None:
    assert feed(["\nUser:"], ["Hi", "!\nU", "se", "r: x"]) == (["Hi", "!", "", ""], True)


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    assert feed(["</end>"], ["a</e", "x", "</en"]) == (["a", "</ex", "", "</en"], False)


def test_first_of_several_stop_strings_cuts() -> None:
    assert feed(["two", "one"], ["one two"]) == ([""], True)
    assert feed(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], True)


def test_no_stop_strings() -> None:
    assert feed([], ["a", "b"]) == (["a", "b", ""], False)
    assert feed([""], ["a"]) == (["a", ""], False)
