"""What a model asks of a GPU's memory: the line that says so, and the refusal. No GPU is needed to plan."""

import pytest

from rcprun.backends.cuda.memory import MemoryPlan
from rcprun.errors import OutOfMemory

GIB = 2**30


def plan(context: int = 32768, streams: int = 1) -> MemoryPlan:
    """2 GiB of weights, 0.1 of buffers, and 1 GiB for 32,768 tokens, of which the tables are a 32nd."""
    cache = GIB * context * streams // 32768
    return MemoryPlan(
        weights=2 * GIB,
        kv_cache=cache - cache // 32,
        tables=cache // 32,
        buffers=GIB // 10,
        context=context,
        streams=streams,
    )


def test_line_says_what_is_asked_for_and_what_there_is() -> None:
    assert plan().describe(139 * GIB, int(139.8 * GIB)) == (
        "GPU memory: 3.1 GiB (2.0 weights, 1.0 KV cache for 32,768 tokens, 0.1 buffers) of 139.8 GiB, 139.0 free"
    )
    assert "3.9 KV cache for 4 × 32,768 tokens" in plan(streams=4).describe(139 * GIB, 139 * GIB)


def test_what_fits_is_let_through() -> None:
    plan().require(plan().total)


@pytest.mark.parametrize(
    ("free", "streams", "context", "remedy"),
    [
        (
            2.36,
            1,
            32768,
            "needs 3.1 GiB (2.0 weights, 1.0 KV cache for 32,768 tokens, 0.1 buffers), 2.4 free: use -c 8448",
        ),
        (2.36, 2, 16384, "2.4 free: use -c 4096, or a smaller --parallel"),
        (2.0, 1, 32768, "2.0 free: free some of it, or use --backend numpy"),
        (2.1, 8, 512, "2.1 free: use a smaller --parallel"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(free: float, streams: int, context: int, remedy: str) -> None:
    with pytest.raises(OutOfMemory) as refused:
        plan(context, streams).require(int(free * GIB))
    assert str(refused.value).startswith("GPU memory: needs ")
    assert str(refused.value).endswith(remedy)


def test_the_context_that_is_advised_fits() -> None:
    for free in (2.2, 2.5, 2.9, 3.05):
        with pytest.raises(OutOfMemory) as refused:
            plan().require(int(free * GIB))
        advised = int(str(refused.value).rpartition("-c ")[2])
        plan(advised).require(int(free * GIB))
        with pytest.raises(OutOfMemory):
            plan(advised + 512).require(int(free * GIB))
