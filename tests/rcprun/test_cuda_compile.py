"""Every kernel compiles for every kind of GPU, with NVRTC and with nvcc; cubins are cached correctly. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rcprun.backends.cuda import compile as door
from rcprun.backends.cuda.compile import CACHE_VARIABLE, KERNELS, compile_cubin, cubin_file
from rcprun.backends.cuda.variants import ARCHITECTURES, HOPPER_VARIANTS, VARIANTS
from rcprun.errors import InputOutputError

SOURCES = {path.stem: path for path in sorted(KERNELS.glob("*.cu"))}
GUARD = re.compile(r"^#if(ndef \w+|.*!defined\(.*)\n#error\b", re.MULTILINE)
INCLUDE = re.compile(r"^\s*#\s*include\s+(.+)$", re.MULTILINE)
COMMON = '"common.cuh"'
NVCC = shutil.which("nvcc")


def with_headers(path: Path) -> str:
    """The text of a kernel and of the headers that it includes, but for the common one."""
    text = path.read_text(encoding="utf-8")
    headers = [name for name in INCLUDE.findall(text) if name != COMMON]
    return text + "".join(with_headers(KERNELS / name.strip('"')) for name in headers)


def test_every_kernel_is_in_the_table() -> None:
    assert SOURCES.keys() == VARIANTS.keys()
    assert all(VARIANTS.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_definition_sets_are_what_the_source_asks_for(name: str) -> None:
    guards = GUARD.findall(with_headers(SOURCES[name]))
    asked = {word for guard in guards for word in re.findall(r"\b[A-Z]\w+", guard)}
    for defines in (*VARIANTS[name], *HOPPER_VARIANTS.get(name, ())):
        assert defines.keys() == asked


@pytest.mark.parametrize("path", sorted(KERNELS.iterdir()), ids=lambda path: path.name)
def test_kernels_include_nothing_from_elsewhere(path: Path) -> None:
    """CUDA's own headers are not there where only NVRTC is installed."""
    headers = {f'"{header.name}"' for header in KERNELS.glob("*.cuh")}
    assert set(INCLUDE.findall(path.read_text(encoding="utf-8"))) <= headers


@pytest.mark.parametrize("path", sorted(KERNELS.iterdir()), ids=lambda path: path.name)
def test_one_file_alone_holds_ptx(path: Path) -> None:
    """cuda_on_cpu/ptx.cuh takes its place where there is no GPU."""
    text = path.read_text(encoding="utf-8")
    assert (re.search(r"\basm\b|__cvta", text) is not None) == (path.name == "ptx.cuh")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_with_nvrtc(name: str, arch: int) -> None:
    for defines in VARIANTS[name] + (HOPPER_VARIANTS.get(name, ()) if arch >= 90 else ()):
        assert compile_cubin(name, arch, defines).startswith(b"\x7fELF")


@pytest.mark.parametrize("name", [name for name in SOURCES if "RCP_HOPPER" in with_headers(SOURCES[name])])
def test_compiles_the_way_of_older_gpus_for_newer_ones(name: str) -> None:
    for defines in VARIANTS[name]:
        assert compile_cubin(name, 90, defines | {"RCP_NO_HOPPER": 1}).startswith(b"\x7fELF")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_with_nvcc(name: str, tmp_path: Path) -> None:
    """The first definition set, for the newest architecture."""
    assert NVCC is not None
    out = tmp_path / "out.cubin"
    options = [f"-D{key}={value}" for key, value in VARIANTS[name][0].items()]
    arch = f"-arch=sm_{max(ARCHITECTURES)}"
    command = [NVCC, arch, "-std=c++17", "--fmad=false", *options, "-cubin", "-o", str(out), str(SOURCES[name])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert out.stat().st_size


@pytest.mark.parametrize(
    ("name", "missing"), [(name, key) for name, variants in VARIANTS.items() for key in variants[0]]
)
def test_a_missing_definition_is_an_error_that_names_it(name: str, missing: str) -> None:
    defines = {key: value for key, value in VARIANTS[name][0].items() if key != missing}
    with pytest.raises(AssertionError, match=rf'#error directive: ".*\b{missing}\b'):
        compile_cubin(name, 90, defines)


SCALE = """#include "factor.cuh"
#ifndef TIMES
#error "TIMES: a factor"
#endif
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= TIMES * FACTOR; }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; the only kernel is SCALE."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "scale.cu").write_text(SCALE)
    (kernels / "factor.cuh").write_text("#define FACTOR 2\n")
    monkeypatch.setattr(door, "KERNELS", kernels)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cubin_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cubin_file("scale", 90, {"TIMES": 3})
    assert first.parent == cache
    assert first.read_bytes() == compile_cubin("scale", 90, {"TIMES": 3})
    monkeypatch.setattr(door, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert cubin_file("scale", 90, {"TIMES": 3}) == first
    assert list(cache.iterdir()) == [first]


def test_a_cache_that_cannot_be_written_is_named_and_left_clean(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InputOutputError, match=r"cache/scale-\w+\.cubin: .* No space left on device; set RCPRUN_CACHE"):
        cubin_file("scale", 90, {"TIMES": 3})
    assert list(cache.iterdir()) == []
    monkeypatch.setenv(CACHE_VARIABLE, str(door.KERNELS / "scale.cu"))
    with pytest.raises(InputOutputError, match=r"File exists; set RCPRUN_CACHE to a folder"):
        cubin_file("scale", 90, {"TIMES": 3})


def test_whatever_makes_a_cubin_is_in_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [cubin_file("scale", 90, {"TIMES": 3}), cubin_file("scale", 80, {"TIMES": 3})]
    files.append(cubin_file("scale", 90, {"TIMES": 4}))
    (door.KERNELS / "factor.cuh").write_text("#define FACTOR 5\n")
    files.append(cubin_file("scale", 90, {"TIMES": 3}))
    (door.KERNELS / "scale.cu").write_text(SCALE + "\n")
    files.append(cubin_file("scale", 90, {"TIMES": 3}))
    (door.KERNELS / "another.cuh").write_text("")
    files.append(cubin_file("scale", 90, {"TIMES": 3}))
    monkeypatch.setattr(door, "_OPTIONS", (*door._OPTIONS, "--use_fast_math"))
    files.append(cubin_file("scale", 90, {"TIMES": 3}))
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_default_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    parts = ("rcprun",) if variable == "XDG_CACHE_HOME" else (".cache", "rcprun")
    assert door.cache_folder() == tmp_path.joinpath(*parts)


def test_a_cubin_appears_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="TIMES"):
        cubin_file("scale", 90, {})
    assert not cache.exists()

    expected, replace = compile_cubin("scale", 90, {"TIMES": 3}), os.replace

    def interrupted(source: str, target: Path) -> None:
        assert not target.exists()
        assert Path(source).read_bytes() == expected
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cubin_file("scale", 90, {"TIMES": 3})
    assert not list(cache.glob("*.cubin"))

    monkeypatch.setattr(os, "replace", replace)
    assert cubin_file("scale", 90, {"TIMES": 3}).read_bytes() == expected
