"""The generation loop, on a scripted backend and on a real one."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from byte_model import BOS, BYTE_VOCABULARY, EOS, TURN, ScriptedBackend, byte_ids
from rcprun.engine import Generation, GenerationGroup, GenerationResult, check_tokens
from rcprun.errors import BadModelFile, BadRequest, ContextOverflow
from rcprun.model import Model
from rcprun.sampling import Sampler, SamplingOptions
from rcprun.tokenizer import Tokenizer
from tiny_rcp import TINY

GREEDY = {"temperature": 0.0}
ARCHITECTURE = replace(TINY, vocab_size=BYTE_VOCABULARY, max_position_embeddings=20)


def start(
    tokenizer: Tokenizer, script: list[int], prompt: int = 4, context: int = 64, stop=(), max_tokens: int | None = None
) -> tuple[Generation, ScriptedBackend]:
    backend = ScriptedBackend(script, context)
    sampler = Sampler(SamplingOptions(temperature=0))
    return Generation(backend, tokenizer, [BOS] * prompt, sampler=sampler, max_tokens=max_tokens, stop=stop), backend


def finish(generation: Generation) -> GenerationResult:
    text = "".join(piece.text for piece in generation)
    assert text == generation.result.text
    return generation.result


@pytest.mark.parametrize("end", [EOS, TURN])
def test_any_eos_id_ends(tokenizer: Tokenizer, end: int) -> None:
    generation, backend = start(tokenizer, [*byte_ids("hé"), end])
    result = finish(generation)
    assert (result.text, result.stop_reason, result.tokens) == ("hé", "eos", [*byte_ids("hé"), end])
    assert backend.calls == [4, 1, 1, 1]
    assert (result.timings.prefill_tokens, result.timings.decode_tokens) == (4, 3)


def test_unfinished_character_before_eos_is_shown(tokenizer: Tokenizer) -> None:
    result = finish(start(tokenizer, [*byte_ids(b"a\xf0\x9f"), EOS])[0])
    assert result.text == "a\N{REPLACEMENT CHARACTER}"


def test_max_tokens_ends(tokenizer: Tokenizer) -> None:
    result = finish(start(tokenizer, byte_ids("abcdef"), max_tokens=3, stop=["cX"])[0])
    assert (result.text, result.stop_reason) == ("abc", "length")


def test_full_context_ends(tokenizer: Tokenizer) -> None:
    """Prompt of 4 in a context of 6: two places, and the last token needs none."""
    generation, backend = start(tokenizer, byte_ids("abcdef"), context=6)
    assert (finish(generation).text, generation.result.stop_reason, backend.length) == ("abc", "context", 6)


def test_prompt_that_fills_the_context_gives_one_token(tokenizer: Tokenizer) -> None:
    assert finish(start(tokenizer, byte_ids("abc"), context=4)[0]).text == "a"


def test_stop_string_over_tokens_is_cut_and_ends(tokenizer: Tokenizer) -> None:
    generation, _ = start(tokenizer, byte_ids("one END two"), stop=["END"])
    pieces = list(generation)
    assert [piece.text for piece in pieces] == ["o", "n", "e", " ", "", "", ""]
    assert (generation.result.text, generation.result.stop_reason) == ("one ", "stop")
    assert generation.result.tokens == byte_ids("one END")


def test_stop_string_with_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    result = finish(start(tokenizer, [*byte_ids(b"ab\xf0"), EOS], stop=["b\N{REPLACEMENT CHARACTER}"])[0])
    assert result.text == "a"


def test_interrupt_leaves_a_consistent_result(tokenizer: Tokenizer) -> None:
    generation, backend = start(tokenizer, byte_ids("abcdef"))
    backend.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    result = generation.result
    assert (result.text, result.stop_reason, result.tokens) == ("abc", "interrupted", byte_ids("abc"))


def test_leaving_early_counts_as_interrupted(tokenizer: Tokenizer) -> None:
    generation, _ = start(tokenizer, byte_ids("abcdef"))
    next(generation)
    generation.close()
    assert (list(generation), generation.result.stop_reason) == ([], "interrupted")


def test_max_tokens_must_be_positive(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="max_tokens"):
        start(tokenizer, [], max_tokens=0)


@pytest.mark.parametrize("bad", [-1, 259, 1.0, True, "1", None])
def test_token_ids_are_checked(bad: object) -> None:
    with pytest.raises(BadRequest, match="token 1: expected an id from 0 to 258"):
        check_tokens([0, bad], ARCHITECTURE, 10)  # type: ignore[list-item]


def test_numpy_ids_are_ids() -> None:
    assert check_tokens(np.array([3, 4]), ARCHITECTURE, 10) == [3, 4]  # type: ignore[arg-type]


def test_a_larger_context_is_advised_where_the_model_has_one() -> None:
    with pytest.raises(ContextOverflow, match=r"context of 10, of at most 20; shorten them, or --context$"):
        check_tokens([0] * 11, ARCHITECTURE, 10)
    with pytest.raises(ContextOverflow, match=r"context of 20, the model's longest; shorten them$"):
        check_tokens([0] * 21, ARCHITECTURE, 20)


def test_what_is_no_prompt_or_no_option_is_refused(model: Model) -> None:
    for prompt in (None, 5, {"a": 1}):
        with pytest.raises(BadRequest, match=r"prompt: expected text or a list of token ids, found"):
            model.generate(prompt)
    with pytest.raises(BadRequest, match=r"expected a list of token ids, found None"):
        model.score(None)
    with pytest.raises(BadRequest, match=r"temprature: no sampling option has this name; there are temperature, top_k"):
        model.generate("a", temprature=0.5)


def test_context_overflow_and_empty_prompt(model: Model) -> None:
    with pytest.raises(ContextOverflow, match="65 tokens do not fit into the context of 64"):
        model.generate("x" * 64)
    for prompt in ("", []):
        with pytest.raises(BadRequest, match="empty"):
            model.generate(prompt)


def test_greedy_is_the_argmax_of_each_step(model: Model) -> None:
    prompt = model.encode("abc")
    result = model.generate(prompt, max_tokens=8, **GREEDY)
    history = list(prompt)
    for token in result.tokens:
        model.backend.truncate(0)
        assert int(np.argmax(model.backend.forward(history))) == token
        history.append(token)


def test_same_seed_same_text(model: Model) -> None:
    first = model.generate("abc", max_tokens=20, seed=1, temperature=1.5)
    again = model.generate("abc", max_tokens=20, seed=1, temperature=1.5)
    other = model.generate("abc", max_tokens=20, seed=2, temperature=1.5)
    assert first.tokens == again.tokens != other.tokens
    drawn = model.generate("abc", max_tokens=20, temperature=1.5)
    assert model.generate("abc", max_tokens=20, temperature=1.5, seed=drawn.seed).tokens == drawn.tokens


def test_pieces_reach_the_callback(model: Model) -> None:
    pieces = []
    result = model.generate("abc", max_tokens=5, on_token=pieces.append, seed=0)
    assert [piece.token for piece in pieces] == result.tokens
    assert "".join(piece.text for piece in pieces) == result.text


def test_unknown_sampling_option(model: Model) -> None:
    with pytest.raises(BadRequest, match="temprature"):
        model.generate("abc", temprature=1)  # type: ignore[call-arg]


def test_score_is_the_logits_of_generation(model: Model) -> None:
    """log softmax of each step's logits, one token at a time, in float64."""
    tokens = model.encode("some text to score")
    score = model.score(tokens)
    model.backend.truncate(0)
    for place, (token, following) in enumerate(pairwise(tokens)):
        logits = model.backend.forward([token]).astype(np.float64)
        expected = logits[following] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert score.token_logprobs[place] == pytest.approx(expected, abs=1e-4)
        assert score.top1[place] == int(np.argmax(logits))
    assert len(score.token_logprobs) == len(tokens) - 1 == len(score.top1) - 1
    assert score.logprob == pytest.approx(sum(score.token_logprobs))


