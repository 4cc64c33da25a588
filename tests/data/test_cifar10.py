import functools
import hashlib
import io
import multiprocessing
import os
import pickle
import random
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_basics.data import cifar10
from lit_basics.data.cifar10 import ARCHIVE, CACHE, CIFAR10DataModule, read_archive, read_cache
from lit_basics.errors import UserError

RECORDS = 20
FOLDER = "cifar-10-batches-bin"
Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture(autouse=True)
def few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "RECORDS", RECORDS)
    monkeypatch.setenv("no_proxy", "*")


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(f"{FOLDER}/{name}")
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def records(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (RECORDS, 3073), np.uint8)
    table[:, 0] = rng.integers(0, 10, RECORDS)
    return table


def genuine() -> dict[str, Member]:
    """The members of the archive, in its own order and with the files that come along."""
    members = [
        member("", kind=tarfile.DIRTYPE),
        member("data_batch_1.bin", records(1).tobytes()),
        member("batches.meta.txt", b"airplane\n"),
        *(member(f"data_batch_{number}.bin", records(number).tobytes()) for number in (3, 4, 5, 2)),
        member("readme.html", b"<html>"),
        member("test_batch.bin", records(6).tobytes()),
    ]
    return {info.name.removeprefix(f"{FOLDER}/"): (info, content) for info, content in members}


