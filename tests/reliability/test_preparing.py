"""Jobs that prepare one data folder at the same time, and a rank 0 that cannot prepare it.

Without the lock of ``CIFAR10DataModule.prepare_data`` the archive is asked for more than once. (Four processes
of one job: tests/data/test_cifar10.py.)
"""

import functools
import hashlib
import io
import sys
import tarfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from reliability.jobs import Job
from reliability.preparing import RECORDS

from lit_basics.data.cifar10 import ARCHIVE, CACHE, FILES


class Slow(SimpleHTTPRequestHandler):
    """Counts the requests, and lets the others come while the first is served."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        time.sleep(1)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    path = tmp_path / "mirror" / ARCHIVE
    path.parent.mkdir()
    draws = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as tar:
        for name in FILES:
            records = draws.integers(0, 256, (RECORDS, 3073), np.uint8)
            records[:, 0] %= 10
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = records.nbytes
            tar.addfile(info, io.BytesIO(records.tobytes()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, directory=str(path.parent)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Slow.asked = []
    yield path, f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
    server.shutdown()
    server.server_close()


def job(path, url, folder, run):
    content = path.read_bytes()
    words = [
        *(sys.executable, "-m", "reliability.preparing", hashlib.sha256(content).hexdigest(), str(len(content))),
        *("fit", "--config", "blitz", "--config", "ddp", "--trainer.max_epochs", "1", "--run_dir", str(run)),
        *("--data.data_dir", str(folder), "--data.mirrors", f"[{url}]", "--trainer.enable_progress_bar", "false"),
    ]
    return Job(words, f"{run}.txt")


@pytest.mark.slow
def test_two_jobs_of_two_ranks_download_once(mirror, tmp_path):
    jobs = [job(*mirror, tmp_path / "data", tmp_path / name) for name in ("a", "b")]
    assert [started.process.wait(300) for started in jobs] == [0, 0], [j.output.read_text() for j in jobs]
    assert len(Slow.asked) == 1
    assert [p.name for p in (tmp_path / "data").iterdir() if not p.name.endswith(".lock")] == [CACHE]


@pytest.mark.slow
def test_a_rank_0_that_fails_ends_all_ranks(mirror, tmp_path):
    path, url = mirror
    started = job(path, f"{url}x", tmp_path / "data", tmp_path / "run")  # not there
    started.wait_for(lambda: Slow.asked)
    ranks = started.ranks()
    codes, seconds = started.wait(ranks)
    print(f"\nfailing rank 0: codes {[codes[pid] for pid in ranks]}, {seconds:.1f} s after the request")
    assert codes[ranks[0]] == 2, started.output.read_text()
    assert codes[ranks[1]] != 0
    assert seconds < 10
    assert "cannot be downloaded" in started.output.read_text()
