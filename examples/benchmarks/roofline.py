"""Draws what bench_linear.py found: the bandwidth that linear layers reach, beside what the GPU can read.

    python examples/benchmarks/roofline.py roofline.png linear-7b.json linear-others.json

A row of panels for each model, a panel for each batch size, a bar for each kind of layer, with its time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

from peers import PEERS

OURS = ("#1f5fa8", "#6fa3dc", "#a9c8ea")
"""Colours of our layers, in the order of the rows."""
OTHERS = "#b8bcc2"
BAR_INCHES = 0.3


def draw(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """A picture of all rows of some reports of the same GPU. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for report in reports for row in report["rows"]]
    shapes, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "batch"))
    bandwidth = max(report["read_bandwidth"] for report in reports) / 1e12
    kinds = {shape: list(dict.fromkeys(row["what"] for row in rows if row["shape"] == shape)) for shape in shapes}
    heights = [len(kinds[shape]) + 1.2 for shape in shapes]
    figure, panels = pyplot.subplots(
        len(shapes),
        len(batches),
        figsize=(1.5 + 5 * len(batches), 1.1 + BAR_INCHES * sum(heights)),
        height_ratios=heights,
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for line, shape in zip(panels, shapes, strict=True):
        for axes, batch in zip(line, batches, strict=True):
            found = {row["what"]: row for row in rows if (row["shape"], row["batch"]) == (shape, batch)}
            _panel(axes, kinds[shape], found, bandwidth)
            axes.set_title(f"{shape}, {batch} token{'s' if batch > 1 else ''}", fontsize=10, loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("weights read, TB/s")
    figure.suptitle(f"Linear layers of a token, {reports[0]['gpu']}: dashed, the read bandwidth measured", fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes: Any, kinds: list[str], found: dict[str, dict[str, Any]], bandwidth: float) -> None:
    """Bars from top to bottom."""
    for place, kind in enumerate(kinds):
        if kind not in found:
            axes.annotate("not measured", (0, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        speed = found[kind]["bytes"] / found[kind]["us"] / 1e6
        colour = OTHERS if kind in PEERS else OURS[min(place, len(OURS) - 1)]
        axes.barh(place, speed, color=colour, height=0.72)
        inside = speed > 0.45 * bandwidth
        axes.annotate(
            f"{found[kind]['us']:,.0f} µs, {speed:.2f} TB/s",
            (speed, place),
            xytext=(-4 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside and colour == OURS[0] else "black",
        )
    axes.axvline(bandwidth, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(kinds)), [kind if kind in PEERS else f"ours 2-bit, {kind}" for kind in kinds], fontsize=9)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlim(0, 1.06 * bandwidth)
    axes.spines[["top", "right"]].set_visible(False)


@click.command(help=__doc__.split("\n")[0])
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("reports", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(picture: Path, reports: tuple[Path, ...]) -> None:
    """Read the reports and draw."""
    draw([json.loads(report.read_text()) for report in reports], picture)


if __name__ == "__main__":
    main()
