"""Filters, their order, and the distribution that is drawn from."""

import numpy as np
import pytest

from rcprun.errors import BadModelFile, BadRequest
from rcprun.sampling import REPEAT_WINDOW, Sampler, SamplingOptions, candidates, penalize

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


FIVE = logits(0.05, 0.4, 0.3, 0.05, 0.2)


def kept(vector: np.ndarray = FIVE, **options: float) -> dict[int, float]:
    ids, probability = candidates(vector, SamplingOptions(**OFF | options))
    assert probability.sum() == pytest.approx(1)
    return dict(zip(ids.tolist(), probability.round(6).tolist(), strict=True))


def test_no_filter_keeps_the_models_distribution() -> None:
    assert kept() == {1: 0.4, 2: 0.3, 4: 0.2, 0: 0.05, 3: 0.05}


def test_top_k() -> None:
    assert list(kept(top_k=2)) == [1, 2]
    assert kept(top_k=2)[1] == pytest.approx(4 / 7, abs=1e-6)
    assert len(kept(top_k=99)) == 5


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    assert list(kept(top_p=0.39)) == [1]
    assert list(kept(top_p=0.41)) == [1, 2]
    assert list(kept(top_p=0)) == [1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert list(kept(min_p=0.45)) == [1, 2, 4]
    assert list(kept(min_p=1)) == [1]


def test_top_k_comes_before_top_p() -> None:
    """Of the best two, the first has 4/7 = 0.571; of all, 0.4."""
    assert list(kept(top_k=2, top_p=0.5)) == [1]


def test_temperature_comes_last() -> None:
    """Filters see the probabilities at temperature 1, however flat the draw is."""
    assert list(kept(top_p=0.41, temperature=100)) == [1, 2]
    assert list(kept(min_p=0.45, temperature=100)) == [1, 2, 4]
    squared = kept(temperature=0.5)
    assert squared[1] / squared[2] == pytest.approx((4 / 3) ** 2, rel=1e-4)


def test_tiny_temperature_is_greedy() -> None:
    assert kept(temperature=1e-300)[1] == 1


def test_penalty_pushes_recent_tokens_down_once() -> None:
    vector = np.array([2, -2, 1, 0], dtype=np.float32)
    np.testing.assert_array_equal(penalize(vector, [0, 1, 0], 2.0), [1, -4, 1, 0])
    np.testing.assert_array_equal(vector, [2, -2, 1, 0])


def test_penalty_comes_first_and_looks_back_a_window() -> None:
    vector = np.array([2.0, 1.5, 0], dtype=np.float32)
    sampler = Sampler(SamplingOptions(temperature=0, repeat_penalty=2.0))
    assert sampler.sample(vector, [0]) == 1
    assert sampler.sample(vector, [0] + [2] * (REPEAT_WINDOW - 1)) == 1
    assert sampler.sample(vector, [0] + [2] * REPEAT_WINDOW) == 0


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingOptions(**OFF | {"temperature": 2.0}, seed=7))
    draws = np.bincount([sampler.sample(FIVE, []) for _ in range(4000)], minlength=5) / 4000
    expected = np.sqrt([0.05, 0.4, 0.3, 0.05, 0.2])
    expected /= expected.sum()
    assert np.abs(draws - expected).max() < 0.03  # four standard deviations


def test_seed_makes_draws_reproducible() -> None:
    def draws(seed: int | None) -> tuple[int, list[int]]:
        sampler = Sampler(SamplingOptions(seed=seed, **OFF))
        return sampler.seed, [sampler.sample(FIVE, []) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3)[1] != draws(4)[1]
    seed, tokens = draws(None)
    assert draws(seed) == (seed, tokens)


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingOptions(temperature=0)).sample(np.array([1, 3, 3], dtype=np.float32), []) == 1


def test_logits_must_be_finite() -> None:
    with pytest.raises(BadModelFile, match="not finite"):
        Sampler(SamplingOptions()).sample(np.array([1, np.nan], dtype=np.float32), [])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repeat_penalty": 0},
        {"seed": -1},
        {"top_p": "0.9"},
        {"top_k": True},
    ],
    ids=str,
)
def test_options_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match=next(iter(bad))):
        SamplingOptions(**bad)


def test_models_defaults_fill_in_what_is_not_chosen() -> None:
    options = SamplingOptions.with_defaults(
        {"temperature": 0.6, "top_k": 50, "unknown": 1}, temperature=0.0, top_p=None, seed=5
    )
    assert options == SamplingOptions(temperature=0.0, top_k=50, top_p=0.95, min_p=0.05, repeat_penalty=1.0, seed=5)
