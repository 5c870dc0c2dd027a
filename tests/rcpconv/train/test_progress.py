"""What is shown and kept of a training."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rcpconv.train.progress import LiveProgress, Metrics, duration, plot_loss, read_metrics

LINE: dict[str, Any] = {"step": 5, "loss": 1.5, "kl": 1.25, "tokens_per_second": 2000.0}


def test_metrics_go_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.append({"step": 1})
    metrics.sync()
    length = metrics.length
    metrics.append({"step": 2})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 3, "lo')  # as a kill leaves it
    metrics = Metrics(path, length)
    metrics.append({"step": 2, "again": True})
    metrics.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with LiveProgress(Console(file=out, width=120), 10, 0) as progress:
        progress.advance(5)
        progress.log(LINE, tokens_per_step=800)
    assert out.getvalue() == "step 5/10  loss 1.5000  KL 1.2500  2,000 tokens/s  ETA 2 s\n"


def test_a_live_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with LiveProgress(Console(file=out, width=120, force_terminal=True), 10, 2) as progress:
        progress.advance(5)
        progress.log(LINE | {"perplexity": 30.0}, tokens_per_step=800)
        with progress.hidden():
            out.write("other")
    assert "5/10" in out.getvalue() and "KL 1.2500  2,000 tokens/s  perplexity 30.000" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3500, "58 min"), (12_000, "3 h 20 min"), (9e5, "10 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plot(tmp_path: Path) -> None:
    plot_loss(tmp_path / "loss.png", [LINE, LINE | {"step": 6, "kl": 1.0}], "run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
