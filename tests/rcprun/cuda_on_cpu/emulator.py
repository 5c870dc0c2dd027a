"""Runs CUDA kernels on a CPU: g++ compiles their sources with cuda.h and ptx.cuh, and CuPy is NumPy. Only for tests.

What runs is the path for GPUs before sm_90. An array ends where memory ends, so that a kernel that reads or writes
beyond it fails, as does one with a misaligned access or lanes that do not meet. Every other launch runs backwards, see
cuda.h. Knows nothing of what a kernel does.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

import rcprun.backends.cuda as package

GXX = shutil.which("g++")
FOLDER = Path(__file__).parent
KERNELS = Path(package.__file__).parent / "kernels"
SHARED_BYTES = 227 * 1024
MULTIPROCESSORS = 3
"""Few, so that each of a small problem's blocks does several parts of it."""

_MOST_THREADS = 1024
_STACK_BYTES = (128 << 10) + 832
"""Of a thread. No power of two: stacks would share the same few sets of the cache."""

_OPTIONS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-DSTACK_BYTES={_STACK_BYTES}", "-U_FORTIFY_SOURCE")
# The last one: else shared memory that an inline function declares would be one for all libraries, of one size.
_OPTIONS += ("-ffp-contract=off", "-fno-strict-aliasing", "-fno-extern-tls-init", "-fno-gnu-unique")
_OPTIONS += ("-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error")
_CODES = {np.int32: "i", np.uint32: "I", np.int64: "q", np.uint64: "Q", np.float32: "f"}
_DYNAMIC = re.compile(r"extern __shared__ __align__\(\w+\) (\w+) (\w+)\[\];")
_ENTRY = """#include "cuda.h"
#include "{file}.cu"
alignas(128) thread_local {type} {memory}[({bytes} + GUARD_BYTES) / sizeof({type})];
extern "C" const char* parameters() {{ return codes_of({name}); }}
extern "C" const char* run(const unsigned* sizes, int backwards, char* stacks, void** given) {{
    static void** arguments;
    arguments = given;
    body = [] {{ call({name}, arguments); }};
    return run_grid({{sizes, backwards, (unsigned char*){memory}, stacks}});
}}
"""


