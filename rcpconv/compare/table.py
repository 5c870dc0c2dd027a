"""What a comparison found so far: JSON values, Markdown, and tables for a terminal. Knows nothing of training."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rcpconv.compare import choice
from rcpconv.compare.folder import JSON, MARKDOWN, PLOT, Folder, Result
from rcpconv.compare.plan import ORIGINAL, Cell, Comparison, Variant
from rcpconv.compare.plot import plot_curves
from rcpconv.config import DEFAULTS
from rcpconv.evaluate import GENERATION_CAPTION, GENERATION_HEADINGS, generation_figures
from rcpconv.generation import GenerationResult, Repetition, verdict
from rcpconv.runs import replacing, write_json, write_text

Rows = list[list[str]]
HEADINGS = ("variant", "rates", "seeds", "perplexity", "KL", "top-1", "bytes", "bits", "tokens/s")
_ORIGINAL_NAME = "original, FP16"
TRAINING_ONLY, AT_THE_EDGE, TAKEN, SO_FAR = "*", "^", "=", "?"
"""Marks of a row that no file can hold, and of rates: at an end of the grid, taken from another variant, the best of a
sweep that is not over."""


def summarise(comparison: Comparison, folder: Folder, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything there is, as JSON values. about: the machine."""
    original = folder.result(Cell(kind=ORIGINAL))
    summary = {
        **about,
        "comparison": comparison.to_json(),
        "window": comparison.window,
        "original": None if original is None else {k: v for k, v in original.items() if k != "greedy"},
        "rows": [_row(comparison, folder, variant) for variant in comparison.variants],
        "methods": [
            {"method": comparison.method(names[0]), "variants": names} for names in choice.ranked(comparison, folder)
        ],
    }
    return summary | {"verdict": verdict(_generations(summary), "original") if comparison.generations else None}


def _row(comparison: Comparison, folder: Folder, variant: Variant) -> dict[str, Any]:
    taken_from = variant.rates_of if variant.trained and len(comparison.grid) > 1 else ""
    points = choice.swept(comparison, folder, taken_from or variant.name)
    over = len(points) == len(comparison.grid)
    cells = [choice.final(comparison, folder, variant.name, seed, so_far=True) for seed in range(comparison.seeds)]
    results = [result for cell in cells if cell is not None and (result := folder.result(cell)) is not None]
    row: dict[str, Any] = {
        "variant": variant.name,
        "settings": variant.settings,
        "rates_of": taken_from or None,
        "sweep_over": over or not points,
        "trained": variant.trained,
        "sweep": {} if taken_from else {rates.label: value for rates, value in points.items()},
        "rates": None,
        "at_edge": False,
        "failed": f"every rate of {taken_from or 'the grid'} failed"
        if over and set(points.values()) == {None}
        else None,
        "seeds": [],
    }
    rates = cells[0].rates if cells[0] is not None else None
    if rates is not None:
        ends = sorted(comparison.grid, key=lambda point: point.lr)
        row |= {"rates": rates.label, "at_edge": bool(row["sweep"]) and rates in (ends[0], ends[-1])}
    if not results:
        return row
    good = [result for result in results if not result["failed"]]
    row |= {"seeds": [_of_seed(result) for result in good], "failed": None if good else results[0]["failed"]}
    if good:
        first = good[0]
        row |= {key: first[key] for key in ("bytes", "bits_per_weight", "training_only", "tokens")}
        row |= {key: first.get(key) for key in ("tokens_per_second", "curve", "generations")}
        for key in ("perplexity", "kl", "top1"):
            row[key] = mean_and_deviation([result["heldout"][key] for result in good])
    return row


def _of_seed(result: Result) -> dict[str, Any]:
    kept = ("seed", "heldout", "validation", "tokens_per_second", "seconds")
    return {key: result[key] for key in kept if key in result}


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the sample's standard deviation where there are several."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "values": list(values)}


def _with_deviation(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.3f}" + ("" if found["sd"] is None else f" ± {found['sd']:.3f}")


