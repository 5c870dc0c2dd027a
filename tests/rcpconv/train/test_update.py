"""AdamW with small states, compiled: what it does without, in one kernel, compiled once."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

from rcpconv.errors import BadCompiler
from rcpconv.train import compiling, memory, update
from rcpconv.train.compiling import compile_updates
from rcpconv.train.memory import LeanAdamW
from rcpconv.train.update import BLOCK

SLICE = 24 * BLOCK
SIZES = (64 * BLOCK, 40 * BLOCK, SLICE, 100)
"""Three slices, two, and one; and one so small that it is updated without being compiled."""
STEPS = 4


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "_SLICE", SLICE)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lean(parameters: list[torch.nn.Parameter], states: str, compiled: bool) -> LeanAdamW:
    groups = [{"params": parameters, "lr": 0.0, "weight_decay": 0.1}]
    return LeanAdamW(groups, (0.9, 0.95), states, seed=7, compiled=compiled)


def shape(numbers: int) -> tuple[int, ...]:
    return (numbers // BLOCK, BLOCK) if numbers % BLOCK == 0 else (numbers,)


def trained(states: str, dtype: torch.dtype, compiled: bool, resumed: bool = False) -> tuple[list[torch.Tensor], Any]:
    """Parameters and states after a few updates at other rates. resumed: with a new optimizer in the middle."""
    random = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape(n), generator=random).to(dtype)) for n in SIZES]
    optimizer = lean(parameters, states, compiled)
    for step in range(STEPS):
        if resumed and step == STEPS // 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = lean(parameters, states, compiled)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=random).to(dtype)
        optimizer.step()
    found = [p.detach() for p in parameters]
    return found, [value for p in parameters for value in optimizer.read(p).values()]


@pytest.mark.parametrize(
    ("states", "dtype", "backend"),
    [
        pytest.param("bf16", torch.bfloat16, "inductor", marks=pytest.mark.slow),  # calls a C++ compiler
        pytest.param("fp32", torch.bfloat16, "inductor", marks=pytest.mark.slow),
        pytest.param("int8", torch.bfloat16, "inductor", marks=pytest.mark.slow),
        ("fp32", torch.bfloat16, "aot_eager"),
        ("bf16", torch.bfloat16, "aot_eager"),
        ("bf16", torch.float32, "aot_eager"),
        ("int8", torch.float32, "aot_eager"),
        ("int8", torch.bfloat16, "aot_eager"),
    ],
)
def test_compiled_updates_are_the_eager_ones_and_compiled_once(
    states: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if states == "int8":
        pytest.importorskip("torchao", reason="the extra low-memory is not installed")
    if backend != "inductor":
        compiler = torch.compile(update.update, fullgraph=True, backend=backend)
        monkeypatch.setattr(update, "_compiled", lambda: compiler)
    eager, eager_states = trained(states, dtype, compiled=False)
    graphs, kernels = counters["stats"]["unique_graphs"], metrics.generated_kernel_count
    optimizer = lean([torch.nn.Parameter(torch.zeros(shape(n), dtype=dtype)) for n in SIZES], states, compiled=True)
    _, code = run_and_get_code(compile_updates, [optimizer])  # as a training does, before its first step
    compiled, compiled_states = trained(states, dtype, compiled=True)
    assert counters["stats"]["unique_graphs"] == graphs + 1
    for a, b in zip((*compiled, *compiled_states), (*eager, *eager_states), strict=True):
        # In another order of operations, a value now and then takes the other neighbour of its form.
        same = torch.isclose(a.float(), b.float(), rtol=1e-5, atol=1e-7)
        assert same.float().mean() > 0.999
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02 if states != "int8" else 0.1, atol=1e-3)
    assert torch.equal(compiled[-1], eager[-1])
    assert len(code) == (1 if backend == "inductor" else 0)
    if code and states != "int8":  # where a CPU's loops are not those of a GPU
        assert metrics.generated_kernel_count == kernels + 1
        assert all("= empty_strided_cpu(" not in part for part in code)
    again, again_states = trained(states, dtype, compiled=True, resumed=True)
    assert counters["stats"]["unique_graphs"] == graphs + 1
    assert all(map(torch.equal, (*again, *again_states), (*compiled, *compiled_states)))


def test_states_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    zeros = LeanAdamW._zeros
    monkeypatch.setattr(LeanAdamW, "_zeros", lambda self, like: made.append(like) or zeros(self, like))
    trained("bf16", torch.float32, compiled=False)
    assert len(made) == len(SIZES)


def test_wrongly_compiled_updates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = lean([torch.nn.Parameter(torch.zeros(8192)), torch.nn.Parameter(torch.zeros(10))], "fp32", True)
    monkeypatch.setattr(memory, "compiled_update", memory.update)
    compile_updates([optimizer, torch.optim.SGD([torch.zeros(1)], lr=0.1)])
    monkeypatch.setattr(memory, "compiled_update", lambda *arguments: None)
    with pytest.raises(BadCompiler, match=r"updates of torch.float32 weights with fp32 states whose weights differ"):
        compile_updates([optimizer])
    assert len(optimizer.kinds()) == 1 and compiling._UPDATES > 1
