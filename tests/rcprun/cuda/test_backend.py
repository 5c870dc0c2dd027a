"""A whole model on the GPU against the NumPy backend: every architecture's features, every way a token can go."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from example_scripts import load_script
from rcpformat import Quantization
from rcpformat.reader import RcpFile
from rcprun.backends.numpy import NumpyBackend
from tiny_rcp import LDP, TINY, write_random

pytestmark = pytest.mark.gpu

SMALL = dataclasses.replace(
    TINY, vocab_size=300, hidden_size=192, intermediate_size=480, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=32
)
MODELS = {
    "plain": (SMALL, LDP),
    "tiny": (TINY, LDP),
    "one table": (dataclasses.replace(SMALL, tied_table=True), LDP),
    "one table, matrix": (dataclasses.replace(SMALL, tied_table=True, head_matrix=True), LDP),
    "one 16-bit table, matrix": (
        dataclasses.replace(SMALL, tied_table=True, head_matrix=True),
        Quantization(method="ldp", head_bits=16, embed_bits=16),
    ),
    "biases": (dataclasses.replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True), LDP),
    "norms of q and k": (dataclasses.replace(SMALL, qk_norm=True), LDP),
    "window": (dataclasses.replace(SMALL, attention_window=(5, None)), LDP),
    "8 bits": (SMALL, Quantization(method="ldp", a_bits=8, kv_bits=8)),
    "16-bit tables": (SMALL, Quantization(method="ldp", head_bits=16, embed_bits=16)),
    "groups of 64": (SMALL, Quantization(method="ldp", group_size=64)),
    "no rotation": (SMALL, Quantization(method="ldp", r1=False, r2=False, r3=False, r4=False)),
    "one table, no rotation": (dataclasses.replace(SMALL, tied_table=True), Quantization(method="ldp", r1=False)),
}


def cuda_backend(folder: Path, name: str = "plain", streams: int = 1) -> Any:
    from rcprun.backends.cuda.backend import CudaBackend

    path = folder / "model.rcp"
    if not path.exists():
        write_random(path, *MODELS[name])
    return CudaBackend(RcpFile.open(path), 64, streams)


def backends(folder: Path, name: str) -> tuple[Any, NumpyBackend]:
    return cuda_backend(folder, name), NumpyBackend(RcpFile.open(folder / "model.rcp"), 64)


def close(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each row: whether it is the same but for rounding. Where a code flipped it is not."""
    return np.abs(found - expected).max(axis=-1) < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_numpy_backend(tmp_path: Path, name: str) -> None:
    """Prefill of many and of few, then step by step. A flipped code moves a row and, through the cache, later ones."""
    ours, truth = backends(tmp_path, name)
    tokens = np.random.default_rng(1).integers(0, MODELS[name][0].vocab_size, 60).tolist()
    parts = [tokens[:30], tokens[30:35], *([token] for token in tokens[35:])]
    found = np.concatenate([np.concatenate(list(ours.forward_all(part))) for part in parts[:2]])
    found = np.concatenate([found, [ours.forward(part) for part in parts[2:]]])
    expected = np.concatenate([np.concatenate(list(truth.forward_all(part))) for part in parts])
    same = close(found, expected)
    error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    # With 8 bits codes flip 16 times as often, and move the result a sixteenth as far.
    assert same.mean() > 0.7 or error.max() < 0.03, (
        f"same rows: {same.astype(int)}, errors: {np.array2string(error, precision=6)}"
    )
    assert error.max() < 0.5, error
    assert ours.length == truth.length == 60


