"""What the finished cells decide: a variant's rates, and which variants are worth several seeds.

By the validation part alone; the held-out text decides nothing. Knows nothing of training.
"""

from __future__ import annotations

from rcpconv.compare.folder import Folder, Result
from rcpconv.compare.plan import FINAL, SWEEP, Cell, Comparison, Rates


def validation(result: Result | None) -> float | None:
    """Perplexity on the validation part; None where there is none, or the training failed."""
    return None if result is None or result["failed"] else float(result["validation"]["perplexity"])


def swept(comparison: Comparison, folder: Folder, variant: str) -> dict[Rates, float | None]:
    """What the points of the grid gave so far; None for one that failed. Empty where there is no sweep."""
    if len(comparison.grid) == 1 or not comparison.swept(variant):
        return {}
    results = {rates: folder.result(Cell(kind=SWEEP, variant=variant, rates=rates)) for rates in comparison.grid}
    return {rates: validation(result) for rates, result in results.items() if result is not None}


def best_rates(comparison: Comparison, folder: Folder, variant: str, so_far: bool = False) -> Rates | None:
    """The point of the grid with the lowest perplexity, there or for the variant whose rates this one takes.

    None where there is none yet, or all failed. so_far: choose also where the sweep is not over.
    """
    if len(comparison.grid) == 1:
        return comparison.grid[0]
    variant = comparison.variant(variant).rates_of or variant
    points = swept(comparison, folder, variant)
    if len(points) < len(comparison.grid) and not so_far:
        return None
    found = {rates: value for rates, value in points.items() if value is not None}
    return min(found, key=lambda rates: found[rates], default=None)


def final(comparison: Comparison, folder: Folder, variant: str, seed: int = 0, so_far: bool = False) -> Cell | None:
    """A variant's cell for the table; None where its rates are not chosen. so_far: see best_rates."""
    if not comparison.variant(variant).trained:
        return Cell(kind=FINAL, variant=variant, seed=seed)
    rates = best_rates(comparison, folder, variant, so_far)
    return None if rates is None else Cell(kind=FINAL, variant=variant, rates=rates, seed=seed)


def ranked(comparison: Comparison, folder: Folder) -> list[list[str]]:
    """The variants that may be best, by method: the best first, in a method and of methods."""
    found = {}
    for variant in comparison.variants:
        cell = final(comparison, folder, variant.name, so_far=True)
        value = validation(folder.result(cell)) if cell is not None else None
        if comparison.may_be_best(variant.name) and value is not None:
            found[variant.name] = value
    methods: dict[str, list[str]] = {}
    for name in sorted(found, key=lambda name: found[name]):
        methods.setdefault(comparison.method(name), []).append(name)
    return list(methods.values())


def best_variants(comparison: Comparison, folder: Folder) -> list[str]:
    """The variants that are trained with all seeds: the best one of each of the best methods."""
    return [names[0] for names in ranked(comparison, folder)[: comparison.best]]
