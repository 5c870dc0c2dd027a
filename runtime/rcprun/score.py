"""Log-likelihoods of given tokens, and the files of `rcp-run score`. Knows nothing of text.

Logits are float32; exponentials of their distance to the row's largest are summed in float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rcpformat.architecture import Architecture
from rcprun.backends import Backend
from rcprun.engine import check_tokens
from rcprun.errors import BadRequest, ContextOverflow
from rcprun.output import replacing
from rcprun.sampling import check_finite


@dataclass(frozen=True, kw_only=True)
class SequenceScore:
    """How likely a model finds a sequence of n tokens."""

    token_logprobs: list[float]
    """Natural log-likelihood of tokens[1], tokens[2], …, each given all before it: n − 1 numbers."""
    top1: list[int]
    """The likeliest token after each of the n tokens."""

    @property
    def logprob(self) -> float:
        """Sum of token_logprobs."""
        return float(np.sum(self.token_logprobs))


def score_sequence(
    backend: Backend, tokens: Sequence[int], logits_NV: NDArray[np.float32] | None = None
) -> SequenceScore:
    """Score checked tokens as a fresh sequence; what the backend's cache held is lost.

    logits_NV: filled, when given, with the logits after each of the tokens. Raises BadModelFile for logits that are not
    finite.
    """
    backend.truncate(0)
    token_logprobs: list[float] = []
    top1: list[int] = []
    for block_MV in backend.forward_all(tokens):
        check_finite(block_MV)
        start = len(top1)
        if logits_NV is not None:
            logits_NV[start : start + len(block_MV)] = block_MV
        top1 += block_MV.argmax(axis=1).tolist()
        next_M = np.asarray(tokens[start + 1 : start + 1 + len(block_MV)], dtype=np.int64)
        largest_M = block_MV[: len(next_M)].max(axis=1)
        chosen_M = block_MV[np.arange(len(next_M)), next_M].astype(np.float64) - largest_M
        with np.errstate(over="ignore"):  # -inf is the right limit of a distance beyond float32
            shifted_MV = block_MV[: len(next_M)] - largest_M[:, None]
        total_M = np.exp(shifted_MV, out=shifted_MV).sum(axis=1, dtype=np.float64)
        token_logprobs += (chosen_M - np.log(total_M)).tolist()
    return SequenceScore(token_logprobs=token_logprobs, top1=top1)


def read_sequences(lines: Iterable[bytes], architecture: Architecture, context: int) -> list[list[int]]:
    """The sequences in JSON lines, each a list of token ids or an object with one under "tokens"; blank lines are none.

    Raises BadRequest or ContextOverflow, naming the line.
    """
    sequences = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
            tokens = value.get("tokens") if isinstance(value, dict) else value
            if not isinstance(tokens, list):
                raise BadRequest('expected a list of token ids, or an object with one under "tokens"')
            sequences.append(check_tokens(tokens, architecture, context))
        except (BadRequest, ContextOverflow) as error:
            raise type(error)(f"line {number}: {error}") from error
        except RecursionError as error:
            raise BadRequest(f"line {number}: not a list of token ids: nested too deeply") from error
        except ValueError as error:  # neither UTF-8 nor JSON, or a number of thousands of digits
            raise BadRequest(f"line {number}: not JSON: {error}") from error
    return sequences


def score_file(
    backend: Backend,
    architecture: Architecture,
    lines: Iterable[bytes],
    out: Path | None,
    top1: bool,
    logits: Path | None,
    force: bool,
) -> None:
    """Score JSON lines (read_sequences) into one JSON line each: n, logprob, token_logprobs, and top1 where asked for.

    out: a file, or standard output. logits: a .npy file for the float32 logits after every token, sequence after
    sequence. Existing files are overwritten only with force. Raises BadRequest, ContextOverflow or InputOutputError.
    """
    sequences = read_sequences(lines, architecture, backend.context)
    with ExitStack() as stack:
        rows_NV = None
        if logits is not None:
            shape = (sum(map(len, sequences)), architecture.vocab_size)
            temporary = stack.enter_context(replacing(logits, force=force))
            rows_NV = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        sink = sys.stdout
        if out is not None:
            sink = stack.enter_context(stack.enter_context(replacing(out, force=force)).open("w", encoding="utf-8"))
        row = 0
        for tokens in sequences:
            score = score_sequence(backend, tokens, None if rows_NV is None else rows_NV[row : row + len(tokens)])
            row += len(tokens)
            line = {"n": len(tokens), "logprob": score.logprob, "token_logprobs": score.token_logprobs}
            print(json.dumps(line | ({"top1": score.top1} if top1 else {}), allow_nan=False), file=sink, flush=True)
