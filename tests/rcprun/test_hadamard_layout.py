"""How CUDA transforms are cut: within a GPU's limits, and with the signs where fragments expect them."""

import numpy as np
import pytest

from rcpformat.hadamard import hadamard_factor
from rcprun.backends.cuda.hadamard_layout import best_layout, sign_words

WIDTHS = [8, 192, 480, 512, 1408, 2048, 4096, 5120, 8160, 8192, 11008, 13696, 13824, 14336, 28672, 29568, 53248, 65536]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("n", WIDTHS)
def test_layouts_cover_the_matrix_within_limits(n: int, few: bool) -> None:
    plan = hadamard_factor(n)
    layout = best_layout(plan, few=few)
    assert layout is not None
    assert layout.dense * layout.columns == plan.block
    assert layout.row_parts * layout.tiles * 16 >= layout.dense
    assert layout.groups * layout.width == layout.columns
    assert layout.parts <= (16 if few else 8) and layout.threads <= 1024 and layout.shared_alone <= 99 * 1024


def test_a_small_sylvester_part_has_no_layout() -> None:
    assert best_layout(hadamard_factor(172), few=True) is None


@pytest.mark.parametrize("order", [12, 16, 44, 100])
def test_sign_words_unpack_to_the_matrix(order: int) -> None:
    """As mma.m16n8k16 defines its A fragment: register j of a lane holds row lane/4 + 8 (j mod 2), and so on."""
    d_DD = np.random.default_rng(order).choice(np.array([-1, 1], np.int8), (order, order))
    steps, tiles = -(-order // 16), -(-order // 16) + 1
    words = sign_words(d_DD, tiles)
    assert words.shape == (tiles, -(-steps // 4), 32)
    found = np.ones((16 * tiles, 16 * steps), np.int8)
    for tile, step, lane, j, half in np.ndindex(tiles, steps, 32, 4, 2):
        shifted = int(words[tile, step // 4, lane]) << (4 * (step % 4) + j)
        row = 16 * tile + lane // 4 + 8 * (j % 2)
        column = 16 * step + 2 * (lane % 4) + 8 * (j // 2) + half
        found[row, column] = -1 if shifted >> (15 + 16 * half) & 1 else 1
    assert np.array_equal(found[:order, :order], d_DD)
