"""Texts with tokens drawn anew: which, that nothing else changes, and that order and batches do not matter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rcpconv.cached import draw_at
from rcpconv.checkpoint import load_source
from rcpconv.model import Decoder
from rcpconv.prepare import original_decoder
from rcpconv.train import resampling
from rcpconv.train.loop import Trainer
from rcpconv.train.resampling import places, redraw
from rcpconv.train.tokens import Mixture, Sequences
from tiny_checkpoints import make_tiny_checkpoint

VOCABULARY = 290


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("teacher")
    make_tiny_checkpoint("llama32", folder)
    return original_decoder(load_source(str(folder)))


def test_places_depend_on_number_and_seed_alone() -> None:
    chosen_BT, uniform_BT = places(range(5, 9), 1000, 0.2, seed=3)
    assert chosen_BT.shape == uniform_BT.shape == (4, 1000)
    assert not chosen_BT[:, 0].any() and abs(chosen_BT.mean() - 0.2) < 0.03
    assert uniform_BT.min() >= 0 and uniform_BT.max() < 1 and abs(uniform_BT.mean() - 0.5) < 0.03
    for again, expected in zip(places([7], 1000, 0.2, seed=3), (chosen_BT[2:3], uniform_BT[2:3]), strict=True):
        assert np.array_equal(again, expected)
    assert not np.array_equal(places([7], 1000, 0.2, seed=4)[1], uniform_BT[2:3])
    assert not places([0], 1000, 0.0, seed=0)[0].any() and places([0], 1000, 1.0, seed=0)[0].sum() == 999


def test_chosen_tokens_are_the_teachers_and_others_stay(teacher: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_BT = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    chosen_BT, uniform_BT = map(torch.from_numpy, places(range(3), 40, 0.3, seed=0))
    found_BT = redraw(teacher, tokens_BT, chosen_BT, uniform_BT)
    with torch.no_grad():
        before_NV = teacher(tokens_BT)[:, :-1].flatten(0, 1)
    drawn_BT = draw_at(before_NV, uniform_BT[:, 1:].float().reshape(-1, 1)).reshape(3, 39)
    assert torch.equal(found_BT[:, 1:], torch.where(chosen_BT[:, 1:], drawn_BT, tokens_BT[:, 1:]))
    assert torch.equal(found_BT[:, 0], tokens_BT[:, 0]) and not torch.equal(found_BT, tokens_BT)
    monkeypatch.setattr(resampling, "chunk_rows", lambda *_: 5)
    assert torch.equal(redraw(teacher, tokens_BT, chosen_BT, uniform_BT), found_BT)
    assert torch.equal(redraw(teacher, tokens_BT, torch.zeros_like(chosen_BT), uniform_BT), tokens_BT)


def test_epochs_of_sequences_and_mixtures() -> None:
    short, long = (Sequences(np.arange(count * 8 + 3), 8, seed=0) for count in (2, 50))
    assert [short.epoch(index) for index in range(5)] == [0, 0, 1, 1, 2]
    mixture = Mixture(short, long, 0.5)
    assert [mixture.epoch(index) for index in range(8)] == [0, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_training_changes_texts_that_it_has_seen(after: int, teacher: Decoder) -> None:
    """Steps of two sequences, of which there are three: the second one is the first with a text for the second time."""
    config = SimpleNamespace(resample=0.5, resample_after=after, seed=0)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=3 * 16).astype(np.uint16)
    trainer = SimpleNamespace(
        config=config,
        accum=1,
        batch=2,
        sequences=Sequences(tokens, 16, seed=0),
        counters=SimpleNamespace(step=0),
        device=torch.device("cpu"),
        teacher=teacher,
    )
    changed = []
    for step in range(4):
        trainer.counters.step = step
        as_it_is = torch.from_numpy(trainer.sequences.batch(2 * step, 2))
        found = Trainer._resampled(trainer, as_it_is, 2 * step)  # type: ignore[arg-type]
        changed += (found != as_it_is).any(dim=1).tolist()
    assert changed == [index // 3 >= after for index in range(8)]
