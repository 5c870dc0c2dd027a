"""What a user sees and keeps of a training: live progress, metrics.jsonl, loss.png. Knows nothing of models."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rcpconv.runs import replacing, saving


class Metrics:
    """metrics.jsonl: one JSON object a line, each appended at once."""

    def __init__(self, path: Path, length: int) -> None:
        """Continue the file after `length` bytes; what a killed run wrote beyond them is dropped."""
        self._path, self.length = path, length
        with saving(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._descriptor, length)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line."""
        data = (json.dumps(line) + "\n").encode()
        with saving(self._path):
            while data:  # a nearly full disk takes a part of it
                written = os.write(self._descriptor, data)
                self.length += written
                data = data[written:]

    def sync(self) -> None:
        """Make what was written durable."""
        with saving(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


class NoMetrics(Metrics):
    """Of a process that leaves them to the first one."""

    def __init__(self) -> None:
        self.length = 0

    def append(self, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a metrics.jsonl; none when there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Rate:
    """Tokens a second since the last reading; the time of anything else can be left out."""

    def __init__(self) -> None:
        self._start, self._tokens = time.perf_counter(), 0

    def add(self, tokens: int) -> None:
        """Tokens trained on."""
        self._tokens += tokens

    def read(self) -> float:
        """Tokens a second; counting starts anew."""
        now = time.perf_counter()
        rate = self._tokens / (now - self._start)
        self._start, self._tokens = now, 0
        return rate

    def skip(self, since: float) -> None:
        """Leave out the time from `since` (time.perf_counter) until now."""
        self._start += time.perf_counter() - since


class LiveProgress:
    """A bar with the latest figures on a terminal, one plain line a logging step elsewhere."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._steps = console, steps
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._done = done
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, figures="")

    def __enter__(self) -> LiveProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Clear the terminal for another display."""
        self.__exit__(None, None, None)
        yield
        self.__enter__()

    def advance(self, step: int) -> None:
        """Step `step` is done."""
        self._done = step
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def log(self, line: Mapping[str, Any], tokens_per_step: int) -> None:
        """Show the figures of a line of metrics.jsonl."""
        figures = f"loss {line['loss']:.4f}  KL {line['kl']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if "perplexity" in line:
            figures += f"  perplexity {line['perplexity']:.3f}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=figures)
            return
        left = (self._steps - self._done) * tokens_per_step / max(line["tokens_per_second"], 1e-9)
        self._console.print(f"step {self._done}/{self._steps}  {figures}  ETA {duration(left)}", highlight=False)


def duration(seconds: float) -> str:
    """ "42 s", "5 min", "3 h 20 min", "4 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60 / 24:,.0f} days"


def plot_loss(path: Path, lines: list[dict[str, Any]], title: str) -> None:
    """Loss and KL by step, as a PNG image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats a token", yscale="log", title=title)
    for key in ("loss", "kl"):
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=key)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]