def test_score_of_one_token_is_nothing(model: Model) -> None:
    score = model.score([5])
    assert (score.token_logprobs, score.logprob, len(score.top1)) == ([], 0.0, 1)


def test_a_new_sequence_ends_the_running_one(model: Model) -> None:
    running = model.stream("abc", **GREEDY)
    next(running)
    model.score([1, 2])
    assert list(running) == []


def test_chat_uses_the_template(model: Model) -> None:
    messages = [{"role": "user", "content": "hi"}]
    expected = [BOS, *byte_ids("[user]hi"), TURN, *byte_ids("[assistant]")]
    assert model.encode_chat(messages) == expected
    chat = model.chat(messages, max_tokens=6, **GREEDY)
    assert chat.tokens == model.generate(expected, max_tokens=6, **GREEDY).tokens


def test_conversation_computes_only_what_is_new(model: Model) -> None:
    conversation = model.conversation(system="S")
    first = conversation.send("a", max_tokens=4, **GREEDY)
    list(first)
    assert conversation.messages[:2] == [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    second = conversation.send("b", max_tokens=4, **GREEDY)
    list(second)
    rendered = model.encode_chat(conversation.messages[:-1])
    assert second.result.prompt_tokens == len(rendered)
    assert second.result.timings.prefill_tokens <= len(rendered) - first.result.prompt_tokens
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "S"}]


def test_conversation_survives_an_overflow(model: Model) -> None:
    conversation = model.conversation()
    list(conversation.send("a", max_tokens=2, **GREEDY))
    before = conversation.messages
    with pytest.raises(ContextOverflow):
        conversation.send("b" * 60)
    assert conversation.messages == before


