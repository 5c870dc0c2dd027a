"""Lazily read tensors: safetensors and pickled shards behind one small interface, and the canonical names.

Knows nothing of configurations or of where a checkpoint came from.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rcpconv.errors import (
    CorruptCheckpoint,
    MissingTensor,
    UnexpectedTensor,
    UnsafeCheckpoint,
    UnsupportedFormat,
    WrongTensorShape,
)
from rcpformat import spec
from rcpformat.architecture import Architecture

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors names of the dtypes that weights may have."""

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: `load` reads it, nothing else does. `dtype` is None when it is not a float dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], torch.Tensor]


class TensorStore:
    """The tensors of a checkpoint under canonical names, each read from its (memory-mapped) file when asked for.

    Of a safetensors file no more is mapped than the tensors that somebody holds.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """Every canonical name: embedding, layers in order, final norm, head."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the tensor. Linear weights are (out, in)."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored float dtype, without reading the tensor."""
        dtype = self._tensors[name].dtype
        assert dtype is not None, "select_tensors admits float tensors only"
        return dtype

    def get(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one tensor, in its stored dtype or in `dtype`: a contiguous copy that the caller may change."""
        return _copy(self._tensors[name].load(), dtype or self.dtype(name), device)

    def blocks(
        self, name: str, rows: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Iterator[torch.Tensor]:
        """As get, but so many rows at a time."""
        for block in self._tensors[name].load().split(rows):
            yield _copy(block, dtype, device)


def _copy(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    # In two steps: a copy to a GPU that changes the dtype would change it on the CPU, before it travels.
    copy = tensor.to(device, copy=torch.device(device).type != "cpu")
    return copy.to(dtype, copy=copy is tensor, memory_format=torch.contiguous_format)


def expected_shapes(architecture: Architecture, *, tied_embeddings: bool) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that a checkpoint of this architecture holds, in reading order."""
    a = architecture
    shapes: dict[str, tuple[int, ...]] = {f"{spec.EMBED}.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_layers):
        prefix = spec.layer_prefix(layer)
        shapes[prefix + "attn_norm.gain"] = shapes[prefix + "mlp_norm.gain"] = (a.hidden_size,)
        for kind in spec.LINEARS:
            rows, columns = spec.linear_shape(a, kind)
            shapes[f"{prefix}{kind}.weight"] = (rows, columns)
            if spec.has_bias(a, kind):
                shapes[f"{prefix}{kind}.bias"] = (rows,)
        if a.qk_norm:
            shapes[prefix + "attn.q_norm"] = shapes[prefix + "attn.k_norm"] = (a.head_dim,)
    shapes[spec.FINAL_GAIN] = (a.hidden_size,)
    if not tied_embeddings:
        shapes[f"{spec.HEAD}.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def select_tensors(
    stored: Mapping[str, LazyTensor],
    shapes: Mapping[str, tuple[int, ...]],
    stored_name: Callable[[str], str],
    ignorable: Callable[[str], bool],
    where: str,
) -> TensorStore:
    """Check the stored tensors against the shapes that the architecture asks for, and give them canonical names.

    stored_name: canonical name -> name in the checkpoint. ignorable: whether a left-over stored name carries nothing.
    Raises MissingTensor, UnexpectedTensor, WrongTensorShape or UnsupportedFormat (not floats), naming `where`.
    """
    chosen: dict[str, LazyTensor] = {}
    missing: list[str] = []
    used: set[str] = set()
    for name, shape in shapes.items():
        source = stored_name(name)
        used.add(source)
        if (tensor := stored.get(source)) is None:
            missing.append(source)
            continue
        if tensor.shape != shape:
            raise WrongTensorShape(
                f"{where}: {source}: the configuration asks for shape {shape}, found {tensor.shape}; "
                "the configuration and the weights are not from the same model"
            )
        if tensor.dtype is None:
            raise UnsupportedFormat(
                f"{where}: {source}: expected float64, float32, float16 or bfloat16 weights; found integers or 8-bit "
                "floats; use the original checkpoint, before quantization"
            )
        chosen[name] = tensor
    unexpected = sorted(name for name in stored if name not in used and not ignorable(name))
    if missing:
        raise MissingTensor(
            f"{where}: the weights lack {_some(missing)}; download the checkpoint again, or check that its "
            f"configuration belongs to it{f' (it also holds {_some(unexpected)})' if unexpected else ''}"
        )
    if unexpected:
        raise UnexpectedTensor(
            f"{where}: the weights hold {_some(unexpected)}, which the configured architecture has no place for; "
            "check that the configuration belongs to them"
        )
    return TensorStore(chosen)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file, memory-mapped one by one. Raises CorruptCheckpoint, also when they load."""
    _check_file(path)
    with _safetensors(path) as file:
        entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        forms = {
            name: (tuple(entry.get_shape()), FLOAT_DTYPES.get(entry.get_dtype())) for name, entry in entries.items()
        }

    def load(name: str) -> torch.Tensor:
        with _safetensors(path) as file:  # anew each time: pages that were read stay in memory as long as it is mapped
            return file.get_tensor(name)  # type: ignore[no-any-return]

    return {name: LazyTensor(*form, partial(load, name)) for name, form in forms.items()}


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(f"{path}: not a readable safetensors file ({error}); download it again") from error


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one torch.save file, memory-mapped where its format allows; no code in it is run.

    Raises CorruptCheckpoint, or UnsafeCheckpoint when it holds anything but tensors by name.
    """
    _check_file(path)
    is_zip = zipfile.is_zipfile(path)
    unsafe = UnsafeCheckpoint(
        f"{path}: expected tensors by name, found other Python objects, which are not loaded because they can run "
        "code; use a safetensors version of this checkpoint"
    )
    try:
        content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        if is_zip and isinstance(error, pickle.UnpicklingError):
            raise unsafe from error
        reason = str(error).partition("\n")[0]
        raise CorruptCheckpoint(f"{path}: not a readable torch.save file ({reason}); download it again") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise unsafe

    def lazy(tensor: torch.Tensor) -> LazyTensor:
        dtype = tensor.dtype if tensor.dtype in FLOAT_DTYPES.values() else None
        return LazyTensor(tuple(tensor.shape), dtype, lambda: tensor)

    return {name: lazy(tensor) for name, tensor in content.items()}


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CorruptCheckpoint(f"{path}: missing; the checkpoint is incomplete, download it again")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CorruptCheckpoint(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in that folder")


def iterate_shards(
    paths: Mapping[str, Path], reader: Callable[[Path], dict[str, LazyTensor]]
) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) for a weight map, name -> shard. Raises CorruptCheckpoint when a shard lacks its tensor."""
    shards = {path: reader(path) for path in dict.fromkeys(paths.values())}
    for name, path in paths.items():
        if name not in shards[path]:
            raise CorruptCheckpoint(f"{path}: the index promises {name} in this shard, which does not hold it")
        yield name, shards[path][name]