def rows(summary: Mapping[str, Any]) -> Rows:
    """The cells of the main table, under HEADINGS; the original model first."""
    found = []
    if (original := summary["original"]) is not None:
        perplexity, nbytes = original["heldout"]["perplexity"], original["fp16_bytes"]
        found.append([_ORIGINAL_NAME, "", "", f"{perplexity:.3f}", "", "", f"{nbytes:,}", "16", ""])
    for row in summary["rows"]:
        name = row["variant"] + (TRAINING_ONLY if row.get("training_only") else "")
        marks = {SO_FAR: not row["sweep_over"], AT_THE_EDGE: row["at_edge"], TAKEN: row["rates_of"]}
        rates = row["rates"] + "".join(mark for mark, holds in marks.items() if holds) if row["rates"] else ""
        if "perplexity" not in row:
            state = "failed" if row["failed"] else "to come"
            found.append([name, rates, "", state, *[""] * (len(HEADINGS) - 4)])
            continue
        speed = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
        found.append(
            [
                name,
                rates if row["trained"] else "not trained",
                str(len(row["seeds"])) if row["trained"] else "",
                _with_deviation(row["perplexity"]),
                f"{row['kl']['mean']:.4f}",
                f"{row['top1']['mean']:.2%}",
                f"{row['bytes']:,}",
                f"{row['bits_per_weight']:.3f}",
                speed,
            ]
        )
    return found


def sweep_rows(summary: Mapping[str, Any]) -> Rows:
    """A row for each variant: its perplexity on the validation part at every point of the grid."""
    points = summary["comparison"]["grid"]
    found = []
    for row in summary["rows"]:
        if row["sweep"]:
            found.append([row["variant"], *(_shown_point(row["sweep"], point) for point in points)])
    return found


def _shown_point(sweep: Mapping[str, float | None], point: str) -> str:
    value = sweep.get(point)
    return f"{value:.3f}" if value is not None else "failed" if point in sweep else "to come"


def _generations(summary: Mapping[str, Any]) -> list[GenerationResult]:
    """What the models write; the text itself and the original first."""
    original = summary["original"]
    if original is None or "generations" not in original:
        return []
    results = [*original["itself"], *original["generations"]]
    for row in summary["rows"]:
        results += row.get("generations") or []
    return [GenerationResult(**result | {"repetition": Repetition(**result["repetition"])}) for result in results]


def generation_rows(summary: Mapping[str, Any]) -> Rows:
    """Name, decoding and GENERATION_HEADINGS of what the models write; the text itself and the original first."""
    return [[found.name, found.decoding, *generation_figures(found)] for found in _generations(summary)]


def shown(name: str) -> str:
    """A model or text without the folders that it lies in, and what else tells it from others."""
    return (Path(name).name if Path(name).is_absolute() else name).partition(", ")[0]


