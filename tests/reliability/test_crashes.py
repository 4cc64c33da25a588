"""A crash, or a full disk, at every system call of a save leaves a checkpoint that can be loaded.

Without the staging (``write_state`` writes the file itself) the kill at the first ``write`` leaves an empty file
and nothing to load. strace counts each kind of call by itself.
"""

import shutil
import signal
import subprocess

import pytest
import torch
from reliability.processes import FORKS, finish, results, start_fit
from reliability.saving import SAVES, checkpoint, save_several

from lit_basics import DurableCheckpointIO
from lit_basics.checkpoint_files import load_checked

CALLS = (
    *("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat"),
    *("unlink", "unlinkat", "openat", "ftruncate"),
)


def saved_under(injection, path):
    """Let a process save under ``strace -e inject``; return its exit code, the last save that returned, the calls."""
    DurableCheckpointIO().save_checkpoint(checkpoint(0), path)
    begin, done, ready = FORKS.Value("i", 0, lock=False), FORKS.Value("i", 0, lock=False), FORKS.Event()
    process = FORKS.Process(target=save_several, args=(path, begin, done, ready))
    process.start()
    assert ready.wait(60)
    log = path.parent.with_suffix(".strace")
    options = ["-f", "-o", str(log), "-e", f"trace={','.join(CALLS)}", "-e", f"inject={injection}"]
    strace = subprocess.Popen(["strace", *options, "-p", str(process.pid)], stderr=subprocess.PIPE)
    assert b"attached" in strace.stderr.readline()
    begin.value = 1
    process.join(60)
    strace.wait(60)
    strace.stderr.close()
    return process.exitcode, done.value, log.read_text()


@pytest.fixture(scope="module")
def strace(tmp_path_factory):
    """Skip where there is no strace or it may not attach."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace may not trace: {tried.stderr}")


def check(call, effect, number, folder):
    """Inject ``effect`` at the ``number``-th such call; return False if there is none."""
    path = folder / f"{call}{number}" / "a.ckpt"
    code, done, log = saved_under(f"{call}:{effect}:when={number}", path)
    if "INJECTED" not in log and "killed by SIGKILL" not in log:
        assert (code, done) == (0, SAVES)
        return False
    assert code == (-signal.SIGKILL if "KILL" in effect else 0)
    # a save that returned is there, or the one that was under way
    loaded = load_checked(path)
    assert done <= loaded["step"] <= min(done + 1, SAVES), (call, number, done, log)
    assert torch.equal(loaded["state_dict"]["weight"], checkpoint(loaded["step"])["state_dict"]["weight"])
    # and the next run saves as ever, leaving nothing behind
    DurableCheckpointIO().save_checkpoint(checkpoint(9), path)
    assert load_checked(path)["step"] == 9
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.ckpt", "a.ckpt.previous", "a.ckpt.sha256"]
    shutil.rmtree(path.parent)
    return True


@pytest.mark.parametrize(("call", "number"), [("write", 1), ("fsync", 4), ("rename", 2), ("rename", 3), ("link", 2)])
def test_a_crash_at_some_calls_of_a_save(call, number, strace, tmp_path):
    assert check(call, "signal=KILL", number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("effect", ["signal=KILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "TMPDIR on another file system"])
def test_a_crash_at_every_call_of_a_save(effect, elsewhere, strace, tmp_path, tmpfs, monkeypatch):
    if elsewhere:
        monkeypatch.setenv("TMPDIR", str(tmpfs))
    tried = {}
    for call in CALLS:
        number = 1
        while check(call, effect, number, tmp_path / "saves"):
            number += 1
        tried[call] = number - 1
    print(f"\n{effect}, {SAVES} saves: a good checkpoint is left at each of {sum(tried.values())} calls, {tried}")
    assert tried["write"] >= 2 * SAVES
    assert tried["fsync"] >= 4 * SAVES
    assert tried["rename"] == 3 * SAVES
    assert tried["link"] == SAVES


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 2 MB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    tried = subprocess.run(mount, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted: {tried.stderr}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_newest_checkpoint_that_fitted(tmpfs):
    """Without the staging the first checkpoint that does not fit takes the good one with it."""
    io, path = DurableCheckpointIO(), tmpfs / "a.ckpt"
    good, failures = 0, 0
    for step in range(1, 40):
        size = 20_000 * step if step < 25 else 1000  # grows past the disk, then fits again
        state = {"state_dict": {"weight": torch.full((size,), float(step))}, "step": step}
        try:
            io.save_checkpoint(state, path)
            good = step
        except OSError:
            failures += 1
        loaded = load_checked(path)
        assert loaded["step"] == good
        assert (loaded["state_dict"]["weight"] == good).all()
        assert sorted(p.name for p in tmpfs.iterdir() if p.name.startswith(".")) == []
    assert failures >= 10
    assert good == 39


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [900, 1200, 1500, 1800, 2100])
def test_a_run_whose_disk_is_full_goes_on_once_there_is_room(kilobytes, tmpfs, tmp_path, whole):
    run = tmpfs / "run"
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(tmpfs)], check=True)
    process = start_fit(run, output=tmp_path / "run.txt")
    process.join(120)
    said = (tmp_path / "run.txt").read_text()
    assert process.exitcode not in (0, None, -9), said
    assert "No space left on device" in said
    subprocess.run(["mount", "-o", "remount,size=20m", str(tmpfs)], check=True)
    checkpoints = run / "checkpoints" / "last.ckpt"
    step = load_checked(checkpoints)["global_step"] if checkpoints.exists() else 0
    process = start_fit(run, "--resume", "auto", output=tmp_path / "run.txt")
    finish(process, tmp_path / "run")
    assert results(run) == whole[0]
    print(f"\n{kilobytes} kB: the disk was full after step {step}; resumed, equal")
