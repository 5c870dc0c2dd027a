"""Perplexity against training tokens, a line for each variant. Knows numbers and matplotlib alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter

_COLOURS = "tab10"
_DASHES = ("-", "--", ":", "-.")


def plot_curves(path: str, curves: Mapping[str, Sequence[Sequence[float]]], original: float) -> None:
    """Write a PNG image. curves: by variant, (tokens, perplexity) on the validation part; original: its perplexity."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="training tokens", ylabel="perplexity on the validation part", yscale="log", title="seed 0, chosen rates"
    )
    colours = colormaps[_COLOURS].colors  # type: ignore[attr-defined]
    for i, (name, points) in enumerate(curves.items()):
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
    axes.xaxis.set_major_formatter(EngFormatter())
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
