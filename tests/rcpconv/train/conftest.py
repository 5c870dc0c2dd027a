"""A tiny model and a text to train it on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rcpconv.runs import Run
from tiny_checkpoints import CORPUS, make_tiny_checkpoint
from tiny_trainings import EVALUATED, train


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    make_tiny_checkpoint("llama32", folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n\n".join(f"{line} {i}" for i in range(40) for line in CORPUS))
    return path


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """One thread: the models are tiny, and a forked child has no pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run. Of a module, for its bits are those of one thread."""
    return train(checkpoint, text, tmp_path_factory.mktemp("runs") / "reference", eval_data=str(text), **EVALUATED)
