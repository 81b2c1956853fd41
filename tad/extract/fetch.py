"""Checkpoints from the network into a folder of this machine: resumed where the server can, whole or not there at all,
and the same file for ever.

The SHA-256 of a file is recorded beside it (``FILE.json``) when it is first used, and compared on every later use;
where the file's name bears the first digits of its hash, these are compared too. What is on the way lies in
``FILE.partial`` with the address and the version that the server told (``FILE.partial.json``), so that parts of two
versions are never joined. Downloads go through urllib, not ``torch.hub.download_url_to_file``, which begins anew every
time; like it, urllib takes proxies from the environment (``https_proxy``, ``no_proxy``).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tad._version import __version__
from tad.errors import RecipeError, WeightsError, did_you_mean
from tad.extract.published import PUBLISHED, hash_in
from tad.extract.weights import sha256_of
from tad.progress import ProgressFactory, silent

WAITS_S = (0.0, 1.0, 3.0)  # before each attempt
TIMEOUT_S = 60.0  # without a byte
CHUNK = 1 << 20
SCHEMES = ("http", "https", "file")
ELSEWHERE = "Weights are kept elsewhere with TAD_WEIGHTS=FOLDER"
TRANSIENT = (408, 416, 425, 429, 500, 502, 503, 504)  # statuses after which another attempt may do better


def weights_folder(folder: str | Path | None = None) -> Path:
    """``folder``, else ``$TAD_WEIGHTS``, else ``tad`` in torch.hub's folder."""
    chosen = folder or os.environ.get("TAD_WEIGHTS")
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir()) / "tad"


def place_of(name_or_url: str, folder: str | Path | None = None) -> Path:
    """Where the file of a name of ``PUBLISHED``, or of an address, is kept; it need not be there yet.

    Raises
    ------
    RecipeError : neither a name nor an address.
    """
    if name_or_url in PUBLISHED:
        return weights_folder(folder) / name_or_url / PUBLISHED[name_or_url].file
    parts = urllib.parse.urlsplit(name_or_url)
    if parts.scheme not in SCHEMES:
        raise RecipeError(
            f"'{name_or_url}' is neither an address ({', '.join(SCHEMES)}) nor the name of published weights."
            f"{did_you_mean(name_or_url, PUBLISHED)}"
        )
    file = re.sub(r"[^\w.+=-]", "_", urllib.parse.unquote(parts.path).rsplit("/", 1)[-1]).lstrip(".") or "weights"
    return weights_folder(folder) / f"url-{hashlib.sha256(name_or_url.encode()).hexdigest()[:12]}" / file


def fetched(name_or_url: str, folder: str | Path | None = None) -> Path | None:
    """The file if it is there already; the network is not asked, and the hash is not compared."""
    path = place_of(name_or_url, folder)
    return path if path.is_file() else None