class Array(np.ndarray):
    """cupy.ndarray, as far as launchers and tests use it."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=0)

    def get(self) -> np.ndarray:
        return np.array(self)

    def set(self, values: np.ndarray) -> None:
        assert values.shape == self.shape and values.dtype == self.dtype
        self[...] = values


def empty(shape: int | tuple[int, ...], dtype: Any = np.float64) -> Array:
    """Garbage, whose last 16 bytes are followed by a page that nothing may touch."""
    dtype, shape = np.dtype(dtype), (shape,) if np.ndim(shape) == 0 else tuple(shape)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    end = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, end + mmap.PAGESIZE), np.uint8)
    nothing = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.ctypes.data + end), mmap.PAGESIZE, nothing) == 0
    begin = end - -(-size // 16) * 16
    memory[begin:end] = 0xA5
    return memory[begin : begin + size].view(dtype).reshape(shape).view(Array)


def full(shape: int | tuple[int, ...], value: Any, dtype: Any = None) -> Array:
    array = empty(shape, np.asarray(value).dtype if dtype is None else dtype)
    array[...] = value
    return array


def asarray(values: Any, dtype: Any = None) -> Array:
    values = np.asarray(values, dtype)
    array = empty(values.shape, values.dtype)
    array[...] = values
    return array


class Emulator:
    """Compiled kernels, which a folder keeps, and the launches since the last reset."""

    def __init__(self, folder: Path) -> None:
        self.launches = 0
        self.captured: list[Callable[[], None]] | None = None
        """Launches that a graph is made of, while one is captured."""
        self.stacks = np.frombuffer(mmap.mmap(-1, _MOST_THREADS * _STACK_BYTES), np.uint8)
        paths = (*sorted(KERNELS.glob("*.cu*")), FOLDER / "cuda.h", FOLDER / "ptx.cuh")
        sources = {path.name: path.read_text() for path in paths}
        self._folder = folder / _hash(sources)
        if not self._folder.exists():
            build = Path(tempfile.mkdtemp(dir=folder))
            for name, text in sources.items():
                (build / name).write_text(text)
            _compile("-x", "c++-header", "cuda.h", "-o", "cuda.h.gch", folder=build)
            with suppress(OSError):  # another worker was faster
                build.rename(self._folder)

    def library(self, file: str, name: str, defines: dict[str, int]) -> ctypes.CDLL:
        """Kernel `name` of kernels/<file>.cu; compiled if it is not in the folder."""
        dynamic = _DYNAMIC.search((self._folder / f"{file}.cu").read_text())
        kind, memory = dynamic.groups() if dynamic else ("char", "no_dynamic_memory")
        entry = _ENTRY.format(file=file, name=name, type=kind, memory=memory, bytes=SHARED_BYTES)
        options = [f"-D{key}={value}" for key, value in sorted(defines.items())]
        path = self._folder / f"{file}-{name}-{_hash(options)}.so"
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".so", delete=False) as library:
                _compile(*options, "-I.", "-x", "c++", "-", "-o", library.name, folder=self._folder, text=entry)
            os.replace(library.name, path)
        return ctypes.CDLL(str(path))


def _compile(*arguments: str, folder: Path, text: str = "") -> None:
    assert GXX is not None
    subprocess.run([GXX, *_OPTIONS, *arguments], cwd=folder, input=text, text=True, check=True)


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


class Kernel:
    """In the place of rcprun.backends.cuda.launch.Kernel."""

    def __init__(self, emulator: Emulator, file: str, name: str, **defines: int) -> None:
        self._emulator, self._name = emulator, name
        library = emulator.library(file, name, {key: defines[key] for key in defines if key != "RCP_NO_HOPPER"})
        library.run.restype = library.parameters.restype = ctypes.c_char_p
        self._run, self._codes = library.run, library.parameters().decode()

    def launch(
        self,
        grid: tuple[int, int, int] | int,
        block: int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Run to the end, or when the graph is launched that is being captured."""
        assert cluster == 1 and block % 32 == 0 and block <= _MOST_THREADS and shared <= SHARED_BYTES
        values, codes = [], ""
        for argument in arguments:
            pointer = argument is None or isinstance(argument, Array)
            codes += "P" if pointer else _CODES[type(argument)]
            values.append(argument.ctypes.data if isinstance(argument, Array) else 0 if pointer else argument)
        assert codes == self._codes, f"{self._name} takes {self._codes}, got {codes}"
        packed = np.zeros((len(values), 8), np.uint8)
        for row, code, value in zip(packed, codes, values, strict=True):
            scalar = np.array([value], np.dtype(code)).view(np.uint8)
            row[: len(scalar)] = scalar
        places = (ctypes.c_void_p * len(values))(*(packed.ctypes.data + 8 * i for i in range(len(values))))
        sizes = (ctypes.c_uint * 5)(*((grid, 1, 1) if isinstance(grid, int) else grid), block, shared)
        run = partial(self._run_now, sizes, places, (packed, arguments))
        if self._emulator.captured is None:
            run()
        else:
            self._emulator.captured.append(run)

    def _run_now(self, sizes: Any, places: Any, alive: Any) -> None:
        backwards = self._emulator.launches % 2
        self._emulator.launches += 1
        failure = self._run(sizes, backwards, ctypes.c_void_p(self._emulator.stacks.ctypes.data), places)
        assert failure is None, f"{self._name}: {failure.decode()}"


