"""What a model takes of the GPU's memory, against what was planned."""

import dataclasses
import gc
from pathlib import Path

import pytest

from rcpformat.reader import RcpFile
from shapes import WIKI_22M
from tiny_rcp import LDP, write_random

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("streams", "context"), [(1, 64), (1, 2048), (8, 2048)])
def test_all_that_is_held_was_planned(tmp_path: Path, streams: int, context: int) -> None:
    """Arrays after long and short prompts and decoding; CUDA's own memory is not among them."""
    import cupy

    from rcprun.backends.cuda.backend import CudaBackend
    from rcprun.backends.cuda.plan import CUDA_BYTES, plan_memory
    from rcprun.sampling import SamplingOptions

    architecture = dataclasses.replace(WIKI_22M, num_layers=2, vocab_size=4000, max_position_embeddings=2048)
    write_random(tmp_path / "model.rcp", architecture, LDP)
    file = RcpFile.open(tmp_path / "model.rcp")
    gc.collect()  # of what earlier tests held
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    backend = CudaBackend(file, context, streams)
    for stream in range(streams):
        backend.begin(stream, list(range(5 if stream else 20)), SamplingOptions(), 0, 4)
    for _ in range(4):
        assert backend.advance()
    held = pool.used_bytes() - before
    planned = plan_memory(file, context, streams).total - CUDA_BYTES
    assert 0.9 * planned < held < 1.02 * planned + (1 << 20), f"{held:,} bytes held, {planned:,} planned"
