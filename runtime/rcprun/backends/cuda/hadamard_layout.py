"""How hadamard.cu cuts transforms: definitions it is compiled with, and ±1 matrices in the order it reads them.

Plain data and NumPy: needs no GPU and no CuPy. Knows nothing of launching.

Shape suffixes: D dense order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rcpformat.hadamard import HadamardPlan
from rcpformat.spec import ceil_div

_TOKENS_PLANNED = {True: 8, False: 2048}
"""Few, and many: what the two layouts of a transform are chosen for."""
_MULTIPROCESSORS = 132
"""Layouts are chosen for an H200 whatever the GPU, so that they, and the last bits, are the same everywhere."""
_REGISTERS, _SHARED = 1 << 16, 227 * 1024
"""Registers, and bytes of shared memory, of one of them."""
_MOST_REGISTERS = 168
"""Of a thread: more leave no room for anything else."""
_BESIDE_LINEAR = 34000
"""Registers of a multiprocessor that a block of linear.cu for one token leaves."""
_SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory a block of any GPU since sm_80 may have."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How hadamard.cu cuts a transform: its definitions."""

    dense: int
    columns: int
    groups: int
    row_parts: int
    mt: int
    nt: int
    k_parts: int = 1
    """Warps that share the steps along the sums."""
    held: bool = False
    """Whether fragments of D are made before the wait, in registers."""
    sum_after: bool = False
    """Whether sums over groups come after D."""
    passes: int = 1
    """Spans of columns that a warp computes in turn; swiglu_hadamard.cu only."""
    terms: int = 3
    """That floats are the sum of, of 16 bits."""

    @property
    def parts(self) -> int:
        """Blocks to a vector."""
        return self.groups * self.row_parts

    @property
    def width(self) -> int:
        """Columns of a block."""
        return self.columns // self.groups

    @property
    def k_steps(self) -> int:
        """Steps of 16 along the sums, and tiles of 16 rows."""
        return ceil_div(self.dense, 16)

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows of a block."""
        return ceil_div(self.k_steps, self.row_parts * self.mt) * self.mt

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.k_parts * self.tiles // self.mt * self.width // (8 * self.nt * self.passes)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        terms = 2 * self.terms * 16 * self.k_steps * (8 if self.width == 8 else self.width + 8)
        sums = self.k_parts * self._sum_bytes if self.k_parts > 1 else 0
        return terms + sums + (self._sum_bytes if self.sum_after else 0)

    @property
    def shared_alone(self) -> int:
        """The same where there are no clusters: with sum_after, a block then has all groups."""
        return self.shared + (self._sum_bytes * (self.groups - 1) if self.sum_after else 0)

    @property
    def _sum_bytes(self) -> int:
        return 16 * self.tiles * self.width * 4

    @property
    def registers(self) -> int:
        """Of a thread, enough not to spill."""
        tiles = self.mt * self.nt
        if self.passes > 1:
            return max(80, 4 * tiles * (self.passes + 1) + 40)
        if self.held:
            fragments = 4 * self.mt * ceil_div(self.k_steps, self.k_parts)
            loads = 4 * self.summed * min(ceil_div(4 * self.k_steps * self.width, self.threads), 16 // self.summed)
            return max(80, fragments + max(loads, 12 * tiles) + 8)
        return max(80, 4 * tiles * (2 if tiles >= 4 else 3) + 48)

    @property
    def summed(self) -> int:
        """Groups that are summed before D."""
        return 1 if self.sum_after else self.groups

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """Of hadamard.cu, but for CODES."""
        return (
            ("DENSE", self.dense),
            ("COLUMNS", self.columns),
            ("GROUPS", self.groups),
            ("ROW_PARTS", self.row_parts),
            ("MT", self.mt),
            ("NT", self.nt),
            ("K_PARTS", self.k_parts),
            ("SUM_AFTER", int(self.sum_after)),
            ("HELD", int(self.held)),
            ("REGISTERS", self.registers),
        )


def layouts(plan: HadamardPlan, few: bool) -> Iterator[Layout]:
    """All that hadamard.cu can run for one block of the plan; none if its Sylvester part is below 8.

    few: also those that are for few tokens only, which wait less and do more.
    """
    powers = [2**i for i in range(3, plan.sylvester.bit_length())]
    ways = list(product((1, 2, 4), (False, True), (False, True))) if few else [(1, False, False)]
    shapes = product(powers, (1, 2, 4, 8), (1, 2, 4, 8), (1, 2), (1, 2, 4))
    for (columns, groups, row_parts, mt, nt), (k_parts, held, sum_after) in product(shapes, ways):
        shape = Layout(dense=plan.block // columns, columns=columns, groups=groups, row_parts=row_parts, mt=mt, nt=nt)
        a = replace(shape, k_parts=k_parts, held=held, sum_after=sum_after)
        if _runs(a):
            yield a


def whole_layouts(plan: HadamardPlan) -> Iterator[Layout]:
    """All that swiglu_hadamard.cu can run for a vector of one block."""
    powers = [2**i for i in range(3, plan.sylvester.bit_length())] if plan.copies == 1 else []
    for columns, mt, nt, passes in product(powers, (1, 2), (4, 2, 1), (1, 2, 4)):
        shape = {"dense": plan.block // columns, "columns": columns, "groups": 1, "row_parts": 1}
        a = Layout(**shape, mt=mt, nt=nt, passes=passes, terms=2)
        if _runs(a):
            yield a


def _runs(a: Layout) -> bool:
    fits = a.dense <= 2048 and 8 <= a.width <= 128 and a.width % (8 * a.nt * a.passes) == 0
    useful = a.mt * a.row_parts <= max(2, a.k_steps) and a.k_parts <= a.k_steps
    if a.held:
        fits = fits and 1 < a.parts <= 16 and 2 * a.mt % a.k_parts == 0 and a.registers <= _MOST_REGISTERS
    else:
        fits = fits and a.parts <= 8 and a.k_parts == 1
    if a.sum_after:
        fits = fits and a.groups > 1 and a.nt == 1 and 2 * a.tiles * a.width // 8 % a.groups == 0
    small = a.threads <= 1024 and a.threads * a.registers <= _REGISTERS and a.shared_alone <= _SHARED_LIMIT
    return fits and useful and small


def cost(layout: Layout, tokens: int) -> float:
    """Estimated clocks of an H200 for so many tokens: latencies, and what a multiprocessor does at its rates."""
    a = layout
    columns, rows, warps = a.width / 8, 16 * a.k_steps, a.threads // 32
    products = a.tiles * columns * a.k_steps * a.terms
    tensor = max(products * 6.5 / min(4.0, warps), products / a.mt * 2)  # or the reading of B fragments
    if a.held:
        tensor = max(products * 6.5 * ceil_div(warps, 4) / warps, products / a.mt * 2)
    stages = a.width.bit_length() - 3
    reading = a.dense * a.columns * max(4 / 50, 1 / min(32, a.width))  # bytes, or pieces of lines
    vector = rows * a.width * (a.summed / 128 + stages / 32) + reading * a.summed / a.groups
    resident = max(1, min(_REGISTERS // (a.threads * a.registers), _SHARED // (a.shared + 1024)))
    waves = max(1.0, tokens * a.parts / _MULTIPROCESSORS)
    busy = waves * (max(tensor, vector) + min(tensor, vector) / min(resident, waves))
    loads = rows * a.width * a.summed / 4 / a.threads
    exchanges = 500 * (a.parts > 1) + 100 * (a.parts > 8) + 400 * a.sum_after + 120 * (a.k_parts > 1)
    exchanges += 300 * (a.held and a.threads * a.registers > _BESIDE_LINEAR)
    return 1500 + exchanges + 40 * loads + (20 if a.held else 35) * ceil_div(a.k_steps, a.k_parts) + busy


@cache
def best_layout(plan: HadamardPlan, few: bool) -> Layout | None:
    """The cheapest layout for few tokens, or for many; None if hadamard.cu has none."""
    return min(layouts(plan, few), key=lambda layout: cost(layout, _TOKENS_PLANNED[few]), default=None)


@cache
def best_whole_layout(plan: HadamardPlan) -> Layout | None:
    """The cheapest of whole_layouts for many tokens, None without any; of equal ones that with the widest tiles."""
    return min(whole_layouts(plan), key=lambda layout: cost(layout, _TOKENS_PLANNED[False]), default=None)


def sign_words(d_DD: NDArray[np.int8], tiles: int) -> NDArray[np.uint32]:
    """The signs of a ±1 matrix as hadamard.cu reads them, for this many tiles of 16 rows: (tiles, words, 32)."""
    steps = ceil_div(len(d_DD), 16)
    words = ceil_div(steps, 4)
    negative = np.zeros((16 * tiles, 64 * words), np.uint32)
    negative[: len(d_DD), : len(d_DD)] = d_DD < 0
    # row = 16 tile + 8 (j % 2) + lane // 4; column = 64 word + 16 step + 8 (j // 2) + 2 (lane % 4) + half
    parts = negative.reshape(tiles, 2, 8, words, 4, 2, 4, 2)
    tile_word_lane = parts.transpose(0, 3, 2, 6, 4, 5, 1, 7)  # … lane // 4, lane % 4, step, j // 2, j % 2, half
    place = 15 - np.arange(16).reshape(4, 2, 2, 1) + 16 * np.arange(2)
    signs: NDArray[np.uint32] = (tile_word_lane << place.astype(np.uint32)).sum((4, 5, 6, 7), dtype=np.uint32)
    return np.ascontiguousarray(signs.reshape(tiles, words, 32))
