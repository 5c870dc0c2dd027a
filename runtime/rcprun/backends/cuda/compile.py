"""The one door through which kernels are compiled: a `.cu` file and its definitions to a cubin, by NVRTC.

Needs no GPU. A cubin is kept on disk under the hash of all that made it: source, headers, options, compiler. Knows
nothing of what a kernel does or of launching it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcprun.errors import BackendUnavailable
from rcprun.output import replacing, writing

KERNELS = Path(__file__).parent / "kernels"
CACHE_VARIABLE = "RCPRUN_CACHE"

_OPTIONS = ("--std=c++17", "--fmad=false", "--extra-device-vectorization")
"""Without contraction: SPEC.md rounds each operation. Where a fused one is meant, the source says fmaf."""


def cache_folder() -> Path:
    """Where cubins are kept: $RCPRUN_CACHE, or rcprun in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rcprun")


def cubin_file(name: str, arch: int, defines: Mapping[str, int]) -> Path:
    """The cubin of kernels/<name>.cu for compute capability `arch` (90: sm_90), from the cache or compiled into it."""
    file = cache_folder() / f"{name}-{_key(name, arch, defines)}.cubin"
    if not file.exists():
        cubin = compile_cubin(name, arch, defines)
        remedy = f"set {CACHE_VARIABLE} to a folder that can be written"
        with writing(file, remedy):
            file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, force=True, remedy=remedy) as temporary, writing(file, remedy):
            temporary.write_bytes(cubin)
    return file


def compile_cubin(name: str, arch: int, defines: Mapping[str, int]) -> bytes:
    """Compile kernels/<name>.cu. Raises BackendUnavailable without NVRTC, AssertionError for our own errors."""
    nvrtc = _nvrtc()
    headers = _headers()
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            _source(name), f"{name}.cu".encode(), len(headers), list(headers.values()), [h.encode() for h in headers]
        )
    )
    options = [option.encode() for option in _options(arch, defines)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise AssertionError(f"{name}.cu does not compile for sm_{arch}:\n{log.decode()}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin)


def compiler_version() -> tuple[int, int]:
    """Of NVRTC. Raises BackendUnavailable without its package, RuntimeError without its library."""
    major, minor = _checked(_nvrtc().nvrtcVersion())
    return major, minor


def _options(arch: int, defines: Mapping[str, int]) -> list[str]:
    return [*_OPTIONS, f"--gpu-architecture=sm_{arch}", *(f"-D{key}={value}" for key, value in sorted(defines.items()))]


def _source(name: str) -> bytes:
    return (KERNELS / f"{name}.cu").read_bytes()


def _headers() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(KERNELS.glob("*.cuh"))}


def _key(name: str, arch: int, defines: Mapping[str, int]) -> str:
    parts = [repr(compiler_version()).encode(), *(option.encode() for option in _options(arch, defines)), _source(name)]
    for header, text in _headers().items():
        parts += [header.encode(), text]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BackendUnavailable(
            f"backend cuda: {error}; install the runtime with its GPU parts: pip install 'rcpconv[cuda]'"
        ) from error
    return nvrtc


def _checked(answer: tuple[Any, ...]) -> Any:
    """What an NVRTC call returned, without its status."""
    status, *values = answer
    assert int(status) == 0, status
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)