def test_vocabulary_of_the_fixture(model: Model) -> None:
    assert model.file.architecture.vocab_size == BYTE_VOCABULARY
    assert model.context == 64


class Streams(ScriptedBackend):
    """A backend of several streams: each says the script of its prompt's length."""

    def __init__(self, scripts: dict[int, list[int]], streams: int) -> None:
        super().__init__([], 64)
        self.scripts, self.streams = scripts, streams
        self.running: dict[int, tuple[int, int]] = {}
        self.log: list[str] = []

    def begin(self, stream: int, prompt: list[int], options: SamplingOptions, seed: int, count: int) -> None:
        assert 0 <= stream < self.streams and stream not in self.running and count >= 1
        self.running[stream] = len(prompt), 0
        self.log.append(f"+{len(prompt)}")

    def advance(self) -> list[tuple[int, int]]:
        assert self.running
        tokens = [(stream, self.scripts[length][said]) for stream, (length, said) in self.running.items()]
        if any(token < 0 for _, token in tokens):
            raise BadModelFile("not finite")
        self.running = {stream: (length, said + 1) for stream, (length, said) in self.running.items()}
        self.log.append("step")
        return tokens

    def end(self, stream: int) -> None:
        self.log.append(f"-{self.running.pop(stream)[0]}")


def group_of(tokenizer: Tokenizer, texts: list[str], streams: int, **options) -> tuple[GenerationGroup, Streams]:
    backend = Streams({n + 1: [*byte_ids(text), EOS] for n, text in enumerate(texts)}, streams)
    sampler = Sampler(SamplingOptions(temperature=0))
    settings = {"sampler": sampler, "max_tokens": None, "stop": [], **options}
    generations = [Generation(backend, tokenizer, [BOS] * (n + 1), **settings) for n in range(len(texts))]
    return GenerationGroup(backend, generations), backend


@pytest.mark.parametrize("streams", [2, 3, 8])
def test_a_group_takes_the_next_prompt_where_one_ends(tokenizer: Tokenizer, streams: int) -> None:
    texts = ["ab", "abcdef", "", "x", "abcd"]
    group, backend = group_of(tokenizer, texts, streams)
    shown = [""] * len(texts)
    for number, piece in group:
        shown[number] += piece.text
    assert shown == texts == [result.text for result in group.results]
    assert {result.stop_reason for result in group.results} == {"eos"}
    assert [result.timings.decode_tokens for result in group.results] == [len(text) for text in texts]
    assert not backend.running
    if streams == 2:
        first = ["+1", "+2", *["step"] * 3, "-1", "+3", "step", "-3", "+4", *["step"] * 2, "-4", "+5"]
        assert backend.log[: len(first)] == first
    assert backend.log.count("step") == {2: 11, 3: 8, 8: 7}[streams]


def test_a_group_stops_each_text_on_its_own(tokenizer: Tokenizer) -> None:
    group, backend = group_of(tokenizer, ["abc END d", "abcdefgh"], 2, stop=["END"], max_tokens=7)
    list(group)
    assert [(result.text, result.stop_reason) for result in group.results] == [("abc ", "stop"), ("abcdefg", "length")]
    assert not backend.running


def test_a_group_that_is_left_ends_its_streams(tokenizer: Tokenizer) -> None:
    group, backend = group_of(tokenizer, ["abc", "abc", "abc"], 2)
    next(group)
    group.close()
    assert not backend.running
    assert [result.stop_reason for result in group.results] == ["interrupted"] * 3
    failing, backend = group_of(tokenizer, ["abc", "abc"], 2)
    backend.scripts[2][1] = -1
    with pytest.raises(BadModelFile):
        list(failing)
    assert not backend.running


def test_many_prompts_are_each_what_it_is_alone(model: Model) -> None:
    prompts, options = ["abc", "x", "a longer one"], {"max_tokens": 9, "temperature": 1.5}
    pieces = []
    results = model.generate_many(prompts, seed=2**64 - 1, on_token=lambda *piece: pieces.append(piece), **options)
    seeds = [2**64 - 1, 0, 1]
    alone = [model.generate(prompt, seed=seed, **options) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert [(r.tokens, r.text, r.seed) for r in results] == [(r.tokens, r.text, r.seed) for r in alone]
    assert [piece.token for number, piece in pieces if number == 1] == results[1].tokens
    assert len({result.seed for result in model.generate_many(["a", "a"], max_tokens=1)}) == 2
    assert model.generate_many([]) == []
    with pytest.raises(BadRequest, match="empty"):
        model.generate_many(["a", ""])
    running = model.stream_many(["a", "b"], **GREEDY)
    next(running)
    model.score([1, 2])
    assert list(running) == []
