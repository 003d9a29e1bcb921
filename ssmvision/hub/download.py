"""Fetching official weight files: checked by content, retried within bounds, cached, usable offline."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import random
import re
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import tqdm

__all__ = ["DownloadError", "fetch_from_hub", "fetch_url", "file_sha256"]

_logger = logging.getLogger(__name__)

TRIES = 5
RETRIED_STATUSES = (500, 502, 503, 504)
BACKOFF_SECONDS = 0.5
TIMEOUT_SECONDS = 20.0
_CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """A weight file could not be fetched, or what came is not what was published."""


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_from_hub(
    repo_id: str, filename: str, *, sha256: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Fetch one file of a Hub repository into the Hub cache and check its bytes, on cached loads too.

    Args:
        repo_id: `owner/name`, or `owner/name@revision`.
        filename: path of the file inside the repository.
        sha256: expected digest; by default the one under which the Hub stores a large file.
        cache_dir: Hub cache folder to use instead of the default one.
    """
    repo, _, revision = repo_id.partition("@")
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    _warn_if_insecure(endpoint)

    def fetch() -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                repo, filename, revision=revision or None, cache_dir=cache_dir, endpoint=endpoint
            )
        )

    label = f"{repo_id}/{filename}"
    return _verified(lambda: _retried(fetch, label), lambda path: sha256 or _blob_sha256(path), label)


def fetch_url(url: str, *, sha256: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Fetch a file from a plain url into torch's checkpoint folder and check its bytes, on cached loads too.

    Without a known digest, the one of the first download is kept beside the file and checked from then on.

    Args:
        url: http or https address, with `#` in it escaped as `%23`.
        sha256: expected digest.
        cache_dir: folder to use instead of torch's checkpoint folder.
    """
    parts = urlsplit(url)
    filename = Path(unquote(parts.path)).name
    if parts.scheme not in ("http", "https") or not filename:
        raise DownloadError(f"{url} is no http(s) address of a file.")
    _warn_if_insecure(url)
    root = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    # One folder per url: two releases may well use one file name.
    path = root / "ssmvision" / hashlib.sha256(url.encode()).hexdigest()[:16] / filename

    def fetch() -> Path:
        return path if path.is_file() else _retried(lambda: _download(url, path), url)

    return _verified(fetch, lambda path: sha256 or _recorded_sha256(path), url)


def _verified(fetch: Callable[[], Path], expected: Callable[[Path], str | None], label: str) -> Path:
    for _ in range(2):
        path = fetch()
        want, have = expected(path), file_sha256(path)
        if want is None or have == want.lower():
            return path
        _discard(path, label)
        _logger.warning("%s had sha256 %s instead of %s and was removed from the cache", label, have, want)
    raise DownloadError(f"{label} has sha256 {have}, not the published {want}, twice in a row; the file was removed.")


def _discard(path: Path, label: str) -> None:
    try:
        for doomed in {path.resolve(), path, _record(path)}:
            doomed.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadError(f"{label} is damaged in the cache and cannot be removed ({error}).") from error


def _blob_sha256(path: Path) -> str | None:
    # The Hub cache names blobs by etag, which is the sha256 for large files and a git hash for small ones.
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded_sha256(path: Path) -> str | None:
    record = _record(path)
    found = re.match("[0-9a-f]{64}", record.read_text()) if record.is_file() else None
    return found and found.group()


def _download(url: str, path: Path) -> Path:
    """Stream to a temporary file beside the target, so that a cut never leaves half a checkpoint under its name."""
    if constants.HF_HUB_OFFLINE:
        raise errors.OfflineModeIsEnabled(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.incomplete")
    try:
        with partial.open("wb") as file:
            digest = _stream(url, file.write)
        # The record first: a file without one would never be checked.
        _record(path).write_text(f"{digest}  {path.name}\n")
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stream(url: str, write: Callable[[bytes], int]) -> str:
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=unquote(url).rpartition("/")[2]) as progress:
            while chunk := response.read(_CHUNK):
                digest.update(chunk)
                write(chunk)
                done += len(chunk)
                progress.update(len(chunk))
    if size and done != size:
        raise http.client.IncompleteRead(b"", size - done)
    return digest.hexdigest()


def _retried(fetch: Callable[[], Path], label: str) -> Path:
    """Call `fetch`, again after faults that pass by themselves; turn what remains into one sentence."""
    for attempt in range(1, TRIES + 1):
        try:
            return fetch()
        except (OSError, ValueError, http.client.HTTPException, errors.HTTPError) as error:
            if not _passes_by_itself(error):
                raise DownloadError(_explain(error, label)) from error
            if attempt == TRIES:
                raise DownloadError(f"{label} failed {TRIES} times, last with: {_reason(error)}.") from error
            pause = BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            _logger.warning("%s: %s; trying again in %.1f s", label, _reason(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _passes_by_itself(error: Exception) -> bool:
    if isinstance(error, (errors.HfHubHTTPError, urllib.error.HTTPError)):
        return _status(error) in RETRIED_STATUSES
    if isinstance(error, urllib.error.URLError):
        return isinstance(error.reason, (ConnectionResetError, TimeoutError))
    cut = (errors.HTTPError, http.client.HTTPException, ConnectionResetError, TimeoutError)
    return isinstance(error, cut) or "Consistency check failed" in str(error)


def _status(error: errors.HfHubHTTPError | urllib.error.HTTPError) -> int:
    return error.code if isinstance(error, urllib.error.HTTPError) else error.response.status_code


def _reason(error: Exception) -> str:
    if isinstance(error, (errors.HfHubHTTPError, urllib.error.HTTPError)):
        return f"HTTP status {_status(error)}"
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0].rstrip(".: ")


def _explain(error: Exception, label: str) -> str:
    owner_and_name = "/".join(label.split("/")[:2]).partition("@")[0]
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{owner_and_name}"
        return f"{label} is gated: ask for access at {page} and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{label}: there is no public repository {owner_and_name} (if it is private, run `hf auth login`)."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{label}: the repository has no such revision."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{label}: the repository {owner_and_name} has no such file."
    if constants.HF_HUB_OFFLINE and isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return f"{label} is not in the cache and HF_HUB_OFFLINE is set; load it once while online{_by_hand(error)}."
    if isinstance(error, (errors.LocalEntryNotFoundError, urllib.error.URLError)) and not hasattr(error, "code"):
        return f"{label} is not in the cache and its server cannot be reached; load it once while online."
    return f"{label} cannot be downloaded: {_reason(error)}."


def _by_hand(error: Exception) -> str:
    return f", or put the file at {error}" if isinstance(error, errors.OfflineModeIsEnabled) else ""


@lru_cache
def _warn_if_insecure(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        warnings.warn(f"weights come over an unencrypted connection, {parts.scheme}://{parts.hostname}", stacklevel=4)
