"""`rcp-run bench`: which tests run, what they make the backend do, and what is printed. Never how fast."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from rcpformat import RcpFile
from rcprun import bench
from rcprun.backends import MemoryUse
from rcprun.bench import Case, cache_bytes, measure, plan, weight_bytes
from rcprun.cli import main
from rcprun.errors import BadRequest, ContextOverflow
from rcprun.model import load
from tiny_rcp import LDP, TINY, write_random


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@dataclasses.dataclass
class Clocks:
    core: int = 1980
    memory: int = 3201


class Device:
    """A backend with a loop of its own; writes down what it is asked for."""

    name = "device"
    context = 64
    max_batch = 4
    memory_report = "Device memory: 1 GiB"

    def __init__(self) -> None:
        self.length = 0
        self.calls: list[tuple[str, int, int]] = []

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        assert self.length + len(tokens) <= self.context
        self.calls.append(("forward", self.length, len(tokens)))
        self.length += len(tokens)
        return np.zeros(TINY.vocab_size, dtype=np.float32)

    def forward_all(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        raise AssertionError("not for this")

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length

    def memory(self) -> MemoryUse:
        return MemoryUse(weights=0, kv_cache=0)

    def fork(self, batch: int) -> None:
        self.calls.append((f"fork × {batch}", self.length, 0))

    def decode_greedy(self, count: int, batch: int = 1) -> list[int]:
        assert self.length
        self.calls.append((f"decode × {batch}", self.length, count))
        self.length += count
        return [0] * (count * batch)

    def read_bandwidth(self) -> float:
        return 1e9

    def describe(self) -> str:
        return "Device 9000 at 1 GHz"

    def clocks(self) -> Clocks:
        return Clocks()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.rcp"
    write_random(path, TINY, LDP)
    return path


@pytest.fixture
def half_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is timed takes half a second."""
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


def test_default_tests_are_those_that_fit() -> None:
    every = ["pp512", "pp2048", "tg128", "tg128 @ d512", "tg128 @ d4096", "tg128 @ d16384"]
    for trained, fitting in ((131072, 6), (16384, 5), (4096, 4), (600, 2)):
        cases, beyond = plan(trained, None, None, None, (1,))
        assert sorted(names(cases) + names(beyond)) == sorted(every)
        assert len(cases) == fitting
        assert all(case.context <= trained for case in cases)


def test_tests_are_every_combination() -> None:
    cases, beyond = plan(100, (3, 0, 5), (7, 9), (0, 20), (1, 2))
    assert not beyond
    assert names(cases) == [
        *("pp3", "pp5", "tg7", "tg9", "tg7 @ d20", "tg9 @ d20"),
        *("tg7 × 2", "tg9 × 2", "tg7 @ d20 × 2", "tg9 @ d20 × 2"),
    ]
    assert names(plan(100, (0,), (7,), (0,), (1,))[0]) == ["tg7"]
    assert names(plan(100, (7,), (0,), None, (1,))[0]) == ["pp7"]


@pytest.mark.parametrize(
    ("prompts", "generated", "depths"), [((101,), (0,), None), (None, (101,), None), (None, None, (100,))]
)
def test_what_is_asked_for_must_fit(
    prompts: tuple[int, ...] | None, generated: tuple[int, ...] | None, depths: tuple[int, ...] | None
) -> None:
    with pytest.raises(ContextOverflow, match="context of 100"):
        plan(100, prompts, generated, depths, (1,))


def test_something_must_fit() -> None:
    with pytest.raises(BadRequest, match="-p, -n or -d"):
        plan(100, None, None, None, (1,))


def test_each_repetition_starts_from_the_same_depth(file: Path) -> None:
    device = Device()
    cases = plan(64, (8,), (4,), (0, 20), (1, 2))[0]
    with RcpFile.open(file) as opened:
        rows = list(measure(device, opened, cases, repetitions=2))
    assert [len(row.rates) for row in rows] == [2] * 5
    prompt = [("forward", 0, 8)] * 3
    shallow = [("forward", 0, 1), ("decode × 1", 1, 4)]
    deep = [("forward", 19, 1), ("decode × 1", 20, 4)]
    pair = [shallow[0], ("fork × 2", 1, 0), ("decode × 2", 1, 4)]
    deep_pair = [deep[0], ("fork × 2", 20, 0), ("decode × 2", 20, 4)]
    fill, fill_deep = [("forward", 0, 1)], [("forward", 0, 20)]
    assert device.calls == [
        *prompt,
        *(fill + shallow * 3),
        *(fill_deep + deep * 3),
        *(fill + pair * 3),
        *(fill_deep + deep_pair * 3),
    ]


def test_without_a_loop_of_its_own_a_backend_decodes_token_by_token(file: Path) -> None:
    backend = load(file).backend
    with RcpFile.open(file) as opened:
        (row,) = measure(backend, opened, [Case(tokens=5, decode=True, depth=9)], repetitions=3)
    assert backend.length == 14
    assert len(row.rates) == 3
    assert row.bandwidth_share is None


