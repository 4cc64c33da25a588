"""Downloads: mirrors in turn, a broken transfer resumed, no file under its name before it is checked."""

import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from lit_basics.errors import UserError
from lit_basics.files import file_sha256

CHUNK = 1 << 16
MIN_RATE = 1024
"""Bytes a second, measured over ``timeout``; a slower server has stalled."""
MIN_GAIN = 1 << 20
"""Bytes that a broken transfer must have brought for the same mirror to be asked for the rest."""
REPORT_SECONDS = 30.0
"""Time between two lines on the progress."""


def download(urls: Sequence[str], path: str | Path, *, sha256: str, size: int, timeout: float = 30.0) -> None:
    """Make ``path`` the file with this checksum; does nothing if it is that already. One process at a time.

    The file grows as ``<path>.part``, which outlives an interrupted run and is continued by the next, from
    any mirror. It gets its name only after its checksum was found right.

    Args:
        urls: Addresses of the same file (http, https or file), tried in turn.
        path: The file; its folder is made if need be.
        sha256: Checksum of the file, in hexadecimal.
        size: Size of the file in bytes: others are refused at once, and endless ones.
        timeout: Seconds without an answer or data (or with less than 1 KiB a second) after which a mirror is
            given up.

    Raises:
        UserError: If no mirror gave the file; names each with its reason, and a wrong file that is there already.
        OSError: If the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    reasons = []
    if path.exists():
        if file_sha256(path) == sha256:
            return
        reasons.append(f"{path}: wrong checksum")
    for url in urls:
        try:
            _complete(part, url, sha256, size, timeout)
        except _MirrorError as error:
            reasons.append(f"{url}: {error}")
        else:
            os.replace(part, path)
            return
    raise UserError(f"{path.name} cannot be downloaded: {'; '.join(reasons) or 'no mirror is given'}")


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file against other processes and threads; wait for it as long as another holds it.

    Args:
        path: The file; it need not exist, its folder must.

    Raises:
        OSError: If the folder cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _say(f"waiting for another process, which is preparing {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _MirrorError(Exception):
    """Why a mirror did not give the file; the bytes that came so far may be right."""


class _WrongBytesError(_MirrorError):
    """What lies in the partial file is not the beginning of the file."""


def _complete(part: Path, url: str, sha256: str, size: int, timeout: float) -> None:
    """Make ``part`` the whole file, with bytes of one mirror; a wrong file is deleted."""
    # bytes of an earlier run or another mirror: if the whole is wrong, this mirror may be right nevertheless
    inherited = _size(part) > 0
    while True:
        before = _size(part)
        try:
            _extend(part, url, size, timeout)
            if file_sha256(part) != sha256:
                raise _WrongBytesError("wrong checksum")
            return
        except _WrongBytesError:
            part.unlink(missing_ok=True)
            if not inherited:
                raise
            inherited = False
        except _MirrorError:
            if _size(part) - before < MIN_GAIN:
                raise


def _extend(part: Path, url: str, size: int, timeout: float) -> None:
    """Append to ``part`` what the mirror has beyond it; of one that sends all, what comes before is passed over."""
    start = _size(part)
    if start and start == size:
        return
    response = _open(url, start, timeout)
    if response is None:
        return
    with response:
        length = response.headers.get("Content-Length") or ""
        total = int(length) if length.isdigit() else size
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT  # None of a file
        if resumed:
            content_range = response.headers.get("Content-Range") or ""
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
            if match is None or int(match[1]) != start:
                raise _WrongBytesError("sent another range than it was asked for")
            total = int(match[2]) if match[2].isdigit() else size
        if total != size:
            raise _MirrorError(f"has {total} bytes, not {size}")
        _say(f"downloading {url}" + (f", from {_megabytes(start, size)} on" if resumed else ""))
        report = time.monotonic() + REPORT_SECONDS
        known = 0 if resumed else start
        with part.open("ab") as file:
            for chunk in _chunks(response, timeout):
                file.write(chunk[known:])
                known = max(0, known - len(chunk))
                if file.tell() > size:
                    raise _WrongBytesError(f"has more than {size} bytes")
                if time.monotonic() > report:
                    _say(f"downloaded {_megabytes(file.tell(), size)}")
                    report = time.monotonic() + REPORT_SECONDS
            file.flush()
            os.fsync(file.fileno())
            if known:
                raise _MirrorError("sent less than what is there already")
            if file.tell() < size:
                raise _MirrorError(f"broke off after {file.tell()} of {size} bytes")


def _open(url: str, start: int, timeout: float) -> Any:
    """Return the response from byte ``start`` on, or None if the server has nothing beyond it."""
    if not url.lower().startswith(("http://", "https://", "file://")):
        raise _MirrorError("not an http, https or file address")
    headers = {"User-Agent": "lit_basics"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _MirrorError(_reason(error, timeout)) from error


def _chunks(response: Any, timeout: float) -> Iterator[bytes]:
    """Yield the body as it comes."""
    since, received = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _MirrorError(_reason(error, timeout)) from error
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        # a socket's timeout starts anew with each byte: a server that drips would hold us for ever
        if (seconds := time.monotonic() - since) > timeout:
            if received < MIN_RATE * seconds:
                raise _MirrorError(f"stalled: {received} bytes in {seconds:.0f} s")
            since, received = time.monotonic(), 0


def _reason(error: Exception, timeout: float) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer for {timeout:g} s"
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return str(text).splitlines()[0][:100]


def _say(text: str) -> None:
    rank_zero_only(print)(text, file=sys.stderr)  # no logging, which the command line silences


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _megabytes(count: int, total: int) -> str:
    return f"{count / 1e6:.1f} of {total / 1e6:.1f} MB"
