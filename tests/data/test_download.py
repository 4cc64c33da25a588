import hashlib
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lit_basics.data import download as module
from lit_basics.data.download import download, file_lock
from lit_basics.errors import UserError
from lit_basics.running import quiet

CONTENT = random.Random(0).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)
HALF = SIZE // 2


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


class Request(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])
        self.server.ranges.append(self.headers.get("Range"))
        self.server.behaviour(self)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, content: bytes) -> None:
        self.server.sent += self.connection.send(content) if len(content) < 2 else self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, behaviour: Callable[[Request], None]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.behaviour, self.ranges, self.sent = behaviour, [], 0
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/file"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *args: object) -> None:
        pass  # clients that hang up are what is tested


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Request], None]], Server]]:
    servers = []

    def start(behaviour: Callable[[Request], None]) -> Server:
        servers.append(Server(behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def honest(request: Request) -> None:
    start = request.start
    if start >= SIZE:
        request.head(416, Content_Range=f"bytes */{SIZE}")
    elif start:
        request.head(206, Content_Length=SIZE - start, Content_Range=f"bytes {start}-{SIZE - 1}/{SIZE}")
        request.body(CONTENT[start:])
    else:
        ignoring_range(request)


def ignoring_range(request: Request) -> None:
    request.head(200, Content_Length=SIZE)
    request.body(CONTENT)


def lying(request: Request) -> None:
    request.head(200, Content_Length=SIZE)
    request.body(bytes(SIZE))


def lying_and_truncating(request: Request) -> None:
    request.head(200, Content_Length=SIZE)
    request.body(bytes(HALF))


def truncating(request: Request) -> None:
    """Drop the connection after half of the file's size."""
    start = request.start
    if start:
        request.head(206, Content_Length=SIZE - start, Content_Range=f"bytes {start}-{SIZE - 1}/{SIZE}")
    else:
        request.head(200, Content_Length=SIZE)
    request.body(CONTENT[start : start + HALF])


def in_pieces(request: Request) -> None:
    start, end = request.start, min(request.start + 30_000, SIZE)
    request.head(206, Content_Length=end - start, Content_Range=f"bytes {start}-{end - 1}/{SIZE}")
    request.body(CONTENT[start:end])


def wrong_range(request: Request) -> None:
    if not request.start:
        ignoring_range(request)
        return
    request.head(206, Content_Length=SIZE, Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}")
    request.body(CONTENT)


def shifted(request: Request) -> None:
    request.head(206, Content_Length=SIZE - 5, Content_Range=f"bytes 5-{SIZE - 1}/{SIZE}")
    request.body(CONTENT[5:])


def silent(request: Request) -> None:
    request.server.over.wait(5)


def stalling(request: Request) -> None:
    request.head(200, Content_Length=SIZE)
    request.body(CONTENT[:HALF])
    request.server.over.wait(5)


def dripping(request: Request) -> None:
    request.head(200, Content_Length=SIZE)
    for number in range(HALF):
        request.body(CONTENT[number : number + 1])
        if request.server.over.wait(0.02):
            return


def endless(request: Request) -> None:
    request.head(200)
    while not request.server.over.is_set():
        request.body(CONTENT)


def portal(request: Request) -> None:
    request.head(200, Content_Length=6)
    request.body(b"log in")


def portal_without_length(request: Request) -> None:
    request.head(200)
    request.body(b"please log in")


def breaking_off_without_range(request: Request) -> None:
    request.head(200, Content_Length=SIZE)
    request.body(CONTENT[: HALF // 2])


def missing(request: Request) -> None:
    request.send_error(404)


def dead_url() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/file"


def fetch(path: Path, *urls: str, timeout: float = 10.0) -> None:
    download(urls, path, sha256=SHA256, size=SIZE, timeout=timeout)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file"


@pytest.fixture
def part(path: Path) -> Path:
    path.parent.mkdir()
    return path.with_name("file.part")


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if not file.name.endswith(".lock"))


def test_downloads_once(serve, path):
    server = serve(honest)
    fetch(path, server.url)
    fetch(path, server.url)
    assert path.read_bytes() == CONTENT
    assert files(path) == ["file"]
    assert server.ranges == [None]


def test_replaces_a_damaged_file(serve, path, part):
    path.write_bytes(CONTENT[:HALF])
    fetch(path, serve(honest).url)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "reason", "timeout", "longer"),
    [
        (silent, "no answer for 0.2 s", 0.2, 2.0),
        (stalling, "no answer for 0.2 s", 0.2, 2.0),
        (dripping, r"stalled: \d+ bytes in \d+ s", 1.0, 2.0),
        (missing, "HTTP 404 Not Found", 10.0, 10.0),
        (portal, f"has 6 bytes, not {SIZE}", 10.0, 10.0),
        (endless, f"has more than {SIZE} bytes", 10.0, 10.0),
        (truncating, f"broke off after {HALF} of {SIZE} bytes", 10.0, 10.0),
        (shifted, "sent another range than it was asked for", 10.0, 10.0),
        (lying, "wrong checksum", 10.0, 10.0),
    ],
)
def test_a_bad_mirror_is_named_and_the_next_one_is_used(serve, path, behaviour, reason, timeout, longer):
    """The time that a mirror has is short only where the test waits for its end."""
    bad, good = serve(behaviour), serve(honest)
    with pytest.raises(UserError, match=f"file cannot be downloaded: {bad.url}: {reason}$"):
        fetch(path, bad.url, timeout=timeout)
    assert not path.exists()
    fetch(path, bad.url, good.url, timeout=longer)
    assert path.read_bytes() == CONTENT
    assert files(path) == ["file"]


def test_dead_mirrors_are_all_named_in_one_line(path):
    first, second = dead_url(), dead_url()
    with pytest.raises(UserError) as caught:
        fetch(path, first, second)
    assert str(caught.value) == (
        f"file cannot be downloaded: {first}: Connection refused; {second}: Connection refused"
    )


def test_a_wrong_file_that_is_there_is_named(path, part):
    """It may have been put there by hand, as the message advises."""
    path.write_bytes(CONTENT[:HALF])
    with pytest.raises(UserError) as caught:
        fetch(path, url := dead_url())
    assert str(caught.value) == f"file cannot be downloaded: {path}: wrong checksum; {url}: Connection refused"
    assert path.read_bytes() == CONTENT[:HALF]


def test_no_mirror(path):
    with pytest.raises(UserError, match="no mirror is given"):
        fetch(path)


def test_resumes_at_the_next_mirror(serve, path):
    bad, good = serve(truncating), serve(honest)
    fetch(path, bad.url, good.url)
    assert path.read_bytes() == CONTENT
    assert good.ranges == [f"bytes={HALF}-"]
    assert good.sent == SIZE - HALF


def test_resumes_in_the_next_run(serve, path):
    good = serve(honest)
    with pytest.raises(UserError, match="broke off"):
        fetch(path, serve(truncating).url)
    assert files(path) == ["file.part"]
    fetch(path, good.url)
    assert path.read_bytes() == CONTENT
    assert good.ranges == [f"bytes={HALF}-"]


@pytest.mark.parametrize("behaviour", [truncating, in_pieces])
def test_the_same_mirror_is_asked_again_while_it_brings_much(serve, path, monkeypatch, behaviour):
    monkeypatch.setattr(module, "MIN_GAIN", 1)
    server = serve(behaviour)
    fetch(path, server.url)
    assert path.read_bytes() == CONTENT
    assert server.sent == SIZE
    assert len(server.ranges) > 1


def test_a_liar_deletes_its_bytes(serve, path):
    with pytest.raises(UserError, match="wrong checksum"):
        fetch(path, serve(lying).url)
    assert files(path) == []


def test_a_liars_half_is_not_held_against_the_next_mirror(serve, path):
    liar, good = serve(lying_and_truncating), serve(honest)
    fetch(path, liar.url, good.url)
    assert path.read_bytes() == CONTENT
    assert good.ranges == [f"bytes={HALF}-", None]


def test_a_liar_is_not_asked_for_ever(serve, path, part, monkeypatch):
    monkeypatch.setattr(module, "MIN_GAIN", 1)
    part.write_bytes(bytes(HALF))
    server = serve(lying)
    with pytest.raises(UserError, match="wrong checksum"):
        fetch(path, server.url)
    assert len(server.ranges) == 2


@pytest.mark.parametrize(("behaviour", "later"), [(ignoring_range, []), (wrong_range, [None])])
def test_a_server_that_cannot_resume_starts_anew(serve, path, part, behaviour, later):
    part.write_bytes(CONTENT[:HALF])
    server = serve(behaviour)
    fetch(path, server.url)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [f"bytes={HALF}-", *later]


@pytest.mark.parametrize(
    ("beginning", "requests"),
    [(CONTENT, 1), (bytes(SIZE), 2), (CONTENT + b"more", 2)],
)
def test_nothing_is_left_to_send(serve, path, part, beginning, requests):
    part.write_bytes(beginning)
    server = serve(honest)
    fetch(path, server.url)
    assert path.read_bytes() == CONTENT
    complete_by_size = len(beginning) == SIZE
    assert len(server.ranges) == requests - complete_by_size


@pytest.mark.parametrize("bad", [portal, portal_without_length, breaking_off_without_range])
def test_another_answer_does_not_cost_the_partial_file(serve, path, part, bad):
    """Written anew at a 200, half of the file would be gone."""
    part.write_bytes(CONTENT[:HALF])
    good = serve(honest)
    fetch(path, serve(bad).url, good.url)
    assert path.read_bytes() == CONTENT
    assert good.ranges == [f"bytes={HALF}-"]


def test_a_download_is_told_of_though_logging_is_silent(serve, path, capsys):
    """The command line silences Lightning's logging: a long download would say nothing."""
    quiet()
    fetch(path, serve(honest).url)
    assert re.fullmatch(r"downloading http://127.0.0.1:\d+/file\n", capsys.readouterr().err)


def test_file_address(tmp_path, path, part):
    part.write_bytes(CONTENT[:HALF])
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    fetch(path, (tmp_path / "nowhere").as_uri(), source.as_uri())
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://127.0.0.1/file", "not an http, https or file address"),
        ("data:,text", "not an http, https or file address"),
        ("http://[1/file", "Invalid IPv6 URL"),
        ("file:///nowhere", "No such file or directory"),
    ],
)
def test_bad_address(path, url, reason):
    with pytest.raises(UserError, match=re.escape(f"{url}: {reason}")):
        fetch(path, url)


def test_a_folder_that_cannot_be_written(serve, tmp_path):
    (tmp_path / "text").touch()
    with pytest.raises(FileExistsError):
        fetch(tmp_path / "text" / "file", serve(honest).url)


def test_a_full_disk_is_not_the_mirrors_fault(serve, path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(path, serve(honest).url)


def test_waits_for_the_lock(tmp_path):
    def locked():
        with file_lock(tmp_path / "file"):
            return done

    done = False
    with ThreadPoolExecutor(1) as pool:
        with file_lock(tmp_path / "file"):
            waiting = pool.submit(locked)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            done = True
        assert waiting.result()