def test_strips_of_a_pass_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the bit: the transform of few tokens is computed in another order."""
    from rcprun.backends.cuda import buffers

    tokens, found = list(range(60)), []
    for strip in (64, 25):
        monkeypatch.setattr(buffers, "_ROUND_STRIP", strip)
        monkeypatch.setattr(buffers, "_STRIP_BYTES", 1)
        folder = tmp_path / str(strip)
        folder.mkdir()
        found.append(np.concatenate(list(backends(folder, "plain")[0].forward_all(tokens))))
    same = close(found[1], found[0])
    assert same.mean() > 0.7, same.astype(int)


def test_the_same_bits_each_time(tmp_path: Path) -> None:
    ours, _ = backends(tmp_path, "one table")
    tokens = list(range(40))
    runs = []
    for _ in range(2):
        ours.truncate(0)
        runs.append([ours.forward(tokens[:20]), *(ours.forward([token]) for token in tokens[20:])])
    assert np.array_equal(runs[0], runs[1])


def test_decoding_greedily_on_the_gpu_is_decoding_step_by_step(tmp_path: Path) -> None:
    ours, _ = backends(tmp_path, "plain")
    logits, expected = ours.forward([1, 2, 3]), []
    for _ in range(20):
        expected.append(int(logits.argmax()))
        logits = ours.forward(expected[-1:])
    ours.truncate(0)
    ours.forward([1, 2, 3])
    assert ours.decode_greedy(12) == expected[:12]
    ours.truncate(10)
    assert ours.length == 10


def test_too_little_memory_is_said_before_anything_is_allocated(tmp_path: Path, monkeypatch) -> None:
    import cupy

    from rcprun.errors import OutOfMemory

    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (1000, 2000))
    monkeypatch.setattr(cupy, "empty", lambda *_: pytest.fail("something was allocated"))
    with pytest.raises(OutOfMemory, match=r"GPU memory: needs .* GiB \(.*\), 0\.0 free: free some of it"):
        cuda_backend(tmp_path)


@pytest.mark.parametrize("streams", [1, 3])
def test_memory_that_is_asked_for_is_what_is_held(tmp_path: Path, streams: int) -> None:
    """But for the padding of these small layers, and what CUDA takes by itself."""
    from rcprun.backends.cuda.plan import plan_memory

    ours = cuda_backend(tmp_path, streams=streams)
    plan = plan_memory(RcpFile.open(tmp_path / "model.rcp"), 64, streams)
    held = ours.memory()
    assert plan.kv_cache == held.kv_cache
    assert 0.7 < plan.weights / held.weights <= 1.01
    assert ours.memory_report.startswith("GPU memory: 0.1 GiB (0.0 weights, 0.0 KV cache for ")


def test_generating_with_sampling_on_the_gpu(tmp_path: Path) -> None:
    from rcprun.sampling import SamplingOptions

    ours, _ = backends(tmp_path, "plain")
    greedy, drawn = SamplingOptions(temperature=0), SamplingOptions(temperature=1.5, top_k=0, top_p=1, min_p=0)
    prompt, runs = [1, 2, 3], []
    for options, seed in ((greedy, 0), (greedy, 1), (drawn, 5), (drawn, 5), (drawn, 6)):
        ours.truncate(0)
        ours.forward(prompt)
        runs.append(list(ours.generate(options, seed, prompt, 20)))
    ours.truncate(0)
    logits, expected = ours.forward(prompt), []
    for _ in range(20):
        expected.append(int(logits.argmax()))
        logits = ours.forward(expected[-1:])
    assert runs[0] == runs[1] == expected
    assert runs[2] == runs[3] != runs[4]
    ours.truncate(0)
    ours.forward(prompt)
    stream = ours.generate(greedy, 0, prompt, 20)
    assert [next(stream) for _ in range(5)] == expected[:5]
    stream.close()
    assert ours.length == 7  # the prompt and four tokens; the fifth was never asked for as input
    assert int(ours.forward(expected[4:5]).argmax()) == expected[5]


GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAWN: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def streamed(backend: Any, work: list[tuple[list[int], dict[str, Any], int, int]]) -> list[list[int]]:
    """The tokens of each (prompt, sampling options, seed, count), as many at a time as there are streams."""
    from rcprun.sampling import SamplingOptions

    tokens: list[list[int]] = [[] for _ in work]
    free, running, following = list(range(backend.streams)), {}, 0
    while running or following < len(work):
        while free and following < len(work):
            prompt, options, seed, count = work[following]
            running[free[0]] = following
            backend.begin(free.pop(0), prompt, SamplingOptions(**options), seed, count)
            following += 1
        for stream, token in backend.advance():
            number = running[stream]
            tokens[number].append(token)
            if len(tokens[number]) == work[number][3]:
                backend.end(stream)
                free.append(stream)
                del running[stream]
    return tokens


WORK = [
    ([1, 2, 3], GREEDY, 0, 12),
    (list(range(20)), DRAWN, 5, 7),
    ([9], DRAWN, 5, 1),
    ([4, 5], GREEDY, 0, 3),
    (list(range(40)), DRAWN, 2**40 + 1, 25),  # fills the context
    ([7] * 9, {**DRAWN, "repeat_penalty": 1.3}, 1, 10),
]


def test_tokens_of_a_stream_do_not_depend_on_the_others(tmp_path: Path) -> None:
    """Alone, together, in another order and in other places, with rows that idle and that are taken over."""
    ours = cuda_backend(tmp_path, streams=3)
    alone = [streamed(ours, [each])[0] for each in WORK]
    assert [len(tokens) for tokens in alone] == [count for *_, count in WORK]
    assert streamed(ours, WORK) == alone
    assert streamed(ours, WORK[::-1]) == alone[::-1]
    prompt, options, seed, count = WORK[0]
    ours.forward(prompt)
    from rcprun.sampling import SamplingOptions

    assert list(ours.generate(SamplingOptions(**options), seed, prompt, count)) == alone[0]


def test_an_idle_row_may_go_on_for_longer_than_the_context(tmp_path: Path) -> None:
    """More steps than positions: what an idle row appends must stay within its slot."""
    ours = cuda_backend(tmp_path, "tiny", streams=2)
    short, long = ([1, 2], DRAWN, 3, 2), ([3], DRAWN, 4, 60)
    alone = [streamed(ours, [each])[0] for each in (short, long)]
    assert streamed(ours, [short, long]) == alone
    assert streamed(ours, [long, short, long]) == [alone[1], alone[0], alone[1]]


def test_idle_rows_stay_in_bounds_after_other_uses(tmp_path: Path) -> None:
    """Forwarding moves the first row to the context's end; it idles there while the second stream runs."""
    from rcprun.sampling import SamplingOptions

    ours = cuda_backend(tmp_path, "tiny", streams=2)
    work = ([3], DRAWN, 4, 30)
    (expected,) = streamed(ours, [work])
    for _ in range(3):
        ours.forward([5] * 62)
        ours.forward([6])
        tokens: list[int] = []
        ours.begin(1, work[0], SamplingOptions(**DRAWN), 4, 30)
        while len(tokens) < 30:
            tokens += [token for _, token in ours.advance()]
        ours.end(1)
        assert tokens == expected
    for _ in range(5):  # begun, and left at once
        for stream in (0, 1):
            ours.begin(stream, [1], SamplingOptions(**DRAWN), 4, 30)
        ours.end(0)
        ours.end(1)
    assert streamed(ours, [work]) == [expected]


