"""Finds the model file that a name means: a local path, or a file in a Hugging Face Hub repository.

Knows nothing of what is in the file beyond checking its hashes once after a download.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from rcpformat.errors import FormatError, brief
from rcprun.errors import BadModelFile, HubError

SCHEME = "hf://"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FORMS = "use user/repo, hf://user/repo or hf://user/repo/file.rcp"


def resolve(name: str | os.PathLike[str]) -> Path:
    """The local path of a model: `name` itself where that exists, else a Hub file, downloaded when it is not cached.

    Raises BadModelFile for a path that is not there, HubError (saying what to do) for what the Hub does not give.
    """
    path = Path(name)
    text = os.fspath(name)
    try:
        if path.exists():
            return path
    except OSError as error:
        raise BadModelFile(f"{brief(text)}: expected the path of a model file, found: {error.strerror}") from error
    if text.startswith(SCHEME):
        owner, _, rest = text.removeprefix(SCHEME).partition("/")
        repository, _, filename = rest.partition("/")
        if not _REPOSITORY.fullmatch(f"{owner}/{repository}"):
            raise HubError(f"{text}: not the name of a Hub file; {_FORMS}")
        return pull(f"{owner}/{repository}", filename or None)
    if isinstance(name, str) and _REPOSITORY.fullmatch(text) and not text.endswith(".rcp"):
        return pull(text)
    raise BadModelFile(f"{text}: no such file (for a model on the Hub {_FORMS})")


def pull(repository: str, filename: str | None = None) -> Path:
    """The cached path of one `.rcp` file of a Hub repository; without a filename, of the only one there.

    A fresh download has its hashes verified, and is deleted again when they are wrong.
    """
    from huggingface_hub import constants, errors, hf_hub_download, list_repo_files, try_to_load_from_cache

    if not _reachable():
        return _cached_or_fail(repository, filename, f"{constants.ENDPOINT} does not answer")
    try:
        if filename is None:
            filename = only_model(repository, list_repo_files(repository))
        cached = try_to_load_from_cache(repository, filename)
        path = hf_hub_download(repository, filename)
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repository}: access to this repository is gated; accept its licence at "
            f"https://huggingface.co/{repository} and set HF_TOKEN (or run `hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repository}: no such repository on the Hub, or it is private; check the name, and for a private one set "
            "HF_TOKEN (or run `hf auth login`)"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(f"{repository}: the repository has no file {filename!r}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{repository}: not a valid repository name: {error}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # after the kinds above: no network, offline mode, server errors
        return _cached_or_fail(repository, filename, _first_line(error))
    if path != cached:
        verify_download(Path(path))
    return Path(path)


def only_model(repository: str, files: list[str]) -> str:
    """The only `.rcp` file among a repository's files. Raises HubError listing the choice where there is one."""
    models = sorted(file for file in files if file.endswith(".rcp"))
    if not models:
        raise HubError(f"{repository}: the repository holds no .rcp file; convert the model with rcpconv first")
    if len(models) > 1:
        choice = ", ".join(f"{SCHEME}{repository}/{file}" for file in models)
        raise HubError(f"{repository}: the repository holds {len(models)} .rcp files; choose one of {choice}")
    return models[0]


def verify_download(path: Path) -> None:
    """Check every hash in the file; delete it from the cache when one is wrong, so that it is fetched anew."""
    from rcpformat.reader import RcpFile

    try:
        RcpFile.open(path, verify=True)
    except FormatError as error:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise BadModelFile(f"{path.name}: the download is damaged and was deleted; try again: {error}") from error


def _reachable() -> bool:
    """Whether the Hub answers, tried twice: its client retries each request for half a minute before it gives up."""
    from huggingface_hub import constants, get_session

    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception:  # offline mode, or an error of whichever HTTP library the client uses
            continue
        return True
    return False


def _cached_or_fail(repository: str, filename: str | None, reason: str) -> Path:
    """The file in the local cache, when the Hub does not give it. Raises HubError."""
    path = _from_cache(repository, filename)
    if path is None:
        raise HubError(
            f"{repository}: the model is not in the local cache, and the Hub cannot be reached; check the network, "
            f"HF_HUB_OFFLINE and HF_ENDPOINT: {reason}"
        )
    return path


def _from_cache(repository: str, filename: str | None) -> Path | None:
    """The file in the local cache, when the Hub cannot be asked."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if filename is not None:
        found = try_to_load_from_cache(repository, filename)
        return Path(found) if isinstance(found, str) else None
    try:
        folder = Path(snapshot_download(repository, allow_patterns="*.rcp", local_files_only=True))
    except OSError:  # LocalEntryNotFoundError: nothing of this repository is cached
        return None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.rcp")]
    return folder / only_model(repository, files) if files else None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
