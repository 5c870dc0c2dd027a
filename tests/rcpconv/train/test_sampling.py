"""Text sampled from the teacher: the cached decoder is the decoder, and what the rows look like."""

import itertools
from pathlib import Path

import pytest
import torch

from rcpconv import cached
from rcpconv.baking import baked_decoder
from rcpconv.cached import CachedDecoder, draw
from rcpconv.checkpoint import load_source
from rcpconv.layers import ComputeOptions
from rcpconv.prepare import original_decoder
from rcpconv.train.sampling import sample
from rcpformat.architecture import TokenizerInfo
from tiny_checkpoints import make_tiny_checkpoint
from tiny_runs import make_tiny_run


@pytest.mark.parametrize("kind", ["llama32", "mistral", "qwen3", "llama_bias"])
def test_one_position_at_a_time_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    """With a sliding window shorter than the text, q/k norm, biases, grouped queries; original and quantized."""
    run = make_tiny_run(kind, tmp_path)
    teacher = original_decoder(run.source())
    baked = baked_decoder(run.architecture, run.quantization, run.tensor)
    tokens = torch.randint(290, (3, 20), generator=torch.Generator().manual_seed(0))
    half = original_decoder(run.source(), torch.bfloat16, ComputeOptions(half=True))
    for decoder, tolerance in ((teacher, 1e-4), (half, 0.05), (baked, 0.05)):
        with torch.inference_mode():
            one_by_one = CachedDecoder(decoder, 3, 20)
            found = torch.stack([one_by_one.step(tokens[:, t]) for t in range(20)], dim=1)
            expected = decoder(tokens)
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_rows_begin_with_bos_which_also_follows_eos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_checkpoint("llama1", tmp_path)
    teacher = original_decoder(load_source(str(tmp_path)))
    info = TokenizerInfo(bos_id=0, eos_ids=tuple(range(100, 200)), add_bos=True)
    told: list[int] = []
    monkeypatch.setitem(cached._LARGEST_BATCH, "cpu", 4)
    rows = list(sample(teacher, info, tokens=10 * 16 - 5, seq_len=16, seed=1, tell=told.append))
    assert told == [64, 128, 155] and [len(row) for row in rows] == [16] * 10
    assert all(row[0] == 0 for row in rows)
    followers = [after for row in rows for before, after in itertools.pairwise(row) if before in info.eos_ids]
    assert len(followers) > 10 and set(followers) == {0}
    assert rows == list(sample(teacher, info, tokens=10 * 16 - 5, seq_len=16, seed=1, tell=told.append))
    assert rows != list(sample(teacher, info, tokens=10 * 16 - 5, seq_len=16, seed=2, tell=told.append))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw(probabilities.log().expand(20_000, 6), torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=6) / 20_000
    assert (shares - probabilities).abs().max() < 0.015  # four standard errors
    assert shares[[0, 2, 5]].sum() == 0


def test_without_bos_rows_begin_with_a_random_token(tmp_path: Path) -> None:
    make_tiny_checkpoint("qwen2", tmp_path)
    teacher = original_decoder(load_source(str(tmp_path)))
    info = TokenizerInfo(bos_id=None, eos_ids=(), add_bos=False)
    rows = list(sample(teacher, info, tokens=80, seq_len=4, seed=1, tell=lambda done: None))
    assert len({row[0] for row in rows}) > 10
