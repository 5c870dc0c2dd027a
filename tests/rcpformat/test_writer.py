"""Writing: canonical bytes, one tensor in memory at a time, all or nothing."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from rcpformat import RcpFile, spec, write_rcp
from rcpformat.errors import (
    BadJson,
    BadMetadata,
    BadScale,
    BadTensorEntry,
    BadTokenizer,
    HeaderTooLarge,
    MissingTensor,
    OutputExists,
    OutputNotWritable,
    UnknownDtype,
    UnknownTensor,
    WrongDtype,
    WrongShape,
)
from tiny_rcp import LDP, TINY, random_metadata, random_model, sources, write_random

Q = "layers.0.attn.q"
EVERYTHING = dataclasses.replace(
    TINY, num_layers=2, attention_window=(None, 5), qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
)
ONE_TABLE = dataclasses.replace(EVERYTHING, tied_table=True)
HALVES = dataclasses.replace(LDP, a_bits=8, kv_bits=8, head_bits=16, embed_bits=16)


@pytest.mark.parametrize("architecture", [TINY, EVERYTHING, ONE_TABLE])
@pytest.mark.parametrize("quantization", [LDP, HALVES])
def test_round_trip_and_safetensors_agree(tmp_path: Path, architecture: Any, quantization: Any) -> None:
    path = tmp_path / "model.rcp"
    metadata, tensors = write_random(path, architecture, quantization, seed=5)
    with RcpFile.open(path, verify=True) as file, safe_open(path, "numpy") as library:
        assert file.metadata == metadata
        assert set(library.keys()) == set(tensors) == set(file.header_tensors)
        assert library.metadata()[spec.KEY_VERSION] == "1.0"
        for name, array in tensors.items():
            for read in (file.tensor(name), library.get_tensor(name)):
                assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array), name
        linear = file.linear(Q)
        linear.check()
        assert (linear.bias is None) == (not architecture.qkv_bias)
        assert file.tokenizer_json() == tensors[spec.TOKENIZER].tobytes()


def test_report_and_hashes(tmp_path: Path) -> None:
    metadata, tensors = random_model(TINY, LDP, 0)
    report = write_rcp(tmp_path / "model.rcp", metadata, sources(tensors))
    assert report.path == tmp_path / "model.rcp" and report.nbytes == report.path.stat().st_size
    assert report.tensor_sha256 == {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in tensors.items()}


def test_header_is_canonical(tmp_path: Path) -> None:
    path = tmp_path / "model.rcp"
    write_random(path, provenance={"b": 'ü\u2028"\\\n\x7f', "a": [1, 0.1, None, True]})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].decode()
    header = json.loads(text)
    assert text.rstrip(" ") == json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    names = list(header)
    assert names[0] == "__metadata__" and list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert names[1:] == sorted(names[1:], key=lambda name: (-spec.DTYPES[header[name]["dtype"]].itemsize, name))
    assert header["__metadata__"][spec.KEY_PROVENANCE] == '{"a":[1,0.1,null,true],"b":"ü\u2028\\"\\\\\\n\x7f"}'
    position = 0
    for name in names[1:]:
        assert header[name]["data_offsets"][0] == position
        position = header[name]["data_offsets"][1]


def test_same_bytes_whatever_the_order_and_the_hash_seed(tmp_path: Path) -> None:
    metadata, tensors = random_model(EVERYTHING, LDP, 1)
    write_rcp(tmp_path / "a", metadata, sources(tensors))
    backwards = dataclasses.replace(metadata, provenance=dict(reversed(metadata.provenance.items())))
    write_rcp(tmp_path / "b", backwards, sources(dict(reversed(tensors.items()))))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    program = "import sys, pathlib, tiny_rcp; tiny_rcp.write_random(pathlib.Path(sys.argv[1]), seed=2)"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / f"seed{seed}")], env=environment, check=True)
    assert (tmp_path / "seed1").read_bytes() == (tmp_path / "seed2").read_bytes()


def test_arrays_of_any_layout_are_written_right(tmp_path: Path) -> None:
    metadata, tensors = random_model(TINY, LDP, 0)
    laid_out = {
        name: np.asfortranarray(array) if array.ndim > 1 else np.repeat(array, 2)[::2]
        for name, array in tensors.items()
    }
    write_rcp(tmp_path / "a", metadata, sources(tensors))
    write_rcp(tmp_path / "b", metadata, sources(laid_out))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_extensions_are_kept(tmp_path: Path) -> None:
    metadata, tensors = random_model(TINY, LDP, 0)
    metadata = dataclasses.replace(metadata, extensions={"my.key": "é"}, optional_features=("fast_head",))
    extra = {"x.nan": np.array(np.nan), "x.levels": np.full((2, 3), -128, np.int8)}
    write_rcp(tmp_path / "a", metadata, sources(tensors | extra))
    with RcpFile.open(tmp_path / "a", verify=True) as file:
        assert file.metadata == metadata
        assert file.tensor("x.nan").shape == () and np.isnan(file.tensor("x.nan"))
        assert np.array_equal(file.tensor("x.levels"), extra["x.levels"])


REPLACE: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], type[ValueError]]] = {
    "missing": (lambda t: t.pop(Q + ".codes"), MissingTensor),
    "unknown": (lambda t: t.update({"lm_head.weight": np.zeros(1, np.float32)}), UnknownTensor),
    "dtype": (lambda t: t.update({Q + ".codes": t[Q + ".codes"].astype(np.int64)}), UnknownDtype),
    "other dtype": (lambda t: t.update({"embed.scale": t["embed.scale"].astype(np.float16)}), WrongDtype),
    "shape": (lambda t: t.update({"layers.0.kv_clip": np.ones(3, np.float32)}), WrongShape),
    "value": (lambda t: t.update({Q + ".scale": -t[Q + ".scale"]}), BadScale),
    "tokenizer": (lambda t: t.update({"tokenizer.json": np.zeros(3, np.uint8)}), BadTokenizer),
    "extension dtype": (lambda t: t.update({"x.a": np.zeros(1, np.complex64)}), UnknownDtype),
    "empty extension": (lambda t: t.update({"x.a": np.zeros((0, 3), np.float32)}), BadTensorEntry),
    "long name": (lambda t: t.update({"x." + "a" * 300: np.zeros(1, np.float32)}), BadTensorEntry),
}


@pytest.mark.parametrize("case", REPLACE)
def test_bad_tensors_are_not_written(tmp_path: Path, case: str) -> None:
    change, error = REPLACE[case]
    metadata, tensors = random_model(TINY, LDP, 0)
    change(tensors)
    with pytest.raises(error):
        write_rcp(tmp_path / "model.rcp", metadata, sources(tensors))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"provenance": {"loss": float("nan")}}, BadJson),
        ({"provenance": {"steps": 10**50}}, BadJson),
        ({"provenance": {"array": np.zeros(2)}}, BadJson),
        ({"provenance": {"text": "\ud800"}}, BadJson),
        ({"provenance": {"big": "a" * (17 << 20)}}, HeaderTooLarge),
        (
            {"provenance": {"a": "a" * (15 << 20)}, "extensions": {"k": "a" * (16 << 20), "l": "a" * (2 << 20)}},
            HeaderTooLarge,
        ),
        ({"extensions": {"key": "nul\0"}}, BadMetadata),
    ],
)
def test_metadata_that_could_not_be_read_is_not_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        write_random(tmp_path / "model.rcp", **changes)
    assert not list(tmp_path.iterdir())


def test_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "model.rcp"
    path.write_text("precious")
    metadata, tensors = random_model(TINY, LDP, 0)
    with pytest.raises(OutputExists, match="--force"):
        write_rcp(path, metadata, sources(tensors))
    assert path.read_text() == "precious"
    write_rcp(path, metadata, sources(tensors), force=True)
    RcpFile.open(path, verify=True).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.rcp"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.rcp"
    metadata, tensors = random_model(TINY, LDP, 0)
    with pytest.raises(OutputExists):
        write_rcp(path, metadata, sources(tensors), check=lambda _: path.write_text("precious"))
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_check_sees_the_finished_file_and_can_refuse_it(tmp_path: Path) -> None:
    path = tmp_path / "model.rcp"
    path.write_text("old")
    metadata, tensors = random_model(TINY, LDP, 0)
    seen: list[Path] = []

    def check(temporary: Path) -> None:
        RcpFile.open(temporary, verify=True).close()
        seen.append(temporary)
        raise RuntimeError("not lossless")

    with pytest.raises(RuntimeError, match="not lossless"):
        write_rcp(path, metadata, sources(tensors), force=True, check=check)
    assert seen and seen[0].parent == tmp_path
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("interrupted", ["embed.weight", spec.TOKENIZER, "layers.0.act_clip"])
def test_interrupt_leaves_nothing(tmp_path: Path, interrupted: str) -> None:
    metadata, tensors = random_model(TINY, LDP, 0)
    with pytest.raises(KeyboardInterrupt):
        write_rcp(
            tmp_path / "model.rcp",
            metadata,
            sources(tensors) | {interrupted: lambda: signal.raise_signal(signal.SIGINT)},  # type: ignore[dict-item]
        )
    assert not list(tmp_path.iterdir())


def _write_with_little_room(path: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        write_random(path)
    except OutputNotWritable as error:
        return str(error)
    return "written"


def test_full_disk_is_an_error_with_the_path(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        message = pool.submit(_write_with_little_room, tmp_path / "model.rcp").result()
    assert "model.rcp" in message and "File too large" in message
    assert not list(tmp_path.iterdir())


def test_impossible_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "no folder" / "model.rcp",
        tmp_path / "file" / "model.rcp",
        tmp_path,
        tmp_path / ("a" * 300),
    ):
        with pytest.raises(OutputNotWritable, match=r"expected .*; (choose another|name a file)"):
            write_random(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_error_of_a_source_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    metadata, tensors = random_model(TINY, LDP, 0)

    def broken() -> Any:
        raise FileNotFoundError("checkpoint.safetensors")

    with pytest.raises(FileNotFoundError, match="checkpoint"):
        write_rcp(tmp_path / "model.rcp", metadata, sources(tensors) | {"embed.weight": broken})
    assert not list(tmp_path.iterdir())


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    architecture = dataclasses.replace(
        TINY, num_layers=4, hidden_size=512, intermediate_size=2048, num_heads=8, num_kv_heads=8, head_dim=64
    )
    _, small = random_model(TINY, LDP, 0)
    forms = spec.expected_tensors(architecture, LDP)

    def source(name: str) -> Callable[[], np.ndarray]:
        form = forms[name]
        if name == spec.TOKENIZER:
            return lambda: small[name]
        shape = tuple(size or 0 for size in form.shape)
        return lambda: np.ones(shape, spec.DTYPES[form.dtype])

    tracemalloc.start()
    try:
        report = write_rcp(
            tmp_path / "model.rcp", random_metadata(architecture, LDP), {name: source(name) for name in forms}
        )
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with RcpFile.open(tmp_path / "model.rcp", verify=True):
            verified = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = 512 * 2048 // 4
    assert report.nbytes > 12 * largest
    assert written < 5 * largest and verified < 5 * largest