def _cupy(emulator: Emulator) -> dict[str, ModuleType]:
    """CuPy, as far as the backend uses it. A stream runs everything at once."""

    class Stream:
        ptr = 0

        def __init__(self, non_blocking: bool = False) -> None: ...
        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *error: object) -> None: ...
        def synchronize(self) -> None: ...
        def begin_capture(self) -> None:
            emulator.captured = []

        def end_capture(self) -> Any:
            launches, emulator.captured = emulator.captured, None
            assert launches is not None
            return SimpleNamespace(launch=lambda stream: [launch() for launch in launches])

    def pinned(size: int) -> Any:
        return type("Pinned", (ctypes.c_char * size,), {"ptr": property(ctypes.addressof)})()

    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    attributes = {"MaxSharedMemoryPerBlockOptin": SHARED_BYTES, "MultiProcessorCount": MULTIPROCESSORS}
    device = SimpleNamespace(compute_capability="80", attributes=attributes, synchronize=lambda: None)
    runtime = SimpleNamespace(
        getDevice=lambda: 0,
        getDeviceCount=lambda: 1,
        memGetInfo=lambda: (1 << 40, 1 << 40),
        memcpyDeviceToHost=2,
        memcpyDeviceToDevice=3,
        memcpyAsync=lambda to, start, size, kind, stream: ctypes.memmove(to, start, size),
    )
    cuda = SimpleNamespace(
        Device=lambda: device,
        Event=lambda disable_timing=False: event,
        get_elapsed_time=lambda start, end: 1.0,
        Stream=Stream,
        alloc_pinned_memory=pinned,
        device=SimpleNamespace(get_cublas_handle=lambda: None),
        get_current_stream=Stream,
        runtime=runtime,
    )
    names = {"ndarray": Array, "empty": empty, "full": full, "asarray": asarray, "asnumpy": np.array, "cuda": cuda}
    names["zeros"] = lambda shape, dtype=np.float64: full(shape, 0, dtype)
    names["ones"] = lambda shape, dtype=np.float64: full(shape, 1, dtype)
    cublas = {"CUBLAS_OP_T": 1, "CUBLAS_OP_N": 0, "setStream": lambda handle, stream: None, "gemmEx": _gemm}
    modules = {"cupy": names, "cupy_backends": {}, "cupy_backends.cuda": {}}
    modules["cupy_backends.cuda.libs"] = {"cublas": SimpleNamespace(**cublas)}
    made = {name: ModuleType(name) for name in modules}
    for name, module in made.items():
        vars(module).update(modules[name])
    return made


def _gemm(handle: Any, a_op: int, b_op: int, n: int, m: int, k: int, *rest: Any) -> None:
    """c (m, n) int32 = b (m, k) int8 · a (n, k)ᵀ int8, all row-major."""
    (_, a, _, a_stride, b, _, b_stride, _, c, _, c_stride, _, _) = rest
    assert (a_op, b_op, a_stride, b_stride, c_stride) == (1, 0, k, k, n)

    def matrix(pointer: int, rows: int, columns: int, kind: Any) -> np.ndarray:
        return np.ctypeslib.as_array((kind * (rows * columns)).from_address(pointer)).reshape(rows, columns)

    product = matrix(b, m, k, ctypes.c_int8).astype(np.float64) @ matrix(a, n, k, ctypes.c_int8).T.astype(np.float64)
    matrix(c, m, n, ctypes.c_int32)[...] = product


def _take_out() -> tuple[dict[str, ModuleType], dict[str, ModuleType]]:
    """Of sys.modules, CuPy and all of the backend, so that they are imported anew; of its package, the same."""
    away = re.compile(r"(cupy|cupy_backends)(\..*)?|rcprun\.backends\.cuda\..*")
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if away.fullmatch(name)}
    names = [name for name, value in vars(package).items() if isinstance(value, ModuleType)]
    return modules, {name: vars(package).pop(name) for name in names}


@contextmanager
def installed(folder: Path) -> Iterator[Emulator]:
    """Within it, what is imported of the CUDA backend runs on the CPU; after it, all is as it was before."""
    modules, attributes = _take_out()
    emulator = Emulator(folder)
    try:
        sys.modules.update(_cupy(emulator))
        from rcprun.backends.cuda import launch

        launch.Kernel = partial(Kernel, emulator)  # type: ignore[assignment, misc]
        yield emulator
    finally:
        _take_out()
        sys.modules.update(modules)
        vars(package).update(attributes)
