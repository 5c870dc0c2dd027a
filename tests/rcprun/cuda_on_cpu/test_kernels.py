"""The tests of the CUDA backend in tests/rcprun/cuda, kernels and all, without a GPU: see emulator.py.

A small case or two of each in `make test`, all others in `make test-slow`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from tests.rcprun.cuda import (
    test_attention,
    test_backend,
    test_embed,
    test_gemm,
    test_hadamard,
    test_head,
    test_linear,
    test_norm,
    test_prefill_attention,
    test_rope,
    test_sample,
)
from tests.rcprun.cuda_on_cpu.emulator import GXX, Emulator, installed

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not on PATH")

MODULES = (
    *(test_attention, test_backend, test_embed, test_gemm, test_hadamard),
    *(test_head, test_linear, test_norm, test_prefill_attention, test_rope, test_sample),
)
Test = Callable[..., None]

FAST: dict[Test, tuple[dict[str, Any], ...]] = {
    test_attention.test_decode: ({"heads": 3, "kv_heads": 1, "head_dim": 80, "bits": 4, "hopper": False},),
    test_attention.test_fused: (
        {"heads": 5, "kv_heads": 1, "head_dim": 32, "bits": 4, "norm": False, "r3": True, "hopper": False},
    ),
    test_attention.test_tiny_and_huge_vectors: ({"scale": 30.0},),
    test_backend.test_logits_are_those_of_the_numpy_backend: ({"name": "tiny"},),
    test_backend.test_tokens_of_a_stream_do_not_depend_on_the_others: ({},),
    test_backend.test_forked_streams_decode_alike: ({},),
    test_embed.test_rows_are_exact: (
        {"vocabulary": 64, "width": 192, "half": False},
        {"vocabulary": 7, "width": 5, "half": True},
    ),
    test_gemm.test_many_tokens_are_exact: ({"n": 333, "k": 173, "group": 64}, {"n": 40, "k": 300, "group": 128}),
    test_gemm.test_gate_and_up: ({"n": 480},),
    test_gemm.test_sums_are_rescaled_in_parts: ({"interleave": True},),
    test_gemm.test_sums_are_added_and_normalized: ({"n": 480, "bits": 4}, {"n": 173, "bits": 8}),
    test_gemm.test_sums_of_gate_and_up_are_rotated: ({"n": 480}, {"n": 1408}),
    test_hadamard.test_integers_are_exact: (
        {"n": 480, "tokens": 6, "transpose": True},
        {"n": 36, "tokens": 6, "transpose": False},
    ),
    test_hadamard.test_floats_and_codes: ({"n": 512, "tokens": 33}, {"n": 1408, "tokens": 2}),
    test_head.test_int8_is_exact: ({"vocabulary": 33, "width": 192},),
    test_head.test_half_is_within_float32_rounding: ({"vocabulary": 37, "width": 172},),
    test_linear.test_codes_in_are_exact: (
        {"n": 40, "k": 300, "group": 128, "hopper": False},
        {"n": 300, "k": 172, "group": 64, "hopper": False},
    ),
    test_linear.test_several_layers_share_tiles: ({},),
    test_linear.test_groups_of_64_and_128_share_tiles: ({},),
    test_linear.test_quantize_and_add: ({"k": 173, "bits": 4}, {"k": 5120, "bits": 4}),
    test_linear.test_several_tokens_are_added: ({"k": 173},),
    test_linear.test_codes_that_do_not_fit_go_in_parts: ({},),
    test_linear.test_normalize_and_swiglu: ({"k": 192},),
    test_linear.test_gate_and_up_of_several_tokens: ({},),
    test_norm.test_normalized_rows: ({"channels": 480},),
    test_norm.test_codes_are_those_of_the_normalized_rows: ({"channels": 171, "bits": 8},),
    test_norm.test_what_is_not_finite_stays_visible: ({"poison": float("inf")},),
    test_prefill_attention.test_prefill: ({"heads": 2, "kv_heads": 2, "head_dim": 32, "bits": 8},),
    test_prefill_attention.test_tiny_and_huge_vectors: ({"scale": 30.0},),
    test_rope.test_without_reductions_everything_is_equal: ({"heads": 3, "kv_heads": 1, "head_dim": 80, "bits": 4},),
    test_rope.test_norm_and_hadamard: ({"head_dim": 96, "norm": True, "bits": 8},),
    test_rope.test_from_sums: (
        {"heads": 3, "kv_heads": 1, "head_dim": 80, "biased": True, "bits": 4},
        {"heads": 8, "kv_heads": 4, "head_dim": 64, "biased": True, "bits": 8},
        {"heads": 4, "kv_heads": 4, "head_dim": 128, "biased": False, "bits": 4},
    ),
    test_rope.test_nan_stays_nan: ({},),
    test_sample.test_choices_are_numpys: (
        {"vocabulary": 300, "scale": 1.0, "way": "all"},
        {"vocabulary": 4097, "scale": 1.0, "way": "few"},
    ),
    test_sample.test_all_ways_choose_the_same_tokens: ({"way": "few"},),
    test_sample.test_a_graph_replays_new_draws: ({"few": True},),
}


def cases() -> Iterator[Any]:
    for module in MODULES:
        for name, test in vars(module).items():
            if not name.startswith("test_") or test.__module__ != module.__name__:
                continue
            for arguments in FAST.get(test, ()):
                yield pytest.param(test, arguments, id=label(test, arguments))
            for arguments in every(test):
                if arguments in FAST.get(test, ()) or arguments.get("hopper"):  # there are older GPUs' ways only
                    continue
                yield pytest.param(test, arguments, id=label(test, arguments), marks=pytest.mark.slow)


def every(test: Test) -> Iterator[dict[str, Any]]:
    """All arguments that a test's parametrize marks give it."""
    choices = []
    for mark in getattr(test, "pytestmark", ()):
        names, values = mark.args
        names = (names,) if isinstance(names, str) else names
        choices.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values])
    for combination in product(*choices):
        yield {name: value for part in combination for name, value in part.items()}


def label(test: Test, arguments: dict[str, Any]) -> str:
    values = ",".join(f"{name}={value}" for name, value in arguments.items())
    return f"{test.__module__.removeprefix('tests.rcprun.cuda.test_')}-{test.__name__.removeprefix('test_')}[{values}]"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """The CUDA backend on the CPU, for this file only. Workers share a folder of compiled kernels."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "kernels_on_cpu"
    folder.mkdir(exist_ok=True)
    with installed(folder) as emulator:
        yield emulator
    test_hadamard.transform.cache_clear()


@pytest.mark.parametrize(("test", "arguments"), list(cases()))
def test_on_cpu(backend: Emulator, request: pytest.FixtureRequest, test: Test, arguments: dict[str, Any]) -> None:
    backend.launches = 0
    fixtures = inspect.signature(test).parameters.keys() - arguments.keys()
    test(**arguments, **{name: request.getfixturevalue(name) for name in fixtures})