def pack(path: Path, members: dict[str, Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members.values():
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Make an archive the genuine one; return its address."""

    def trust(archive: Path) -> str:
        content = archive.read_bytes()
        monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(cifar10, "ARCHIVE_SIZE", len(content))
        return archive.as_uri()

    return trust


@pytest.fixture
def url(tmp_path: Path, trust: Callable[[Path], str]) -> str:
    return trust(pack(tmp_path / "mirror" / ARCHIVE, genuine()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "root" / "data"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def module(folder: Path, *mirrors: str) -> CIFAR10DataModule:
    return CIFAR10DataModule(str(folder), mirrors=mirrors, timeout=10, batch_size=10)


def test_arrays_are_the_records_in_order(folder, url):
    data = module(folder, url)
    data.prepare_data()
    x_train, y_train, x_test, y_test = data.load()
    table = torch.from_numpy(np.concatenate([records(number) for number in range(1, 6)]))
    assert torch.equal(x_train, table[:, 1:].reshape(-1, 3, 32, 32))
    assert torch.equal(y_train, table[:, 0].long())
    assert torch.equal(x_test, torch.from_numpy(records(6)[:, 1:].reshape(-1, 3, 32, 32)))
    assert torch.equal(y_test, torch.from_numpy(records(6)[:, 0]).long())
    assert (x_train.dtype, y_train.dtype) == (torch.uint8, torch.int64)
    assert files(folder) == [CACHE]


def test_batches(folder, url):
    data = module(folder, url)
    data.prepare_data()
    data.setup("fit")
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (10, 3, 32, 32)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader())] == [9, 1]
    assert len(data.test_dataloader()) == 2


def test_a_second_run_needs_neither_network_nor_lock(folder, url):
    module(folder, url).prepare_data()
    for lock in folder.glob(".*.lock"):
        lock.unlink()
    module(folder).prepare_data()
    assert [path.name for path in folder.iterdir()] == [CACHE]


def test_one_address_need_not_be_a_list(folder, url):
    data = CIFAR10DataModule(str(folder), mirrors=url)
    data.prepare_data()
    assert len(data.load().x_train) == 5 * RECORDS


def test_an_archive_put_there_by_hand_is_used_and_kept(folder, trust):
    trust(pack(folder / ARCHIVE, genuine()))
    module(folder).prepare_data()
    assert files(folder) == [ARCHIVE, CACHE]


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_bad_timeout(timeout):
    with pytest.raises(UserError, match="timeout is"):
        CIFAR10DataModule(timeout=timeout)


# the network


def test_without_a_network_the_ways_out_are_named(folder, url):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/cifar"
    with pytest.raises(UserError) as caught:
        module(folder, dead).prepare_data()
    first, second = str(caught.value).splitlines()
    assert first == f"{ARCHIVE} cannot be downloaded: {dead}: Connection refused"
    assert "--data SyntheticCIFAR10 or --data NpzDataModule --data.path FILE.npz" in second


def test_another_archive_is_refused_unparsed(folder, url, tmp_path, monkeypatch):
    liar = pack(tmp_path / "liar", genuine() | {"evil": member("evil", b"evil")})
    content = liar.read_bytes() + bytes(100_000)
    liar.write_bytes(content[: cifar10.ARCHIVE_SIZE])
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="wrong checksum"):
        module(folder, liar.as_uri()).prepare_data()
    assert files(folder) == []


def test_a_rank_without_a_cache_ends(folder):
    with pytest.raises(UserError, match=f"there is no {CACHE} in .*failed in another process"):
        module(folder).setup("fit")


def test_a_folder_that_cannot_be_written(tmp_path, url):
    (tmp_path / "text").touch()
    folder = tmp_path / "text" / "data"
    for act in (module(folder, url).prepare_data, module(folder, url).load):
        with pytest.raises(UserError, match=f"data folder {folder} cannot be used: Not a directory.*--data.data_dir"):
            act()


def test_a_full_disk(folder, url, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"No space left on device.*--data\.data_dir"):
        module(folder, url).prepare_data()
    assert files(folder) == [ARCHIVE]


class Mirror(ThreadingHTTPServer):
    gets = 0

    def finish_request(self, request: object, client_address: object) -> None:
        self.gets += 1
        super().finish_request(request, client_address)


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = Mirror(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "mirror")))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_four_processes_download_once(folder, url, mirror):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    address = f"http://127.0.0.1:{mirror.server_port}/{ARCHIVE}"

    def prepare() -> None:
        barrier.wait()
        data = module(folder, address)
        data.prepare_data()
        assert int(data.load().y_train[0]) == records(1)[0, 0]

    processes = [context.Process(target=prepare) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert mirror.gets == 1
    assert files(folder) == [CACHE]


# hostile archives: their checksum is taken for the right one, so that all else must hold


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


def renamed(name: str, path: str) -> Member:
    info, content = genuine()[name]
    info.name = path
    return info, content


def out_of_range() -> bytes:
    table = records(3)
    table[7, 0] = 10
    return table.tobytes()


BATCH = "data_batch_3.bin"
HOSTILE = {
    "symlink": ({BATCH: member(BATCH, kind=tarfile.SYMTYPE, link="/etc/passwd")}, "not a regular file"),
    "inner_symlink": (
        {BATCH: member(BATCH, kind=tarfile.SYMTYPE, link="test_batch.bin")},
        "not a regular file",
    ),
    "hardlink": (
        {BATCH: member(BATCH, kind=tarfile.LNKTYPE, link=f"{FOLDER}/data_batch_1.bin")},
        "not a regular file",
    ),
    "folder": ({BATCH: member(BATCH, kind=tarfile.DIRTYPE)}, "not a regular file"),
    "device": ({BATCH: member(BATCH, kind=tarfile.CHRTYPE)}, "not a regular file"),
    "pickle": ({BATCH: member(BATCH, pickle.dumps(Bomb()))}, r"has \d+ bytes, not 61460"),
    "too_short": ({BATCH: member(BATCH, records(3).tobytes()[:-1])}, "has 61459 bytes, not 61460"),
    "too_long": ({BATCH: member(BATCH, records(3).tobytes() + b"0")}, "has 61461 bytes, not 61460"),
    "label": ({BATCH: member(BATCH, out_of_range())}, "labels from 0 to 10; there are 10 classes"),
    "missing": ({BATCH: member("else")}, f"{BATCH} is missing"),
    "twice": ({"again": member(BATCH, records(9).tobytes())}, f"{BATCH} is there twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused(folder, tmp_path, trust, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, reason = HOSTILE[case]
    url = trust(pack(tmp_path / "mirror" / ARCHIVE, genuine() | change))
    with pytest.raises(UserError, match=f"{ARCHIVE} is damaged: .*{reason}"):
        module(folder, url).prepare_data()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mirror", "root"]
    assert files(folder) == [ARCHIVE]


@pytest.mark.parametrize("path", ["../../evil", "{root}/evil", "../../data_batch_3.bin"])
def test_nothing_is_written_outside_the_folder(folder, tmp_path, trust, path):
    path = path.format(root=tmp_path)
    change = {BATCH: renamed(BATCH, path)} if path.endswith(BATCH) else {"evil": (tarfile.TarInfo(path), b"")}
    url = trust(pack(tmp_path / "mirror" / ARCHIVE, genuine() | change))
    module(folder, url).prepare_data()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mirror", "root"]
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    assert files(folder) == [CACHE]


def test_a_damaged_archive_is_a_user_error(tmp_path):
    good = pack(tmp_path / ARCHIVE, genuine()).read_bytes()
    draw = random.Random(0)
    path, taken = tmp_path / "damaged", []
    for trial in range(60):
        cut = trial % 2 == 1
        bad = bytearray(good[: draw.randrange(len(good))] if cut else good)
        for _ in range(3):
            if bad:
                bad[draw.randrange(min(len(bad), 2000) if trial % 3 else len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            read_archive(path)
        except UserError as error:
            assert "damaged" in str(error)  # noqa: PT017
        else:
            taken.append("cut" if cut else "flipped")
    assert "cut" not in taken  # of a flipped bit only the checksum of the archive may know


# the cache


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), MemoryError()])
def test_a_cache_that_cannot_be_read_just_now_is_not_damaged(folder, url, monkeypatch, error):
    """Taken for damage it would be downloaded again."""
    module(folder, url).prepare_data()

    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(np, "load", failing)
    with pytest.raises(type(error)):
        read_cache(folder / CACHE)


def test_the_cache_is_read_once(folder, url, monkeypatch):
    module(folder, url).prepare_data()
    read, times = cifar10.read_cache, []
    monkeypatch.setattr(cifar10, "read_cache", lambda path: times.append(path) or read(path))
    data = module(folder)
    for _ in range(2):  # fit, then test
        data.prepare_data()
        data.setup("fit")
    assert len(times) == 1


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "other_shape", "other_dtype", "pickle", "npy"])
def test_a_damaged_cache_is_named_and_built_again(folder, url, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    data = module(folder, url)
    data.prepare_data()
    before, cache = data.load(), folder / CACHE
    good = cache.read_bytes()
    arrays = {name: array.numpy() for name, array in before._asdict().items()}
    match damage:
        case "empty":
            cache.write_bytes(b"")
        case "truncated":
            cache.write_bytes(good[: len(good) // 2])
        case "flipped":
            cache.write_bytes(good[:100_000] + bytes([good[100_000] ^ 1]) + good[100_001:])
        case "other_shape":
            np.savez(cache, **arrays | {"x_train": arrays["x_train"][1:]})
        case "other_dtype":
            np.savez(cache, **arrays | {"y_test": arrays["y_test"].astype(np.int32)})
        case "pickle":
            np.savez(cache, **arrays | {"y_test": np.array([Bomb()] * RECORDS, dtype=object)})
        case "npy":
            cache.write_bytes(np.lib.format.magic(1, 0) + good)
    with pytest.raises(UserError, match=f"{CACHE} is damaged: "):
        module(folder, url).load()
    with pytest.warns(UserWarning, match=f"{CACHE} is damaged: .*it is built again"):
        module(folder, url).prepare_data()
    assert all(map(torch.equal, module(folder).load(), before))
    assert not (tmp_path / "exploded").exists()


def test_no_damage_is_read_silently(folder, url, tmp_path):
    module(folder, url).prepare_data()
    good = (folder / CACHE).read_bytes()
    before, path = read_cache(folder / CACHE), tmp_path / "damaged"
    draw = random.Random(0)
    # half of the flips in the headers and the directory, where no checksum helps
    edges = [*range(1500), *range(len(good) - 1500, len(good))]
    for trial in range(300):
        bad = bytearray(good)
        bad[draw.choice(edges) if trial % 2 else draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad if trial % 10 else good[: draw.randrange(len(good))])
        try:
            after = read_cache(path)
        except UserError:
            continue
        assert all(map(torch.equal, before, after))


def test_a_crash_while_writing_leaves_no_cache(folder, url, monkeypatch):
    class Crash(BaseException):
        pass

    def crash(file: io.BufferedWriter, **arrays: np.ndarray) -> None:
        file.write(b"PK")
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", crash)
        with pytest.raises(Crash):
            module(folder, url).prepare_data()
    assert CACHE not in files(folder)
    module(folder, url).prepare_data()
    assert len(module(folder).load().x_train) == 5 * RECORDS
