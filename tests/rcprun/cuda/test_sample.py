"""Sampling on the GPU against rcprun.sampling, given the same uniform numbers."""

from typing import Any

import numpy as np
import pytest

from rcprun.sampling import REPEAT_WINDOW, SamplingOptions, candidates, penalize

pytestmark = pytest.mark.gpu

# Numbers that float32 holds exactly: the GPU has them as such.
USUAL = {"temperature": 0.75, "top_k": 40, "top_p": 0.9375, "min_p": 0.0625}
FULL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repeat_penalty": 1.25},
    USUAL,
    USUAL | {"repeat_penalty": 1.25},
    FULL,
    FULL | {"temperature": 2.0},
    FULL | {"temperature": 1e-20},
    FULL | {"top_k": 1},
    FULL | {"top_k": 3000, "temperature": 100.0},
    FULL | {"top_p": 0.0},
    FULL | {"top_p": 0.875},
    FULL | {"top_p": 0.5, "temperature": 4.0, "repeat_penalty": 0.75},
    FULL | {"min_p": 0.125, "temperature": 3.0},
    FULL | {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.75, "min_p": 0.03125, "temperature": 1.5},
    FULL | {"top_k": 128, "temperature": 2.0},
    FULL | {"top_k": 33, "top_p": 0.5, "temperature": 0.5},
]
WAYS: dict[str, dict[str, bool]] = {
    "all": {"greedy": False},
    "few": {"greedy": False, "few": True},
    "few, older": {"greedy": False, "few": True, "hopper": False},
}
"""Arguments of `sample`."""