def test_one_stream_is_what_generating_gives(tmp_path: Path) -> None:
    from rcprun.sampling import SamplingOptions

    ours = cuda_backend(tmp_path)
    for prompt, options, seed, count in WORK:
        ours.truncate(0)
        ours.forward(prompt)
        expected = list(ours.generate(SamplingOptions(**options), seed, prompt, count))
        assert streamed(ours, [(prompt, options, seed, count)]) == [expected]


def test_many_streams_see_what_one_sees(tmp_path: Path) -> None:
    """Greedy tokens of 8 rows are those of one row, but where rounding decides: sums have another order."""
    one, eight = cuda_backend(tmp_path), cuda_backend(tmp_path, streams=8)
    rng = np.random.default_rng(2)
    work = [(rng.integers(0, 300, 10).tolist(), GREEDY, 0, 4) for _ in range(16)]
    pairs = zip(streamed(one, work), streamed(eight, work), strict=True)
    same = [a == b for a, b in pairs]
    assert np.mean(same) > 0.7, same


def test_forked_streams_decode_alike(tmp_path: Path) -> None:
    ours = cuda_backend(tmp_path, streams=4)
    runs = []
    for _ in range(2):
        ours.truncate(0)
        ours.forward(list(range(12)))
        ours.fork(3)
        runs.append(np.reshape(ours.decode_greedy(10, 3), (3, 10)).tolist())
        assert ours.length == 22
    assert runs[0] == runs[1] == [runs[0][0]] * 3


def test_without_graphs_the_tokens_are_the_same(tmp_path: Path) -> None:
    ours = cuda_backend(tmp_path, streams=2)
    expected = streamed(ours, WORK[:3])
    ours.graphs = False
    ours._graphs.clear()
    assert streamed(ours, WORK[:3]) == expected
    assert not ours._graphs


def test_operations_of_a_step_are_named_and_can_be_timed(tmp_path: Path) -> None:
    from rcprun.sampling import SamplingOptions

    ours = cuda_backend(tmp_path, "one table")
    ours.forward([1, 2, 3])
    operations = list(ours.operations("drawn", 1))
    names = [operation.name for operation in operations]
    assert names[0] == "embed" and names[-2:] == ["head", "sample"] and names.count("down") == 2
    assert sum(operation.weight_bytes for operation in operations) <= 1.05 * ours.memory().weights
    seconds = ours.timed(operations, 1, SamplingOptions(**DRAWN), turns=3, runs=2)
    assert len(seconds) == 2 and min(seconds) > 0
    assert ours.length == 3


def test_too_many_streams_are_refused(tmp_path: Path) -> None:
    from rcprun.errors import BadRequest

    with pytest.raises(BadRequest, match="1 to 8 sequences, found 9"):
        cuda_backend(tmp_path, streams=9)


def test_tools_that_drive_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a token's operations, and what the sanitizer watches: that they run, and what they count."""
    import cupy

    from rcprun.backends.cuda.backend import CudaBackend
    from rcprun.bench import weight_bytes
    from rcprun.sampling import SamplingOptions

    path = tmp_path / "model.rcp"
    write_random(path, *MODELS["tiny"])
    monkeypatch.setattr(CudaBackend, "read_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(CudaBackend, "describe", lambda _: "some GPU")
    monkeypatch.setattr(CudaBackend, "clocks", lambda _: None)
    monkeypatch.setattr(cupy.cuda, "set_allocator", lambda _: None, raising=False)
    bench_token = load_script("benchmarks/bench_token.py")
    monkeypatch.setattr(bench_token, "LAUNCHES", 2)
    file = RcpFile.open(path)
    report = bench_token.measure(file, 9, 2, SamplingOptions(), 1)
    bench_token.show(report)
    assert {"qkv", "down", "head", "sample"} <= {row["operation"] for row in report["rows"]}
    total = sum(row["bytes"] for row in report["rows"])
    assert total >= 0.9 * weight_bytes(file)
    load_script("benchmarks/sanitize.py").decode(path, graphs=False)