def fetch(
    name_or_url: str,
    *,
    folder: str | Path | None = None,
    source: str | Path | None = None,
    progress: ProgressFactory = silent,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The file of a name of ``PUBLISHED``, or of an address, verified; downloaded where it is not there yet.

    Parameters
    ----------
    folder : where files are kept, see :func:`weights_folder`.
    source : copy this file instead of downloading, one that was got by hand.
    say : told the licence when a file is fetched, and what else a reader should know; default: stderr.

    Raises
    ------
    RecipeError : neither a name nor an address.
    WeightsError : no address is known, the server cannot be reached or refuses, what came is no checkpoint, or the
    file is another one than its name or the record says.
    """
    say = say or _stderr
    path = place_of(name_or_url, folder)
    if source is None and path.is_file():
        verify(path)
        return path
    entry = PUBLISHED.get(name_or_url)
    urls = (name_or_url,) if entry is None else entry.urls
    by_hand = f"tad weights fetch {name_or_url} --from FILE"
    if source is None and entry is not None and not urls:
        raise WeightsError(f"{name_or_url} has no address to fetch from. {entry.by_hand}; then say: {by_hand}")
    _make_folder(path.parent)
    with _locked(path, say):
        if source is None and path.is_file():  # another process was faster
            verify(path)
            return path
        if entry is not None:
            say(f"{name_or_url}: licence {entry.licence}{', NOT FOR COMMERCIAL USE' if entry.noncommercial else ''}")
        if source is not None:
            return _adopt(Path(source).expanduser(), path)
        failures = []
        for url in urls:
            try:
                return _download(url, path, label=name_or_url if entry else path.name, progress=progress)
            except _Failed as failure:
                failures.append(f"{url}: {failure}")
    raise WeightsError(
        f"{name_or_url} could not be fetched. {'; '.join(failures)}. Try again (what has come is kept), or get the "
        f"file by hand and say: {by_hand} (it is kept as {path})"
    )


def verify(path: Path) -> str:
    """Hex SHA-256 of a kept file, recorded when there is no record yet.

    Raises
    ------
    WeightsError : it is not the file that was recorded, or not that of its name.
    """
    sha256 = sha256_of(path)
    _compare(sha256, path, what=str(path), remedy=f"delete {path} and fetch it again")
    if _record(path) is None:
        _write_json(_beside(path, ".json"), {"url": None, "sha256": sha256, "bytes": path.stat().st_size})
    return sha256


def _compare(sha256: str, path: Path, *, what: str, remedy: str) -> None:
    """Raise :class:`WeightsError` unless the hash is the one in the name of ``path`` and in its record."""
    prefix = hash_in(path.name)
    if prefix is not None and not sha256.startswith(prefix):
        raise WeightsError(
            f"{what} is damaged or another file: its sha256 is {sha256}, the name says that it begins with {prefix}; "
            f"{remedy}"
        )
    record = _record(path)
    if record is not None and record["sha256"] != sha256:
        raise WeightsError(
            f"{what} is another file than at its first use: its sha256 is {sha256}, recorded was {record['sha256']}; "
            f"{remedy}, or delete {_beside(path, '.json')} if the new file is meant"
        )


def _record(path: Path) -> dict[str, Any] | None:
    file = _beside(path, ".json")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"the record {file} cannot be read ({error}); delete it to have it made anew") from error
    if not (isinstance(record, dict) and re.fullmatch(r"[0-9a-f]{64}", str(record.get("sha256")))):
        raise WeightsError(f"the record {file} holds no sha256; delete it to have it made anew")
    return record


# ---- getting a file --------------------------------------------------------------------------------------------------


class _Failed(Exception):
    """An attempt that came to nothing; ``final`` where another one would not do better."""

    def __init__(self, why: str, *, final: bool = False) -> None:
        super().__init__(why)
        self.final = final


def _download(url: str, path: Path, *, label: str, progress: ProgressFactory) -> Path:
    if urllib.parse.urlsplit(url).scheme not in SCHEMES:
        raise WeightsError(f"{url} is no address of {', '.join(SCHEMES)}")
    for attempt, wait_s in enumerate(WAITS_S, 1):
        time.sleep(wait_s)
        try:
            _attempt(url, path, label=label, progress=progress)
            break
        except _Failed as failure:
            if failure.final or attempt == len(WAITS_S):
                raise
    partial = _beside(path, ".partial")
    with partial.open("rb") as file:
        if file.read(512).lstrip().lower().startswith((b"<!doctype", b"<html")):
            _drop(path)
            raise _Failed("the server sent a web page instead of the file", final=True)
    return _keep(partial, path, url=url, what=f"what {url} sent")


def _attempt(url: str, path: Path, *, label: str, progress: ProgressFactory) -> None:
    """Bring ``path``'s ``.partial`` to its full length, beginning where it ends if the server has the same version."""
    partial, mark = _beside(path, ".partial"), _beside(path, ".partial.json")
    have, version = _begun(url, path)
    headers = {"User-Agent": f"tad/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version["etag"] or version["modified"]}
    try:
        opener = urllib.request.build_opener()  # proxies as the environment says now
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            _drop(path)
        raise _Failed(f"the server answered {error.code} {error.reason}", final=error.code not in TRANSIENT) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        final = url.startswith("file:") or isinstance(error, ValueError)
        raise _Failed(f"no connection ({reason})", final=final) from error
    with response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Failed(f"the server sent it packed ({response.headers['Content-Encoding']})", final=True)
        now = {"url": url, "etag": response.headers.get("ETag"), "modified": response.headers.get("Last-Modified")}
        if response.status == 206:
            start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            key = "etag" if version["etag"] else "modified"
            if start is None or int(start[1]) != have or now[key] not in (None, version[key]):
                _drop(path)
                raise _Failed("the file has changed on the server since the first part of it came")
        else:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdigit() else None
        try:
            with partial.open("r+b" if have else "wb") as file:
                file.seek(have)
                file.truncate()
                _write_json(mark, now)
                have += _copy(response, file, have, total, label=label, progress=progress)
                os.fsync(file.fileno())
        except OSError as error:
            raise WeightsError(
                f"{partial} cannot be written: {error.strerror or error}. Make room there. {ELSEWHERE}"
            ) from error
    if total is not None and have != total:
        raise _Failed(f"the connection ended after {have} of {total} bytes")


def _copy(response: Any, file: Any, begun: int, total: int | None, *, label: str, progress: ProgressFactory) -> int:
    """Write the rest of the body; the number of bytes. What came before the connection broke is written too."""
    count = 0
    with progress((total or 0) / CHUNK, label, "MiB") as bar:
        bar.advance(begun / CHUNK)
        while True:
            try:
                chunk = response.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Failed(f"the connection broke after {begun + count} bytes ({error})") from error
            if not chunk:
                return count
            file.write(chunk)
            count += len(chunk)
            bar.advance(len(chunk) / CHUNK)


def _begun(url: str, path: Path) -> tuple[int, dict[str, Any]]:
    """Bytes that came before, and the version they are of; (0, {}) where they cannot be told to be of this version."""
    try:
        version = json.loads(_beside(path, ".partial.json").read_text(encoding="utf-8"))
        have = _beside(path, ".partial").stat().st_size
    except (OSError, ValueError):
        return 0, {}
    if not isinstance(version, dict) or version.get("url") != url:
        return 0, {}
    if str(version.get("etag") or "").startswith("W/"):  # a weak tag does not promise the same bytes
        version["etag"] = None
    return (have, version) if version.get("etag") or version.get("modified") else (0, {})


def _adopt(source: Path, path: Path) -> Path:
    """Copy a file that was got by hand to where it is kept."""
    if not source.is_file():
        raise WeightsError(f"{source} is no file: --from takes the checkpoint that was got by hand")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".copy")
    try:
        with open(handle, "wb") as file, source.open("rb") as original:
            shutil.copyfileobj(original, file, CHUNK)
            file.flush()
            os.fsync(file.fileno())
        return _keep(Path(temporary), path, url=None, what=str(source))
    except OSError as error:
        raise WeightsError(f"{source} cannot be copied to {path}: {error.strerror or error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _keep(whole: Path, path: Path, *, url: str | None, what: str) -> Path:
    """Give a whole file its name, if it is the one that was expected."""
    with whole.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        _compare(sha256, path, what=what, remedy="it was not kept; try again")
    except WeightsError:
        for useless in (whole, _beside(whole, ".json")):
            useless.unlink(missing_ok=True)
        raise
    if _record(path) is None:
        _write_json(_beside(path, ".json"), {"url": url, "sha256": sha256, "bytes": whole.stat().st_size})
    os.replace(whole, path)
    _drop(path)
    return path


def _drop(path: Path) -> None:
    for suffix in (".partial", ".partial.json"):
        _beside(path, suffix).unlink(missing_ok=True)


# ---- files -----------------------------------------------------------------------------------------------------------


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be made: {error.strerror or error}. {ELSEWHERE}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomic: readers see the old content or the new one."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".json")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror or error}. {ELSEWHERE}") from error


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time fetches a file; the others wait, and then find it. A killed one leaves no lock behind."""
    try:
        import fcntl
    except ImportError as error:
        raise WeightsError(
            f"{path} cannot be fetched here: this platform has no fcntl locks. Get the file by hand and give it as FILE"
        ) from error
    lock = _beside(path, ".lock")
    try:
        file = lock.open("a")
    except OSError as error:
        raise WeightsError(f"{lock} cannot be made: {error.strerror or error}. {ELSEWHERE}") from error
    with file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process fetches {path.name}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise WeightsError(f"{lock} cannot be locked: {error.strerror or error}. {ELSEWHERE}") from error
        yield


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
