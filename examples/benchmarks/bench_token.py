"""Measures where the time of one decoded token goes on the GPU: each operation of the step, and the whole.

    python examples/benchmarks/bench_token.py 7b.rcp --depth 512 --json token.json

How to read it. "alone": all launches of an operation in one token, those of all layers, in a CUDA graph of their own,
each begun when the one before has ended. "each" is that divided by their count, so it holds what a kernel needs to
start, to fetch its first data and to end: a microsecond or two, most of a short kernel. In the whole token, kernels
start while the ones before them run, and that is hidden: "overlapping saves" is the sum of all operations alone less
the whole. "limit": the weights, or the part of the KV cache, that the operation reads, at the read bandwidth measured.
--adds: also how much faster the whole token is without an operation, which need not sum to the whole either. It needs
kernels that wait for the one before them, not for its numbers, which then would not come.

The operations are those that decoding launches (CudaBackend.operations), whatever they are. With --batch, a step of
several sequences.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("formats", "runtime")]

from rcpformat.reader import RcpFile  # noqa: E402
from rcprun.backends.cuda.backend import CudaBackend, kind_for  # noqa: E402
from rcprun.backends.cuda.launch import serialized  # noqa: E402
from rcprun.backends.cuda.network import Operation  # noqa: E402
from rcprun.bench import cache_bytes  # noqa: E402
from rcprun.sampling import SamplingOptions  # noqa: E402

TURNS = 8
"""Launches of a graph in a row, so that the time of the first launch does not count."""
LAUNCHES = 64
"""Of an operation in its graph, at least: one alone is faster than a graph can be launched."""
ATTENTION = "attention"
"""In the name of the operation that reads the KV cache."""


class Bench:
    """One model, with `depth` tokens in the cache of each of `batch` sequences."""

    def __init__(self, file: RcpFile, depth: int, batch: int, options: SamplingOptions, runs: int) -> None:
        self.backend = CudaBackend(file, depth + TURNS, batch)
        vocabulary = file.architecture.vocab_size
        self.backend.forward(np.random.default_rng(0).integers(0, vocabulary, depth).tolist())
        self.backend.fork(batch)
        self.operations = list(self.backend.operations(kind_for(options), batch))
        self.names = list(dict.fromkeys(operation.name for operation in self.operations))
        self._batch, self._options, self._runs = batch, options, runs

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Of a graph of these operations, the median of some runs."""
        times = self.backend.timed(operations, self._batch, self._options, TURNS, self._runs + 2)
        return statistics.median(times[2:])

    def alone(self, chosen: list[Operation]) -> float:
        """Of these operations by themselves, one after another.

        A whole step comes before: what they wait for has the number of the last one, and the first operation counts it.
        """
        self.backend.timed(self.operations, self._batch, self._options, 1, 1)
        copies = -(-LAUNCHES // len(chosen))
        with serialized():
            return self.seconds(chosen * copies) / copies

    def without(self, name: str) -> float:
        """Of the whole token but the operations of this name."""
        return self.seconds(operation for operation in self.operations if operation.name != name)


def measure(
    file: RcpFile, depth: int, batch: int, options: SamplingOptions, runs: int, *, adds: bool = False
) -> dict[str, Any]:
    """All of the table, in µs and bytes."""
    bench = Bench(file, depth, batch, options, runs)
    bandwidth = bench.backend.read_bandwidth()
    whole = bench.seconds(bench.operations)
    kv = batch * cache_bytes(file.architecture, file.quantization.kv_bits, depth + 1)
    rows = []
    for name in bench.names:
        chosen = [operation for operation in bench.operations if operation.name == name]
        nbytes = sum(operation.weight_bytes for operation in chosen) + (kv if ATTENTION in name else 0)
        rows.append(
            {
                "operation": name,
                "count": len(chosen),
                "alone_us": bench.alone(chosen) * 1e6,
                "adds_us": (whole - bench.without(name)) * 1e6 if adds else None,
                "bytes": nbytes,
                "limit_us": nbytes / bandwidth * 1e6,
            }
        )
    clocks = bench.backend.clocks()
    return {
        "gpu": bench.backend.describe(),
        "clocks_mhz": None if clocks is None else vars(clocks),
        "read_bandwidth": bandwidth,
        "file": str(file.path),
        "depth": depth,
        "batch": batch,
        "sampling": kind_for(options),
        "whole_us": whole * 1e6,
        "whole_again_us": bench.seconds(bench.operations) * 1e6,
        "rows": rows,
    }


def show(report: dict[str, Any]) -> None:
    """A markdown table, and what was measured on what."""
    rows, whole = report["rows"], report["whole_us"]
    count, alone, limit = (sum(row[key] for row in rows) for key in ("count", "alone_us", "limit_us"))

    def line(name: str, us: float, *, count: int = 0, limit: float = 0, adds: float | None = None) -> None:
        cells = [
            f"{name:16}",
            f"{count or '':>5}",
            f"{us / count:8.2f}" if count else " " * 8,
            f"{us:9.1f}",
            f"{us / alone:6.1%}",
            *([] if adds is None else [f"{adds:8.1f}"]),
            f"{limit:9.1f}" if limit >= 0.1 else " " * 9,
            f"{limit / us:8.1%}" if limit >= 0.1 else " " * 8,
        ]
        click.echo(f"| {' | '.join(cells)} |")

    heading, rule = ("", "") if rows[0]["adds_us"] is None else (" adds, µs |", " -------: |")
    click.echo(f"| {'operation':16} | count | each, µs | alone, µs | of sum |{heading} limit, µs | of limit |")
    click.echo(f"| {'-' * 16} | ----: | -------: | --------: | -----: |{rule} --------: | -------: |")
    for row in rows:
        line(row["operation"], row["alone_us"], count=row["count"], limit=row["limit_us"], adds=row["adds_us"])
    click.echo(
        f"\nall operations one after another: {alone:.1f} µs for {count}\n"
        f"the whole token: {whole:.1f} µs ({report['whole_again_us']:.1f} measured again at the end), "
        f"{report['batch'] * 1e6 / whole:.1f} tokens/s; its limit {limit:.1f} µs, {limit / whole:.1%}\n"
        f"so overlapping saves {alone - whole:.1f} µs, {1 - whole / alone:.1%}"
    )
    click.echo(
        f"{report['file']}: depth {report['depth']}, batch {report['batch']}, {report['sampling']}; {report['gpu']}, "
        f"reads {report['read_bandwidth'] / 1e9:,.0f} GB/s"
    )
    if report["clocks_mhz"]:
        click.echo("clocks: " + ", ".join(f"{name} {rate:,} MHz" for name, rate in report["clocks_mhz"].items()))


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-d", "--depth", type=click.IntRange(1), default=512, show_default=True, help="Tokens before this one.")
@click.option("-b", "--batch", type=click.IntRange(1, 8), default=1, show_default=True, help="Sequences.")
@click.option("--drawn", is_flag=True, help="Draw the token by the default options; else it is the likeliest.")
@click.option("--adds", is_flag=True, help="Also measure the token without each operation.")
@click.option("--runs", type=click.IntRange(1), default=15, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write all of it here.")
def main(model: Path, depth: int, batch: int, drawn: bool, adds: bool, runs: int, json_path: Path | None) -> None:
    """Measure, print a table, and write it where asked."""
    options = SamplingOptions() if drawn else SamplingOptions(temperature=0.0)
    report = measure(RcpFile.open(model), depth, batch, options, runs, adds=adds)
    show(report)
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
