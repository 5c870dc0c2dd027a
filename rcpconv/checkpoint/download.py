"""Fetches a checkpoint from the Hub: one layout's files and no others. Knows nothing of what is inside them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from rcpconv.checkpoint.hf import read_weight_map
from rcpconv.checkpoint.layout import META, Layout, choose_layout
from rcpconv.errors import AccessDenied, CheckpointNotFound, ConversionError, DownloadFailed

_SMALL_FILES = (
    *("config.json", "generation_config.json", "params.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
)


def download_checkpoint(
    repo_id: str, *, revision: str | None, cache_dir: str | Path | None, check: Callable[[Path, Layout], None]
) -> Path:
    """The snapshot folder of a Hub repository, holding one layout's weights and the small files beside them.

    `check` sees the small files before the weights are fetched, so that a model can be refused early. Without a
    connection, what the cache holds has to do. The folder's name is the commit.
    Raises CheckpointNotFound, AccessDenied, DownloadFailed, and what choose_layout and `check` raise.
    """
    with _explained(repo_id, revision):
        folder = Path(
            snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(_SMALL_FILES))
        )
        commit = folder.name
        try:
            entries = HfApi().list_repo_tree(repo_id, revision=commit, recursive=False)
            sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        except Exception:  # no connection, in the words of whichever HTTP library this release of the client uses
            sizes = {path.name: 0 for path in folder.iterdir()}
        names = [name for name in sizes if "/" not in name]
        layout = choose_layout(names, repo_id)
        check(folder, layout)
        wanted = _weight_files(folder, layout, names)
        _require_room(repo_id, folder, sum(sizes.get(name, 0) for name in wanted if not (folder / name).exists()))
        snapshot_download(repo_id, revision=commit, cache_dir=cache_dir, allow_patterns=wanted)
    return folder


def _require_room(repo_id: str, folder: Path, nbytes: int) -> None:
    """Raises DownloadFailed where the cache's disk has less than nbytes left."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise DownloadFailed(
            f"{repo_id}: its weights take {nbytes:,} bytes of disk, {free:,} are free in {folder}; make room, or set "
            "HF_HOME to a folder on a larger disk"
        )


def _weight_files(folder: Path, layout: Layout, names: list[str]) -> list[str]:
    """The files that hold the weights of a layout, in a repository of these names and a folder of its small files."""
    if layout is META:
        return [name for name in names if name.startswith("consolidated.") and name.endswith(".pth")]
    if layout.index in names:
        return sorted({path.name for path in read_weight_map(folder / layout.index).values()})
    return [layout.single]


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into errors that say what to do."""
    url = f"https://huggingface.co/{repo_id}"
    try:
        yield
    except ConversionError:
        raise
    except GatedRepoError as error:
        raise AccessDenied(
            f"{repo_id}: a gated repository: accept its licence at {url}, then log in with `hf auth login` (or set "
            "HF_TOKEN to a token with read access)"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointNotFound(
            f"{repo_id}: no such repository at {url}, and no local folder of this name; check the spelling. If it is "
            "private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFound(f"{repo_id}: no revision {revision!r}; see the branches and tags at {url}") from error
    except HFValidationError as error:
        raise CheckpointNotFound(f"{repo_id}: neither a folder nor a repository id such as org/name") from error
    except LocalEntryNotFoundError as error:
        raise DownloadFailed(
            f"{repo_id}: the Hub cannot be reached and the cache does not hold this checkpoint; connect (and unset "
            "HF_HUB_OFFLINE), or give a local folder"
        ) from error
    except Exception as error:  # the client's HTTP library changes between releases, and its errors with it
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DownloadFailed(
                f"{repo_id}: no space left on the disk; free some, or set HF_HOME to a folder on a larger one"
            ) from error
        raise DownloadFailed(
            f"{repo_id}: the download failed ({type(error).__name__}: {error}); try again, it resumes where it stopped"
        ) from error