def philox(seed: int, counter: int) -> list[int]:
    """Philox 4x32-10 of a 64-bit key and the lower half of a 128-bit counter: four words."""
    mask = 0xFFFFFFFF
    c, k = [counter & mask, counter >> 32, 0, 0], [seed & mask, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & mask, (low >> 32) ^ c[3] ^ k[1], low & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def uniform(seed: int, counter: int) -> float:
    words = philox(seed, counter)
    return (words[0] | words[1] << 32) / 2**64


def chosen(logits: np.ndarray, options: SamplingOptions, history: list[int], draw: float) -> tuple[int, float]:
    """NumPy's token, and how far the draw lies from a draw with another result.

    rcprun.sampling, where two things are left to rounding or to argpartition: of ties at the top_k-th place the smaller
    ids are kept, and a top_p of 1 keeps all, however small the probability.
    """
    if options.repeat_penalty != 1:
        logits = penalize(logits, history[-REPEAT_WINDOW:], options.repeat_penalty)
    if options.temperature == 0:
        return int(np.argmax(logits)), 1.0
    ids = np.argsort(-logits, kind="stable")[: options.top_k or None]
    relative = logits[ids].astype(np.float64) - float(logits.max())
    weight = np.exp(relative)
    before = np.cumsum(weight) - weight
    keep = (before < options.top_p * weight.sum()) | (options.top_p == 1)
    keep &= weight >= options.min_p
    keep[0] = True
    weight = np.exp(relative[keep] / options.temperature)
    places = np.cumsum(weight / weight.sum())
    place = min(int(np.searchsorted(places, draw, side="right")), len(places) - 1)
    return int(ids[keep][place]), float(np.abs(places - draw).min())


def new_state(options: list[SamplingOptions], seeds: list[int], histories: list[list[int]], vocabulary: int) -> Any:
    from rcprun.backends.cuda.sample import SamplerState

    state = SamplerState.create(len(options), vocabulary, ring=REPEAT_WINDOW + 6)
    for row, (option, seed, history) in enumerate(zip(options, seeds, histories, strict=True)):
        state.start(row, option, seed, history)
    return state


def test_philox_known_answers() -> None:
    """Of the authors' Random123 library."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_the_reference_here_is_that_of_the_runtime() -> None:
    """Where nothing is left to rounding: the choices made here spread over exactly the candidates, by their shares."""
    logits = np.random.default_rng(1).normal(size=200).astype(np.float32)
    for fields in OPTIONS:
        options = SamplingOptions(**fields)  # type: ignore[arg-type]
        if options.temperature == 0 or options.repeat_penalty != 1:
            continue
        ids, probability = candidates(logits, options)
        draws = np.cumsum(probability) - probability / 2
        likely = probability > 1e-12  # the others' draws are those of a neighbour
        assert [chosen(logits, options, [], draw)[0] for draw in draws[likely]] == ids[likely].tolist()


@pytest.mark.parametrize("scale", [0.001, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("vocabulary", [128256, 32000, 4097, 300, 2, 1])
@pytest.mark.parametrize("way", WAYS)
def test_choices_are_numpys(vocabulary: int, scale: float, way: str) -> None:
    """All options at once, a row each, for some steps. Logits within 0.001 of each other all lie in one bin."""
    import cupy

    from rcprun.backends.cuda.sample import draws_from_few, sample

    rng = np.random.default_rng(vocabulary)
    options = [SamplingOptions(**fields) for fields in OPTIONS]  # type: ignore[arg-type]
    if way != "all":
        options = [option for option in options if draws_from_few(option)]
    histories = [rng.integers(0, vocabulary, n).tolist() for n in rng.integers(0, 200, len(options))]
    seeds = [int(seed) for seed in rng.integers(0, 2**64, len(options), dtype=np.uint64)]
    state = new_state(options, seeds, histories, vocabulary)
    close = 0
    for step in range(6):
        logits = (rng.normal(size=(len(options), vocabulary)) * scale).astype(np.float32)
        if step % 2:
            logits = np.round(logits, 1 if scale >= 1 else 4)  # with ties
        sample(cupy.asarray(logits), state, **WAYS[way])
        tokens = state.token.get().tolist()
        for row, (option, history) in enumerate(zip(options, histories, strict=True)):
            expected, margin = chosen(logits[row], option, history, uniform(seeds[row], step))
            if margin < 1e-9:  # float64's own sums differ by more in another order
                close += 1
            else:
                assert tokens[row] == expected, f"step {step}, {option}: {tokens[row]}, expected {expected}"
            history.append(tokens[row])
        lengths = [len(history) for history in histories]
        assert state.length.get().tolist() == lengths
        assert state.position.get().tolist() == [length - 1 for length in lengths]
        ring = state.history.get()
        assert [int(ring[row, (n - 1) % ring.shape[1]]) for row, n in enumerate(lengths)] == tokens
    assert close <= 2


@pytest.mark.parametrize("hopper", [True, False])
def test_greedy_alone_takes_the_first_of_equals(hopper: bool) -> None:
    import cupy

    from rcprun.backends.cuda.sample import sample

    rng = np.random.default_rng(0)
    for vocabulary in (5, 32000, 100000, 128256):
        state = new_state([SamplingOptions(temperature=0)] * 3, [0] * 3, [[1]] * 3, vocabulary)
        for _ in range(3):
            logits = np.round(rng.normal(size=(3, vocabulary)) * 3).astype(np.float32)
            logits[1] = 0
            logits[2, rng.integers(vocabulary)] *= -0.0
            sample(cupy.asarray(logits), state, greedy=True, hopper=hopper)
            assert state.token.get().tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_choose_the_same_tokens(way: str) -> None:
    """To the bit, state and all: of ties in their thousands, of logits far apart, and of too few."""
    import cupy

    from rcprun.backends.cuda.sample import sample

    rng = np.random.default_rng(5)
    options = [SamplingOptions(**USUAL | {"top_k": k}) for k in (1, 7, 40, 128)]  # type: ignore[arg-type]
    for vocabulary in (20, 9000):
        plain, other = (new_state(options, [1, 2, 3, 4], [[]] * 4, vocabulary) for _ in range(2))
        for step in range(12):
            logits = rng.normal(size=(4, vocabulary)) * [0.0, 1e-6, 0.5, 2e37][step % 4]
            logits[:, rng.integers(vocabulary, size=step)] += 1
            on_gpu = cupy.asarray(logits.astype(np.float32))
            sample(on_gpu, plain, greedy=False)
            sample(on_gpu, other, **WAYS[way])
        for name in ("token", "position", "history", "length", "random"):
            np.testing.assert_array_equal(getattr(plain, name).get(), getattr(other, name).get(), name)


def test_a_row_that_needs_the_slow_way_fails_in_the_fast_one() -> None:
    import cupy

    from rcprun.backends.cuda.sample import FAILED, FEW, sample

    options = [SamplingOptions(top_k=k, top_p=0.0) for k in (0, FEW + 1, FEW)]
    state = new_state(options, [1, 2, 3], [[]] * 3, 3000)
    logits = np.zeros((3, 3000), dtype=np.float32)
    logits[:, 2999] = 1
    sample(cupy.asarray(logits), state, greedy=False, few=True)
    assert state.token.get().tolist() == [FAILED, FAILED, 2999]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_their_row_only(poison: float, temperature: float, way: str) -> None:
    import cupy

    from rcprun.backends.cuda.sample import FAILED, sample

    vocabulary = 9000
    arguments = WAYS[way] | {"greedy": temperature == 0}
    state = new_state([SamplingOptions(temperature=temperature, top_k=40)] * 2, [1, 2], [[], []], vocabulary)
    logits = np.zeros((2, vocabulary), dtype=np.float32)
    logits[:, 77] = 50
    for place in (0, vocabulary - 1):
        broken = logits.copy()
        broken[0, place] = poison
        sample(cupy.asarray(broken), state, **arguments)
        assert state.token.get().tolist() == [FAILED, 77]
    sample(cupy.asarray(logits), state, **arguments)
    assert state.token.get().tolist() == [77, 77]


def test_draws_follow_the_distribution() -> None:
    import cupy

    from rcprun.backends.cuda.sample import sample

    rows, steps = 100, 40
    probability = np.array([0.05, 0.4, 0.3, 0.05, 0.2])
    options = SamplingOptions(**FULL | {"temperature": 2.0})  # type: ignore[arg-type]
    state = new_state([options] * rows, list(range(rows)), [[]] * rows, len(probability))
    logits = cupy.asarray(np.tile(np.log(probability).astype(np.float32), (rows, 1)))
    counts = np.zeros(len(probability))
    for _ in range(steps):
        sample(logits, state, greedy=False)
        counts += np.bincount(state.token.get(), minlength=len(probability))
    expected = np.sqrt(probability) / np.sqrt(probability).sum()
    assert np.abs(counts / (rows * steps) - expected).max() < 0.03  # four standard deviations


@pytest.mark.parametrize("few", [False, True])
def test_a_graph_replays_new_draws(few: bool) -> None:
    """The same tokens as launches one by one: all that changes lies on the GPU."""
    import cupy

    from rcprun.backends.cuda.sample import sample

    logits = cupy.asarray(np.random.default_rng(3).normal(size=(2, 32000)).astype(np.float32))
    options = [SamplingOptions(**FULL | {"repeat_penalty": 1.5, "top_k": 100 if few else 0})] * 2  # type: ignore[arg-type]
    plain, replayed = (new_state(options, [5, 2**63], [[], [1, 2]], 32000) for _ in range(2))
    for _ in range(5):
        sample(logits, plain, greedy=False, few=few)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        sample(logits, replayed, greedy=False, few=few)
        graph = stream.end_capture()
        for _ in range(5):
            graph.launch(stream)
        stream.synchronize()
    assert plain.length.get().tolist() == [5, 7]
    np.testing.assert_array_equal(plain.history.get(), replayed.history.get())
    assert len(set(plain.history.get()[0, :5].tolist())) == 5
