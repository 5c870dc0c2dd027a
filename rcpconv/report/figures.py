"""The plots of a report, one function each, from plain numbers to a matplotlib figure. Knows no models and no HTML."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from rcpconv.report.activations import SiteRange
from rcpconv.report.weights import CLIP_EDGES, GAP_EDGES, LEVEL_VALUES, WeightStatistics
from rcpformat import spec

# The colours of Okabe and Ito, which people with colour blindness tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
_BLUE, _ORANGE, _GREY, _BLACK = "#0072B2", "#D55E00", "#999999", "#222222"
_MOST_MARKERS = 16
_INCHES = 9.0

SITE_NAMES = {
    "attention_input": "attention input",
    "o_input": "o input",
    "mlp_input": "MLP input",
    "down_input": "down input",
    "key": "keys",
    "value": "values",
}
"""How spec.ACTIVATION_SITES and spec.KV_SITES are written in a report."""


def svg(figure: Figure) -> bytes:
    """The figure as an SVG image that needs no fonts; the same bytes every time."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rcpconv"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _axes(rows: int, columns: int, height: float, **sharing: Any) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(_INCHES, height), layout="constrained")
    grid: NDArray[Any] = figure.subplots(rows, columns, squeeze=False, **sharing)
    for axes in grid.flat:
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize("medium")
    return figure, grid


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def _over_layers(axes: Axes, values: Sequence[float], **style: Any) -> None:
    """A line over the layers."""
    marker = "o" if len(values) <= _MOST_MARKERS else ""
    axes.plot(range(len(values)), values, marker=marker, markersize=4, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def curves(lines: Sequence[Mapping[str, Any]], perplexity: Mapping[str, float]) -> Figure:
    """Loss and KL of metrics.jsonl over training tokens; perplexity too, where the run measured it on its way.

    perplexity: of "original" and "fake-quant" on the run's own evaluation text, where it has one.
    """
    measured = [(line["tokens"], line["perplexity"]) for line in lines if "perplexity" in line]
    figure, grid = _axes(1, 2 if measured else 1, 3.4)
    loss: Axes = grid[0, 0]
    tokens = [line["tokens"] for line in lines]
    same = all(line["loss"] == line["kl"] for line in lines)
    loss.plot(tokens, [line["loss"] for line in lines], color=_BLUE, label="loss (KL)" if same else "loss")
    if not same:
        loss.plot(tokens, [line["kl"] for line in lines], color=_ORANGE, label="KL to the teacher")
    loss.set(xlabel="training tokens", ylabel="nats a token", yscale="log", title="loss")
    values = [line[key] for line in lines for key in ("loss", "kl")]
    within_a_decade = max(values) < 10 * min(values)
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6) if within_a_decade else (1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    if measured:
        axes: Axes = grid[0, 1]
        if "fake-quant" in perplexity and measured[-1][0] < tokens[-1]:
            measured.append((tokens[-1], perplexity["fake-quant"]))
        axes.plot(*zip(*measured, strict=True), color=_BLUE, marker="o", markersize=4, label="in training")
        if "original" in perplexity:
            axes.axhline(perplexity["original"], color=_BLACK, linestyle="--", label="original")
        axes.set(xlabel="training tokens", ylabel="perplexity", title="perplexity on the run's evaluation text")
    for axes in grid.flat:
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.legend(frameon=False)
    return figure


def errors(
    before: WeightStatistics, after: WeightStatistics, outputs_before: Mapping[str, float], outputs: Mapping[str, float]
) -> Figure:
    """Relative errors by layer: of weights and of outputs, before and after training."""
    figure, grid = _axes(2, 2, 6.2, sharex=True, sharey="row")
    panels = (
        (grid[0, 0], before.errors, "weights, before training"),
        (grid[0, 1], after.errors, "weights, trained"),
        (grid[1, 0], outputs_before, "outputs, before training"),
        (grid[1, 1], outputs, "outputs, trained"),
    )
    for axes, values, title in panels:
        for kind, colour in zip(spec.LINEARS, _COLOURS, strict=True):
            line = [value for name, value in values.items() if name.endswith(f".{kind}")]
            _over_layers(axes, line, color=colour, label=kind.partition(".")[2])
        residual = [value for name, value in values.items() if name.count(".") == 1]
        if residual:
            _over_layers(axes, residual, color=_BLACK, linewidth=2.2, label="residual stream after the layer")
        axes.set_title(title)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    for row in grid:
        row[0].set_ylabel("relative error (RMS)")
    grid[1, 0].set_ylim(0, 1.08 * max(*outputs_before.values(), *outputs.values()))
    for axes in grid[1]:
        axes.set_xlabel("layer")
    _legend_below(figure, grid[1, 1], 8)
    return figure


def levels(before: WeightStatistics, after: WeightStatistics) -> Figure:
    """How the int8 values of the four levels are spread over all groups."""
    figure, grid = _axes(1, 2, 3.4, sharex=True, sharey=True)
    width = 3  # odd, so that a bin is centred on zero
    edges = np.arange(LEVEL_VALUES[0] - 0.5, LEVEL_VALUES[-1] + width, width)
    for axes, found, title in zip(grid[0], (before, after), ("before training", "trained"), strict=True):
        shares = found.codes_4 / found.codes_4.sum()
        for code in range(4):
            counts, _ = np.histogram(LEVEL_VALUES, edges, weights=found.levels_4L[code])
            label = f"level {code}: {shares[code]:.1%} of weights"
            axes.stairs(counts / counts.sum(), edges, color=_COLOURS[code], fill=True, alpha=0.35)
            axes.stairs(counts / counts.sum(), edges, color=_COLOURS[code], label=label)
        axes.set(xlabel="level, in units of the row's scale", title=title)
        axes.legend(frameon=False, fontsize="small", loc="upper center", ncols=2)
    grid[0, 0].set_ylabel(f"share of groups, bins of {width}")
    grid[0, 0].set_ylim(top=1.35 * grid[0, 0].get_ylim()[1])
    grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def partitions(before: WeightStatistics, after: WeightStatistics) -> Figure:
    """How clip ratios and partition gaps are spread over all groups."""
    figure, grid = _axes(2, 3, 5.4, sharey="row")
    panels = [
        (grid[0, 0], before.clips_2[0], after.clips_2[0], CLIP_EDGES, "lowest level / smallest weight"),
        (grid[0, 1], before.clips_2[1], after.clips_2[1], CLIP_EDGES, "highest level / largest weight"),
    ]
    for i in range(3):
        name = f"Δ{i + 1}: level {i} to {i + 1}, share of the span"
        panels.append((grid[1, i], before.gaps_3[i], after.gaps_3[i], GAP_EDGES, name))
    for axes, start, end, edges, name in panels:
        axes.stairs(start / max(1, start.sum()), edges, color=_GREY, fill=True, alpha=0.5, label="before training")
        axes.stairs(end / max(1, end.sum()), edges, color=_BLUE, linewidth=1.5, label="trained")
        axes.set_xlabel(name)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    for row in grid:
        row[0].set_ylabel("share of groups")
    grid[0, 2].axis("off")
    grid[0, 2].legend(*grid[0, 0].get_legend_handles_labels(), loc="center", frameon=False, fontsize="medium")
    return figure


def clips(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> Figure:
    """Clip ratios of activations, and of keys and values, over the layers; where they started as dotted lines."""
    figure, grid = _axes(1, 2, 3.4, sharey=True)
    parts = (("activations", spec.ACTIVATION_SITES), ("KV cache", spec.KV_SITES))
    for axes, (title, sites) in zip(grid[0], parts, strict=True):
        for site, colour in zip(sites, _COLOURS, strict=False):
            _over_layers(axes, after[site], color=colour, label=SITE_NAMES[site])
        axes.axhline(before[sites[0]][0], color=_GREY, linestyle=":", label="before training")
        axes.set(xlabel="layer", title=title)
        axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower left")
    grid[0, 0].set_ylabel("clip, share of a token's peak")
    low, high = grid[0, 0].get_ylim()
    grid[0, 0].set_ylim(low - 0.45 * (high - low), high)
    return figure


def ranges(before: Mapping[str, Sequence[SiteRange]], after: Mapping[str, Sequence[SiteRange]]) -> Figure:
    """Largest and typical magnitudes at every quantizer, before and after rotation."""
    figure, grid = _axes(2, 3, 5.6, sharex=True)
    for axes, (site, name) in zip(grid.flat, SITE_NAMES.items(), strict=True):
        for found, colour, label in ((before, _ORANGE, "before rotation"), (after, _BLUE, "after rotation")):
            _over_layers(axes, [r.largest for r in found[site]], color=colour, label=f"{label}, largest")
            typical = [r.typical for r in found[site]]
            _over_layers(axes, typical, color=colour, linestyle="--", alpha=0.7, label=f"{label}, median of tokens")
        axes.set_title(name)
        axes.set_ylim(bottom=0)
    for axes in grid[1]:
        axes.set_xlabel("layer")
    for row in grid:
        row[0].set_ylabel("magnitude")
    _legend_below(figure, grid[0, 0], 2)
    return figure
