"""Codes and levels: against a plain loop, on random bytes, for every remainder of K."""

import numpy as np
import pytest

from rcpformat import PackedLinear, codec, decode_integers, pack_codes, unpack_codes
from rcpformat.errors import (
    BadScale,
    CodesShapeMismatch,
    DecreasingLevels,
    LevelOutOfRange,
    LevelsShapeMismatch,
    NonZeroPadding,
    NotFinite,
    ScaleShapeMismatch,
    UnknownDtype,
    WrongDtype,
    WrongShape,
)
from tiny_rcp import LDP, TINY, random_model

SHAPES = [
    (1, 1),
    (3, 2),
    (2, 3),
    (5, 4),
    (4, 5),
    (2, 63),
    (3, 64),
    (2, 65),
    (7, 127),
    (2, 128),
    (3, 129),
    (2, 172),
    (1, 300),
]


def plain_decode(packed: np.ndarray, levels: np.ndarray, group: int, k: int) -> np.ndarray:
    """SPEC section 8, word for word."""
    out = np.empty((len(packed), k), np.int8)
    for n in range(len(packed)):
        for column in range(k):
            code = (int(packed[n, column // 4]) >> (2 * (column % 4))) & 3
            out[n, column] = levels[n, column // group, code]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_and_unpack_are_inverses(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    codes = rng.integers(0, 4, shape, dtype=np.uint8)
    packed = pack_codes(codes)
    assert packed.shape == (shape[0], (shape[1] + 3) // 4) and packed.dtype == np.uint8
    assert np.array_equal(unpack_codes(packed, shape[1]), codes)
    used = shape[1] % 4
    assert not used or not (packed[:, -1] >> (2 * used)).any()


def test_first_code_is_in_the_lowest_bits() -> None:
    assert pack_codes(np.array([[1, 2, 3, 0, 2]], np.uint8)).tolist() == [[0b00111001, 0b10]]


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_of_random_bytes(shape: tuple[int, int], group: int) -> None:
    n, k = shape
    rng = np.random.default_rng([n, k, group])
    packed = rng.integers(0, 256, (n, (k + 3) // 4), dtype=np.uint8)
    levels = rng.integers(-128, 128, (n, -(-k // group), 4), dtype=np.int8)
    assert np.array_equal(decode_integers(packed, levels, group, k), plain_decode(packed, levels, group, k))


def test_decode_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (23, 43), dtype=np.uint8)
    levels = rng.integers(-127, 128, (23, 3, 4), dtype=np.int8)
    monkeypatch.setattr(codec, "_CHUNK_WEIGHTS", 5 * 192)
    assert np.array_equal(decode_integers(packed, levels, 64, 171), plain_decode(packed, levels, 64, 171))


def a_linear(**changes: object) -> PackedLinear:
    rng = np.random.default_rng(1)
    parts: dict[str, object] = {
        "name": "layers.0.attn.q",
        "shape": (3, 130),
        "group_size": 128,
        "codes": pack_codes(rng.integers(0, 4, (3, 130), dtype=np.uint8)),
        "levels": np.sort(rng.integers(-127, 128, (3, 2, 4), dtype=np.int8), axis=-1),
        "scale": np.array([0.1, 0.3, 2.0**-126], np.float32),
        "bias": np.zeros(3, np.float32),
    }
    return PackedLinear(**(parts | changes))  # type: ignore[arg-type]


def test_weights_are_one_float32_product() -> None:
    linear = a_linear()
    linear.check()
    integers, weights = linear.integers(), linear.weights()
    assert weights.dtype == np.float32
    for n, k in np.ndindex(*linear.shape):
        assert weights[n, k] == linear.scale[n] * np.float32(integers[n, k])


def changed(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    out = array.copy()
    out[index] = value
    return out


GOOD = a_linear()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"codes": GOOD.codes[:, :-1]}, CodesShapeMismatch),
        ({"codes": GOOD.codes.astype(np.int8)}, WrongDtype),
        ({"codes": changed(GOOD.codes, (2, 32), 0x10)}, NonZeroPadding),
        ({"levels": GOOD.levels[:, :1]}, LevelsShapeMismatch),
        ({"group_size": 64}, LevelsShapeMismatch),
        ({"levels": changed(GOOD.levels, (1, 1, 0), 127)}, DecreasingLevels),
        ({"levels": changed(GOOD.levels, (0, 0, 0), -128)}, LevelOutOfRange),
        ({"scale": GOOD.scale[:2]}, ScaleShapeMismatch),
        ({"scale": GOOD.scale.astype(np.float64)}, WrongDtype),
        ({"scale": GOOD.scale.astype(">f4")}, UnknownDtype),
        ({"scale": changed(GOOD.scale, (2,), 2.0**-127)}, BadScale),
        ({"scale": changed(GOOD.scale, (2,), np.nan)}, BadScale),
        ({"bias": np.zeros(4, np.float32)}, WrongShape),
        ({"bias": np.full(3, -np.inf, np.float32)}, NotFinite),
        ({"shape": (3, 131), "codes": GOOD.codes[:2]}, CodesShapeMismatch),
    ],
)
def test_check_finds_each_fault(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"layers\.0\.attn\.q\.\w+"):
        a_linear(**changes).check()


def test_random_models_have_sane_weights() -> None:
    _, tensors = random_model(TINY, LDP, 3)
    name = "layers.0.mlp.down"
    parts = {part: tensors[f"{name}.{part}"] for part in ("codes", "levels", "scale")}
    weights = PackedLinear(name=name, shape=(32, 48), group_size=128, **parts).weights()
    assert 0.3 < weights.std() * 48**0.5 < 3
