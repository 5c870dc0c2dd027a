"""Fetches single files of data sets from the Hugging Face Hub, or from its cache. Knows nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

from rcpconv.errors import DownloadFailed


def fetch(repository: str, file: str) -> Path:
    """A file of a data set: what the cache holds, else a download. Raises DownloadFailed."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError):  # not there, or a cache that cannot be read
        pass
    if not reachable():
        raise DownloadFailed(
            f"{repository}/{file}: not in the cache, and the Hub ({constants.ENDPOINT}) cannot be reached; check the "
            "network, HF_HUB_OFFLINE and HF_ENDPOINT"
        )
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP library's own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DownloadFailed(f"{repository}/{file}: the download failed ({reason}); try again") from error


def reachable() -> bool:
    """Whether the Hub answers, tried twice: its client retries each request for half a minute before it gives up."""
    from huggingface_hub import constants, get_session

    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception:  # offline mode, or an error of whichever HTTP library the client uses
            continue
        return True
    return False