@pytest.mark.usefixtures("half_seconds")
def test_rates_and_share_of_bandwidth(file: Path) -> None:
    cases = [Case(tokens=8, decode=False), Case(tokens=2, decode=True, depth=10, batch=4)]
    with RcpFile.open(file) as opened:
        prompt, generated = measure(Device(), opened, cases, repetitions=2)
        weights = weight_bytes(opened)
        cache = (cache_bytes(TINY, 4, 11) + cache_bytes(TINY, 4, 12)) / 2
    assert (prompt.mean, prompt.deviation, prompt.bandwidth_share) == (16.0, 0.0, None)
    assert (generated.mean, generated.deviation) == (16.0, 0.0)  # 4 steps a second, 4 tokens each
    assert generated.bandwidth_share == pytest.approx((weights + 4 * cache) * 4 / 1e9)


def test_bytes_that_a_token_reads(file: Path) -> None:
    with RcpFile.open(file) as opened:
        entries = opened.header_tensors
        others = ("embed.", "rope.", "tokenizer")
        assert weight_bytes(opened) == sum(e.nbytes for name, e in entries.items() if not name.startswith(others))
    heads, width = TINY.num_kv_heads, TINY.head_dim
    assert cache_bytes(TINY, 4, 10) == 10 * 2 * heads * (width // 2 + 4)
    assert cache_bytes(TINY, 8, 10) == 10 * 2 * heads * (width + 4)
    windowed = dataclasses.replace(TINY, num_layers=2, attention_window=(None, 3))
    assert cache_bytes(windowed, 4, 10) == cache_bytes(TINY, 4, 10) + cache_bytes(TINY, 4, 3)
    assert cache_bytes(windowed, 4, 2) == 2 * cache_bytes(TINY, 4, 2)


def test_one_table_counts_as_the_head(tmp_path: Path) -> None:
    write_random(tmp_path / "tied.rcp", dataclasses.replace(TINY, tied_table=True), LDP)
    write_random(tmp_path / "two.rcp", TINY, LDP)
    with RcpFile.open(tmp_path / "tied.rcp") as tied, RcpFile.open(tmp_path / "two.rcp") as two:
        assert weight_bytes(tied) == weight_bytes(two)


def test_table(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    result = run(file, "-p", "4,8", "-n", 3, "-r", 2, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    table, _, facts = result.stdout.partition("\n\n")
    heading, rule, *rows = table.splitlines()
    assert re.fullmatch(r"\| test +\| +tokens/s \|", heading)
    assert re.fullmatch(r"\| -+ \| -+: \|", rule)
    assert [row.split("|")[1].strip() for row in rows] == ["pp4", "pp8", "tg3"]
    assert all(re.fullmatch(r"\| [\w@ ]+ \| +\d+\.\d\d ± \d+\.\d\d \|", row) for row in rows)
    assert str(file) in facts
    for part in ("numpy; ", "7 threads", "2 repetitions", "context: tg3 @ d512, tg3 @ d4096, tg3 @ d16384"):
        assert part in facts
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["backend"] == "numpy"
    assert report["bytes"] == file.stat().st_size
    assert [row["test"] for row in report["rows"]] == ["pp4", "pp8", "tg3"]
    for row in report["rows"]:
        assert row["tokens_per_second"] == pytest.approx(np.mean(row["repetitions"]))
        assert row["deviation"] == pytest.approx(np.std(row["repetitions"], ddof=1))


def test_table_of_a_device(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded:
        backend = Device()

    asked = {}
    monkeypatch.setattr(bench, "load", lambda *_, **options: asked.update(options) or Loaded)
    result = run(file, "-p", 4, "-n", 3, "-d", 0, "-b", "1,4", "-r", 1, "--json", tmp_path / "out.json")
    assert (asked["context"], asked["parallel"]) == (4, 4)
    heading, _, *rows = result.stdout.partition("\n\n")[0].splitlines()
    assert heading.endswith("| of bandwidth |")
    assert [row.split("|")[1].strip() for row in rows] == ["pp4", "tg3", "tg3 × 4"]
    assert [row.split("|")[3].strip().endswith("%") for row in rows] == [False, True, True]
    assert "device on Device 9000 at 1 GHz; " in result.stdout
    assert "reads 1 GB/s, measured" in result.stdout
    assert "Device memory: 1 GiB\nclocks at the end: core 1,980 MHz, memory 3,201 MHz\n" in result.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["memory"] == "Device memory: 1 GiB"
    assert [row["clocks_mhz"] for row in report["rows"]] == [{"core": 1980, "memory": 3201}] * 3


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "the numpy backend decodes at most 1", ("-p", "0", "-n", "2", "-d", "0", "--batch", "2")),
        (2, "nothing to measure", ()),
        (2, "'x' is not a valid", ("-p", "4,x")),
        (2, "-1 is not in the range", ("-d", "-1")),
        (2, "0 is not in the range", ("--batch", "0")),
        (4, "pp65: 65 tokens do not fit", ("-p", "65")),
    ],
)
def test_refusals(file: Path, code: int, message: str, arguments: Sequence[str]) -> None:
    result = run(file, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""


def test_existing_json_stays(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("mine")
    arguments = (file, "-p", 4, "-n", 0, "-r", 1, "--json", out)
    assert run(*arguments).exit_code == 2
    assert out.read_text() == "mine"
    assert run(*arguments, "--force").exit_code == 0
    assert json.loads(out.read_text())["rows"]