def best_methods(summary: Mapping[str, Any]) -> str:
    """The best method against the best other one, in a sentence; empty before there are two."""
    if len(summary["methods"]) < 2:
        return ""
    rows = {row["variant"]: row for row in summary["rows"]}
    first, other = ((found, rows[found["variants"][0]]) for found in summary["methods"][:2])
    if not all(row["sweep_over"] for row in (first[1], other[1])):
        return ""

    def told(found: Mapping[str, Any], row: Mapping[str, Any]) -> str:
        tried, seeds = len(found["variants"]), len(row["seeds"])
        many = f", the best of {tried} variants" if tried > 1 else ""
        count = f"{seeds} seeds" if seeds > 1 else "one seed"
        return f"{row['variant']} {_with_deviation(row['perplexity'])} ({count}{many}; rates {row['rates']})"

    more = other[1]["perplexity"]["mean"] - first[1]["perplexity"]["mean"]
    chosen = (
        "each at the best of the same grid of rates" if len(summary["comparison"]["grid"]) > 1 else "at equal rates"
    )
    return (
        f"Best method: {told(*first)}. Best other method, {chosen}: {told(*other)}, "
        f"{more:+.3f} ({more / first[1]['perplexity']['mean']:+.1%}). Which is which was decided on the validation "
        "part, by seed 0; the perplexities are those on the held-out text."
    )


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What one has to know to read the tables."""
    c = summary["comparison"]
    original = summary["original"]
    on = "" if original is None else f"{original['heldout']['tokens']:,} tokens of "
    times = " and ".join(
        f"{c['common'].get(f'{name}_factor', DEFAULTS[f'{name}_factor']):g} times for {name}s"
        for name in ("quantizer", "clip")
    )
    sources = sorted({row["rates_of"] for row in summary["rows"] if row["rates_of"]})
    taken = f" {TAKEN} marks the rates of {' or '.join(sources)}, taken without a sweep." if sources else ""
    if not all(row["sweep_over"] for row in summary["rows"]):
        taken += f" {SO_FAR} marks the best ones so far of a sweep that is not over."
    swept = (
        f"Rates (weights, or weights:quantizers:clips; what is not given follows from the weights': {times}) are from "
        f"the same grid for every variant that was swept: {', '.join(c['grid'])}. Each was tried for "
        f"{c['sweep_tokens']:,} tokens, one seed, and chosen by the perplexity on {c['validation_tokens']:,} tokens "
        f"kept back from training; {AT_THE_EDGE} marks a choice at an end of the grid.{taken}"
        if len(c["grid"]) > 1
        else f"Rates: {c['grid'][0]} for every variant, not swept."
    )
    found = [
        f"Perplexity, KL (nats a token, from the original) and top-1 (same likeliest token as the original): on {on}"
        f"{shown(c['text'])}, windows of {c['window']}. Means over seeds, ± standard deviation.",
        f"Trained on {c['tokens']:,} tokens of {', '.join(map(shown, c['data']))}. {swept}",
        "Bytes: of the file, without provenance; bits: a weight of the 2-bit layers, levels and scales included.",
    ]
    if any(row.get("training_only") for row in summary["rows"]):
        found.append(f"{TRAINING_ONLY} Training only: activations or cache of 16 bits, which no file holds.")
    if c["generations"]:
        found.append(f"Generations: {GENERATION_CAPTION}. Verdict: {summary['verdict']}.")
    found += [f"{row['variant']}: failed: {row['failed']}" for row in summary["rows"] if row["failed"]]
    return found


def _tables(summary: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """(title, headings, rows) of every table with something in it."""
    c = summary["comparison"]
    yield f"{shown(c['model'])}, {c['tokens'] / 1e6:g} M tokens", HEADINGS, rows(summary)
    if swept := sweep_rows(summary):
        title = f"Validation perplexity after {c['sweep_tokens'] / 1e6:g} M tokens, by rates"
        yield title, ("variant", *c["grid"]), swept
    if written := generation_rows(summary):
        title = f"{c['generations']} prompts continued by {c['generation_tokens']} tokens"
        yield title, ("model", "decoding", *GENERATION_HEADINGS), written


def terminal_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """The tables, for a terminal."""
    for title, headings, cells in _tables(summary):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left")
        for row in cells:
            table.add_row(*row)
        yield table


def markdown(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = ["# Comparison", *filter(None, [best_methods(summary)]), *notes(summary)]
    for title, headings, cells in _tables(summary):
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells]
        escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        parts += [f"## {title}", "\n".join(f"| {line} |" for line in escaped)]
    if any(row.get("curve") for row in summary["rows"]):
        parts.append(f"![Perplexity on the validation part against training tokens]({PLOT})")
    parts.append(f"Machine: {summary['machine']}; torch {summary['torch']}. All figures: {JSON}.")
    return "\n\n".join(parts) + "\n"


def write_tables(folder: Folder, summary: Mapping[str, Any]) -> None:
    """Markdown and JSON, each written whole or not at all."""
    write_json(folder.file(JSON), summary)
    write_text(folder.file(MARKDOWN), markdown(summary))


def write_plot(folder: Folder, summary: Mapping[str, Any]) -> None:
    """The plot, where there is a curve; written whole or not at all."""
    curves = {row["variant"]: row["curve"] for row in summary["rows"] if row.get("curve")}
    if curves:
        original = summary["original"]["validation"]["perplexity"]
        with replacing(folder.file(PLOT)) as temporary:
            plot_curves(str(temporary), curves, original)
