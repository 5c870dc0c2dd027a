"""Picks the next token from a vector of logits. Knows nothing of models, text or devices.

The order, which is llama.cpp's: repeat penalty, top-k, top-p, min-p, temperature, draw. Top-p and min-p thus judge the
model's own probabilities, before the temperature flattens them. Temperature 0 takes the largest penalized logit.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rcpformat.spec import GENERATION_LIMITS
from rcprun.errors import BadModelFile, BadRequest

REPEAT_WINDOW = 64
"""The repeat penalty looks at this many of the latest tokens, the prompt's included."""


def _check(name: str, value: object, low: float, high: float, *, integer: bool = False) -> None:
    kind = "an integer" if integer else "a number"
    number = isinstance(value, int) or (isinstance(value, float) and not integer)
    if not number or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
        limit = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
        raise BadRequest(f"{name}: expected {kind} {limit}, found {value!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. The defaults are llama.cpp's. Raises BadRequest for a value out of range."""

    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 40
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the likeliest tokens until their probabilities sum to this; 1 keeps all."""
    min_p: float = 0.05
    """Drop tokens less likely than this fraction of the likeliest one; 0 keeps all."""
    repeat_penalty: float = 1.0
    """Divides positive and multiplies negative logits of the latest REPEAT_WINDOW tokens; 1 is off."""
    seed: int | None = None
    """Of the random draws; None draws a seed of its own, which the result reports."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, math.inf)
        _check("top_k", self.top_k, 0, math.inf, integer=True)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("repeat_penalty", self.repeat_penalty, 1e-3, 1e3)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**64 - 1, integer=True)

    @classmethod
    def with_defaults(cls, defaults: Mapping[str, Any], **chosen: Any) -> Self:
        """The chosen values that are not None, else the model's defaults (`rcp.generation`), else the class's.

        Raises BadRequest for a name that is no field.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(chosen.keys() - set(names)):
            raise BadRequest(f"{unknown[0]}: no sampling option has this name; there are {', '.join(names)}")
        values = {name: value for name, value in defaults.items() if name in GENERATION_LIMITS}
        return cls(**(values | {name: value for name, value in chosen.items() if value is not None}))


def not_finite() -> BadModelFile:
    """The error for logits that are infinite or not a number."""
    return BadModelFile("the model gave logits that are not finite numbers; the file's weights make no sense")


def check_finite(logits: NDArray[np.float32]) -> None:
    """Raise BadModelFile for logits, of any shape, that are infinite or not a number."""
    if not np.isfinite(logits).all():
        raise not_finite()


def penalize(logits_V: NDArray[np.float32], recent: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """A copy of the logits with those of the recent tokens pushed down, once each."""
    seen = np.unique(np.asarray(recent, dtype=np.int64))
    out = logits_V.copy()
    out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    return out


def candidates(
    logits_V: NDArray[np.float32], options: SamplingOptions
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that survive top-k, top-p and min-p, likeliest first, and the probabilities they are drawn with.

    The temperature must not be 0.
    """
    if 0 < options.top_k < len(logits_V):
        ids = np.argpartition(-logits_V, options.top_k - 1)[: options.top_k]
    else:
        ids = np.arange(len(logits_V))
    ids = ids[np.lexsort((ids, -logits_V[ids]))]
    relative = logits_V[ids].astype(np.float64)
    relative -= relative[0]
    weight = np.exp(relative)
    probability = weight / weight.sum()
    before = np.cumsum(probability) - probability
    keep = ((before < options.top_p) | (options.top_p == 1)) & (probability >= options.min_p * probability[0])
    keep[0] = True
    ids = ids[keep]
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is the right limit
        weight = np.exp(relative[keep] / options.temperature)
    return ids, weight / weight.sum()


class Sampler:
    """Draws tokens by one set of options, reproducibly for a given seed."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        self._random = np.random.default_rng(self.seed)

    def sample(self, logits_V: NDArray[np.float32], history: Sequence[int]) -> int:
        """The next token's id. history: all tokens so far, of which the last REPEAT_WINDOW count."""
        check_finite(logits_V)
        if self.options.repeat_penalty != 1:
            logits_V = penalize(logits_V, history[-REPEAT_WINDOW:], self.options.repeat_penalty)
        if self.options.temperature == 0:
            return int(np.argmax(logits_V))
        ids, probability = candidates(logits_V, self.options)
        place = np.searchsorted(np.cumsum(probability), self._random.random(), side="right")
        return int(ids[min(int(place), len(ids) - 1)])
