"""The run folder of a training: its place, name, files, states and lock. Knows nothing of torch or of training.

    rcp-runs/<model>-<YYYYmmdd-HHMMSS>/
        run.json              status (running, finished, failed), model, architecture, quantization, evaluation ...
        recipe.toml           the effective configuration
        tokenizer.json        as it goes into the file
        tokens/               token caches
        metrics.jsonl         one line a logging step
        loss.png              the curve of it
        rotations.safetensors  those that were learned (--rotation-steps)
        checkpoints/          what --resume continues from
        baked.safetensors     finished runs: the tensors of the file
        weights.sha256.json   finished runs: hashes of each linear's fake-quant weights and of each tensor,
                              and that the tensors were decoded and gave those weights

Every file appears whole or not at all (temporary file, fsync, rename), so a run can be killed at any moment.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rcpconv.config import QuantizeConfig
from rcpconv.errors import BadRun, NotSaved, RunNotFound
from rcpconv.scheme import read_scheme
from rcpconv.tensor_file import TensorReader
from rcpformat.architecture import Architecture, Quantization, TokenizerInfo

if TYPE_CHECKING:
    from rcpconv.checkpoint import SourceModel

RUNS_VARIABLE = "RCPCONV_RUNS"
"""Environment variable that names the folder of run folders."""
DEFAULT_RUNS = "rcp-runs"

RUNNING, FINISHED, FAILED = "running", "finished", "failed"

RECORD, RECIPE, TOKENIZER, METRICS, PLOT = "run.json", "recipe.toml", "tokenizer.json", "metrics.jsonl", "loss.png"
CHECKPOINTS = "checkpoints"
ROTATIONS = "rotations.safetensors"
BAKED, WEIGHT_HASHES = "baked.safetensors", "weights.sha256.json"
_LOCK = ".lock"


def runs_root(folder: Path | None = None) -> Path:
    """Where run folders live: the given folder, else $RCPCONV_RUNS, else ./rcp-runs."""
    return folder or Path(os.environ.get(RUNS_VARIABLE) or DEFAULT_RUNS)


def now() -> str:
    """The time in UTC, ISO 8601, to the microsecond: sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def saving(path: Path, remedy: str = "make room, or give yourself the permission to write there") -> Iterator[None]:
    """Turn the system's refusal to write into NotSaved, which names `path` whatever file it was about."""
    try:
        yield
    except BrokenPipeError:  # of the terminal, not of a file
        raise
    except OSError as error:
        raise NotSaved(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`; what the block made of it replaces `path` when it ends without an error.

    It has the usual mode, also where a library writes a new file in its place. Raises NotSaved.
    """
    temporary = unfinished(path)
    with saving(path):
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Where what will be at `path` is written first; a kill leaves it there."""
    return path.with_name(f".{path.name}.tmp")


def copy_file(source: Path, path: Path) -> None:
    """Copy a file, which replaces `path` whole or not at all. Raises NotSaved."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def require_room(path: Path, nbytes: int) -> None:
    """Raises NotSaved where the disk that `path` will be on has less than nbytes left."""
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise NotSaved(f"{path}: needs {nbytes:,} bytes of disk, {free:,} are free in {existing}; make room")


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or leave what was there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """As write_text, for JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _restorable(path: Path) -> Iterator[Path]:
    """Turn what goes wrong with a damaged or missing file of a run into BadRun."""
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise BadRun(f"{path}: cannot be used ({reason}); restore the file or run quantize again") from error


class Run:
    """One run folder. `record` is run.json."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Raises RunNotFound when there is no such run, BadRun when its run.json cannot be read."""
        path = Path(folder) / RECORD
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise RunNotFound(f"{folder}: expected a run folder, found no {RECORD} in it") from None
        except (OSError, ValueError) as error:
            raise BadRun(f"{path}: cannot be read ({error}); delete the run folder or restore the file") from error
        if not isinstance(record, dict) or record.get("status") not in (RUNNING, FINISHED, FAILED):
            raise BadRun(f"{path}: expected an object with a status; delete the run folder or restore the file")
        if missing := sorted({"model", "created"} - record.keys()):
            raise BadRun(f"{path}: expected an entry {missing[0]}; restore the file or run quantize again")
        return cls(Path(folder), record)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def status(self) -> str:
        """running (also after a kill), finished or failed."""
        return str(self.record["status"])

    @cached_property
    def architecture(self) -> Architecture:
        """Of the file: with tied_table and head_matrix resolved."""
        with self._entry("architecture") as value:
            return Architecture.from_json(value)

    @cached_property
    def quantization(self) -> Quantization:
        """Of the file, or a ComparisonQuantization, of which there is no file."""
        with self._entry("quantization") as value:
            return read_scheme(value)

    @cached_property
    def tokenizer(self) -> TokenizerInfo:
        """What generation needs beside tokenizer.json."""
        with self._entry("tokenizer") as value:
            return TokenizerInfo.from_json(value)

    @property
    def tokenizer_json(self) -> bytes:
        """The bytes of tokenizer.json."""
        with _restorable(self.folder / TOKENIZER) as path:
            return path.read_bytes()

    @property
    def generation(self) -> dict[str, float]:
        """Default sampling settings."""
        with self._entry("generation") as value:
            return dict(value)

    @property
    def provenance(self) -> dict[str, Any]:
        """The checkpoint's origin and licence."""
        with self._entry("provenance") as value:
            return dict(value)

    @property
    def evaluation(self) -> dict[str, Any]:
        """Perplexities measured at the end of the training; empty without eval_data."""
        return dict(self.record.get("evaluation") or {})

    @contextmanager
    def _entry(self, key: str) -> Iterator[Any]:
        with _restorable(self.folder / RECORD):
            yield self.record[key]

    @property
    def recipe(self) -> str:
        """The text of recipe.toml."""
        with _restorable(self.folder / RECIPE) as path:
            return path.read_text(encoding="utf-8")

    @cached_property
    def config(self) -> QuantizeConfig:
        """The effective configuration."""
        recipe = self.recipe
        with _restorable(self.folder / RECIPE):
            settings = tomllib.loads(recipe)
        return QuantizeConfig.from_mapping(settings, str(self.folder / RECIPE))

    def require_finished(self) -> None:
        """Raises BadRun when the training has not ended."""
        if self.status != FINISHED:
            raise BadRun(
                f"{self.folder}: its training is not finished (status: {self.status}); "
                f"continue it with: rcpconv quantize --resume {self.folder}"
            )

    def tensor(self, name: str) -> NDArray[np.generic]:
        """A baked tensor by its name in SPEC.md, section 7. Raises BadRun for a run that is not finished."""
        self.require_finished()
        return self.baked(name)

    def baked(self, name: str) -> NDArray[np.generic]:
        """As tensor, also where the run has yet to be called finished."""
        with _restorable(self.folder / BAKED):
            return self._baked.read(name)

    def tensor_names(self) -> list[str]:
        """Names of all baked tensors, sorted; tokenizer.json is not among them."""
        self.require_finished()
        with _restorable(self.folder / BAKED):
            return self._baked.names()

    @cached_property
    def _baked(self) -> TensorReader:
        return TensorReader(self.folder / BAKED)

    @property
    def weight_hashes(self) -> dict[str, str]:
        """Linear layer -> SHA-256 of the weights its training forward used (rcpconv.baking.weight_hashes)."""
        return self._hashes("weights")

    @property
    def tensor_hashes(self) -> dict[str, str]:
        """Name in SPEC.md, section 7 -> SHA-256 of the tensor's bytes when the training ended."""
        return self._hashes("tensors")

    @property
    def decoded(self) -> bool:
        """Whether tensors of those hashes are known to decode to weights of those hashes; not said in older runs."""
        return self._hash_record.get("decoded") is True

    def _hashes(self, kind: str) -> dict[str, str]:
        record = self._hash_record
        with _restorable(self.folder / WEIGHT_HASHES):
            return dict(record[kind])

    @cached_property
    def _hash_record(self) -> dict[str, Any]:
        self.require_finished()
        with _restorable(self.folder / WEIGHT_HASHES) as path:
            return dict(json.loads(path.read_bytes()))

    def source(self) -> SourceModel:
        """The original checkpoint, opened again. Raises ConversionError when it is gone."""
        from rcpconv.checkpoint import load_source

        return load_source(self.record["model"], revision=self.record.get("revision"))

    def delete(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder)

    def update(self, **values: Any) -> None:
        """Set fields of run.json, at once and atomically."""
        self.record = self.record | values
        write_json(self.folder / RECORD, self.record)


def keep_hashes(run: Run, weights: Mapping[str, str], tensors: Mapping[str, str]) -> None:
    """Leave what `weight_hashes` and `tensor_hashes` give, of tensors that were decoded and gave those weights."""
    record = {"decoded": True, "weights": weights, "tensors": dict(sorted(tensors.items()))}
    write_json(run.folder / WEIGHT_HASHES, record)


@contextmanager
def held(folder: Path, shown: Path) -> Iterator[None]:
    """Hold the run folder for this process. Raises BadRun when another process does; ends with this process."""
    with saving(shown):
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadRun(f"{shown}: another process is training in this run folder; wait for it or end it") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within, no other process is within for the same path, which need not be there; waits for those that are.

    Raises NotSaved where its folder cannot be written to.
    """
    with saving(path):
        file = path.with_name(f".{path.name}.lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def locked(run: Run) -> Iterator[Run]:
    """Hold an existing run folder, and read its record again, for it may have changed before the lock was ours."""
    with held(run.folder, run.folder):
        yield Run.open(run.folder)


@contextmanager
def created(folder: Path, record: Mapping[str, Any], recipe: str, tokenizer_json: bytes) -> Iterator[Run]:
    """A new run folder, held: it appears under its name with record, recipe and tokenizer in it.

    Raises BadRun when there is something in its place, NotSaved when it cannot be made.
    """
    nursery = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    run = Run(nursery, dict(record))
    try:
        with saving(folder, _OTHER_PLACE):
            folder.parent.mkdir(parents=True, exist_ok=True)
            nursery.mkdir()
        write_json(nursery / RECORD, run.record)
        write_text(nursery / RECIPE, recipe)
        with replacing(nursery / TOKENIZER) as temporary:
            temporary.write_bytes(tokenizer_json)
    except BaseException:
        shutil.rmtree(nursery, ignore_errors=True)
        raise
    with held(nursery, folder):
        try:
            nursery.rename(folder)
        except OSError as error:
            shutil.rmtree(nursery, ignore_errors=True)
            raise already_there(folder) from error
        sync_folder(folder.parent)
        run.folder = folder
        yield run


_OTHER_PLACE = f"choose another --out, or another folder of runs with --runs or {RUNS_VARIABLE}"


def require_free(folder: Path) -> None:
    """Raises BadRun when there is something in this place, NotSaved when none can be made. Leaves nothing."""
    if os.path.lexists(folder):
        raise already_there(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        with saving(folder, _OTHER_PLACE):
            folder.mkdir(parents=True)
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def already_there(folder: Path) -> BadRun:
    """The error of a run that would take the place of something else."""
    return BadRun(
        f"{folder}: already there, and a run never overwrites; choose another --out, or continue that run "
        f"with --resume {folder}"
    )


def new_run_folder(root: Path, model: str) -> Path:
    """A free folder for a new run: the model's name and the time."""
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(model).name.lower()).strip("-.") or "model"
    stem = f"{slug}-{datetime.now():%Y%m%d-%H%M%S}"
    names = (stem if i == 1 else f"{stem}-{i}" for i in range(1, 1000))
    return next(root / name for name in names if not os.path.lexists(root / name))


def _newest(root: Path, wanted: Callable[[Run], bool], key: str, nothing: str) -> Run:
    runs = []
    for path in sorted(root.glob(f"[!.]*/{RECORD}")):
        try:
            runs.append(Run.open(path.parent))
        except BadRun:
            continue
    chosen = [run for run in runs if wanted(run)]
    if not chosen:
        raise RunNotFound(f"{root}: {nothing} in it (of {len(runs)} runs); {RUNS_VARIABLE} or --runs names the folder")
    return max(chosen, key=lambda run: (run.record.get(key) or "", run.name))


def newest_finished(root: Path) -> Run:
    """The run under `root` that finished last. Raises RunNotFound."""
    return _newest(root, lambda run: run.status == FINISHED, "finished", "no finished run")


def newest_unfinished(root: Path) -> Run:
    """The run under `root` that began last, of those neither finished nor diverged. Raises RunNotFound."""
    return _newest(root, lambda run: run.status == RUNNING, "created", "no unfinished run")
