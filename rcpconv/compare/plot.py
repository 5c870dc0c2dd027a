"""Perplexity against training tokens, and the end of it larger. Knows numbers and matplotlib alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter

_COLOURS = "tab10"
_NEAR = 1.1
"""How far above the best a variant may end and still count for the range of the second picture."""
_DASHES = ("-", "--", ":", "-.")


def plot_curves(path: str, curves: Mapping[str, Sequence[Sequence[float]]], original: float) -> None:
    """Write a PNG image. curves: by variant, (tokens, perplexity) on the validation part; original: its perplexity."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    whole, end = figure.subplots(1, 2)
    colours = colormaps[_COLOURS].colors  # type: ignore[attr-defined]
    curves = dict(sorted(curves.items(), key=lambda item: -item[1][-1][1]))  # as the lines end
    for axes in (whole, end):
        for i, (name, points) in zip(reversed(range(len(curves))), curves.items(), strict=True):
            style = _DASHES[i // len(colours) % len(_DASHES)]
            axes.plot(
                [tokens for tokens, _ in points],
                [value for _, value in points],
                color=colours[i % len(colours)],
                linestyle=style,
                marker="o",
                markersize=3,
                label=f"{name}, {points[-1][1]:.2f}",
            )
        axes.axhline(original, color="black", linewidth=1, label=f"original, {original:.2f}")
        axes.set(xlabel="training tokens", ylabel="perplexity on the validation part", yscale="log")
        axes.xaxis.set_major_formatter(EngFormatter())
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(ScalarFormatter())
        axes.grid(True, which="both", alpha=0.25)
    whole.set_title("seed 0, chosen rates")
    half = max(points[-1][0] for points in curves.values()) / 2
    best = min(points[-1][1] for points in curves.values())
    shown = [value for points in curves.values() if points[-1][1] <= _NEAR * best for n, value in points if n >= half]
    edge = max(1.001, (max(shown) / min(shown)) ** 0.05)
    end.set(
        title="the last half, of those near the best", xlim=(half, None), ylim=(min(shown) / edge, max(shown) * edge)
    )
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
