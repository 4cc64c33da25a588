"""Durable checkpoints: damage is seen, the one before is used, nothing in a file is run."""

import contextlib
import multiprocessing
import os
import pickle
import re
import shutil
import stat
import threading
import time
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quiet_trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from lit_basics import (
    BestLossCheckpoint,
    DurableCheckpointIO,
    LastCheckpoint,
    LinearDataModule,
    LitLinearRegression,
    UserError,
    checkpoint_io,
)
from lit_basics.checkpoint_files import VERSION, check_versions, checksum_path, previous_path
from lit_basics.checkpoint_io import copied
from lit_basics.files import replace_file, sync_folder
from lit_basics.nested import tensors_in


def checkpoint(value):
    return {"state_dict": {"weight": torch.full((50,), float(value))}, "step": value}


def saved(tmp_path, *values, **options):
    io = DurableCheckpointIO(**options)
    for value in values:
        io.save_checkpoint(checkpoint(value), tmp_path / "a.ckpt")
    return io, tmp_path / "a.ckpt"


def test_a_checkpoint_comes_back(tmp_path):
    io, path = saved(tmp_path, 1, 2)
    assert io.load_checkpoint(path)["step"] == 2
    assert torch.load(previous_path(path), weights_only=True)["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.previous", "a.ckpt.sha256"]
    io.remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


def test_every_bit_flip_and_truncation_is_seen(tmp_path):
    io, path = saved(tmp_path, 1, 2)
    good = path.read_bytes()
    draws = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(good) * 8, (150,), generator=draws).tolist():
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"a.ckpt is damaged.*going on from .*a.ckpt.previous"):
            assert io.load_checkpoint(path)["step"] == 1
    for length in torch.randint(0, len(good), (25,), generator=draws).tolist():
        path.write_bytes(good[:length])
        with pytest.warns(UserWarning, match="damaged"):
            assert io.load_checkpoint(path)["step"] == 1


def test_without_its_checksum_the_archive_itself_is_checked(tmp_path):
    io, path = saved(tmp_path, 1)
    checksum_path(path).unlink()
    good = path.read_bytes()
    assert io.load_checkpoint(path)["step"] == 1
    place = good.index(torch.ones(4).numpy().tobytes())  # torch.load would return another weight
    path.write_bytes(good[:place] + b"\x01" + good[place + 1 :])
    with pytest.raises(UserError, match="damaged"):
        io.load_checkpoint(path)


@pytest.mark.parametrize("stage", ["fsync", "replace", "link"])
def test_a_failure_at_any_call_leaves_a_good_checkpoint(stage, tmp_path, monkeypatch):
    io, path = saved(tmp_path, 1, 2)
    real = getattr(os, stage)
    calls = raised = 0
    for failing in range(1, 6):

        def fail(*args, failing=failing, **kwargs):
            nonlocal calls, raised
            calls += 1
            if calls == failing:
                raised += 1
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, stage, fail)
            with contextlib.suppress(OSError):
                io.save_checkpoint(checkpoint(failing + 2), path)
        assert io.load_checkpoint(path)["step"] in (failing + 2, failing + 1)
        io.save_checkpoint(checkpoint(failing + 2), path)
        assert io.load_checkpoint(path)["step"] == failing + 2
    assert raised == {"fsync": 4, "replace": 3, "link": 1}[stage]
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".a.ckpt.") and "link" not in p.name]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb",))


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(UserError, match=r"bomb.ckpt holds objects that a safe load refuses: posix.mkdir"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt", weights_only=False)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        DurableCheckpointIO().load_checkpoint(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")


def test_others_may_read_a_checkpoint(tmp_path):
    mask = os.umask(0o022)
    try:
        saved(tmp_path, 1, 2)
    finally:
        os.umask(mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("a.ckpt", "a.ckpt.previous", "a.ckpt.sha256"), 0o644)


def test_a_young_file_is_held_until_the_end(tmp_path):
    io, path = saved(tmp_path, 1, 2, 3, min_seconds=60)
    assert io.load_checkpoint(path)["step"] == 1
    io.teardown()
    assert io.load_checkpoint(path)["step"] == 3


def test_what_was_removed_is_not_held_but_written(tmp_path):
    """Its age is that of no file any more."""
    io, path = saved(tmp_path, 1, min_seconds=60)
    io.remove_checkpoint(path)
    io.save_checkpoint(checkpoint(2), path)
    assert path.is_file()


def test_a_copy_has_its_own_memory_and_shares_it_as_the_original_does():
    table, bank = torch.arange(12.0).view(3, 4), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    trained = torch.ones(3, requires_grad=True)
    # the same tensor twice, tied weights, a part, a transposed one, one in a graph, none, expanded, a scalar
    state = {
        "table": [table, table, table.detach(), table[1:], table.t()],
        "alone": {"bank": bank, "trained": trained * 2, "none": torch.ones(0), "once": torch.ones(1).expand(3)},
        "step": torch.tensor(7),
        "lr": 0.1,
    }
    copy = copied(state)
    before, after = ([*s["table"], *s["alone"].values(), s["step"]] for s in (state, copy))
    assert all(map(torch.equal, before, after))
    assert [t.stride() for t in before] == [t.stride() for t in after]
    theirs, own = ([t.untyped_storage().data_ptr() for t in tensors] for tensors in (before, after))
    assert len(set(own[:5])) == 1
    assert not {*own} & {*theirs} - {0}  # of none
    assert copy["table"][0] is copy["table"][1]
    table.zero_()
    assert copy["table"][0][2, 3] == 11
    assert copy["lr"] == 0.1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_copy_keeps_what_a_state_has_beside_tensors():
    """Without its versions a module's state is taken for that of an old one."""
    losses = [0.5]
    state = {
        "state_dict": nn.BatchNorm1d(3).state_dict(),
        "shape": (2, 3),
        "losses": losses,
        "same": {"losses": losses},
    }
    state["nested"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    copy = copied(state)
    assert copy["shape"] == (2, 3)
    assert copy["losses"] is copy["same"]["losses"] is not losses  # once in the file
    assert torch.equal(copy["nested"].unbind()[1], torch.ones(3))
    assert copy["state_dict"]._metadata == state["state_dict"]._metadata == {"": {"version": 2}}
    assert copy["state_dict"]._metadata is not state["state_dict"]._metadata


def test_tied_weights_that_are_several_tensors_are_one_in_the_copy():
    """Those of a GPU, which take the same way here as those with a gradient; copied each, they come apart."""
    tied = nn.Parameter(torch.arange(6.0).view(2, 3))
    state = {"one": tied, "other": nn.Parameter(tied.data), "flat": nn.Parameter(tied.data.view(6))}
    copy = copied(state)
    assert all(torch.equal(copy[name], state[name]) for name in state)
    assert copy["one"].data_ptr() == copy["other"].data_ptr() != tied.data_ptr()


def test_a_copy_is_made_in_the_memory_of_the_one_before():

    def state(value):
        weights = {"a": torch.full((3, 4), value), "b": torch.full((4, 3), value).t(), "c": torch.full((2,), value)}
        trained = torch.full((2,), value, requires_grad=True)
        # two places of one name
        return {"weights": weights, "trained": trained, "on": {"e": torch.zeros(2)}, "o": {"ne": torch.ones(2)}}

    memory = {}
    first = copied(state(1.0), memory)
    later = state(2.0)
    later["weights"]["c"] = torch.full((3,), 2.0)
    second = copied(later, memory)
    places = [[t.data_ptr() for _, t in tensors_in(copy)] for copy in (first, second)]
    assert [a == b for a, b in zip(*places, strict=True)][:4] == [True, True, False, True]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors_in(second), tensors_in(later), strict=True))


def test_a_copy_that_was_made_in_inference_mode_is_made_anew():
    memory, state = {}, {"a": torch.ones(3)}
    with torch.inference_mode():
        copied(state, memory)
    assert torch.equal(copied(state, memory)["a"], state["a"])


def test_what_the_thread_still_reads_is_not_written_over(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    real = checkpoint_io.write_state
    memory = []

    def slow(path, state):
        memory.append(state["state_dict"]["weight"].data_ptr())
        begun.set()
        assert go_on.wait(30)
        real(path, state)

    monkeypatch.setattr(checkpoint_io, "write_state", slow)
    io = DurableCheckpointIO(asynchronous=True)
    go_on.set()
    for value in (1, 2):
        io.save_checkpoint(checkpoint(value), tmp_path / "a.ckpt")
        io.flush()
    assert memory[0] == memory[1]
    go_on.clear()
    begun.clear()
    io.save_checkpoint(checkpoint(3), tmp_path / "a.ckpt")
    assert begun.wait(30)
    copy = checkpoint_io.copied

    def copied_then_released(*args):
        state = copy(*args)
        go_on.set()
        return state

    monkeypatch.setattr(checkpoint_io, "copied", copied_then_released)
    io.save_checkpoint(checkpoint(4), tmp_path / "b.ckpt")
    io.teardown()
    for name, value in (("a", 3), ("b", 4)):
        assert torch.equal(
            io.load_checkpoint(tmp_path / f"{name}.ckpt")["state_dict"]["weight"], torch.full((50,), value * 1.0)
        )


def test_a_write_that_is_waited_for_is_in_flight_after_an_interrupt(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(checkpoint_io, "write_state", lambda *_: go_on.wait(30))
    io = DurableCheckpointIO(asynchronous=True)
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            io.flush()
    assert io._in_flight is not None
    go_on.set()
    io.teardown()
    assert io._in_flight is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_removal_waits_in_the_thread_for_the_write_before_it(fails, tmp_path, monkeypatch):
    """ModelCheckpoint removes the old file right after the save: waited for there, a save is as slow as without a
    thread; made without the write, it may leave nothing."""
    io, old = saved(tmp_path, 1, asynchronous=True)
    io.flush()
    go_on, real = threading.Event(), checkpoint_io.write_state
    monkeypatch.setattr(checkpoint_io, "write_state", lambda *args: go_on.wait(60) and real(*args))
    new = tmp_path / "folder" / "b.ckpt"
    if fails:
        new.parent.write_text("a file")
    io.save_checkpoint(checkpoint(2), new)
    io.remove_checkpoint(old)
    assert not go_on.is_set()
    assert old.exists()
    go_on.set()
    with pytest.raises(OSError, match="folder") if fails else contextlib.nullcontext():
        io.teardown()
    assert (old.exists(), new.exists()) == (fails, not fails)


def test_asynchronous_errors_are_raised_at_the_next_save(tmp_path, monkeypatch):
    main = threading.get_ident()
    real = os.fsync

    def fsync(descriptor):
        assert threading.get_ident() != main
        time.sleep(0.05)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    io, path = saved(tmp_path, 1, 2, asynchronous=True)
    assert io.load_checkpoint(path)["step"] == 2  # waits for the write

    def full_once(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_once)
    io.save_checkpoint(checkpoint(3), path)
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint(checkpoint(4), path)
    io.teardown()
    assert io.load_checkpoint(path)["step"] == 4


def test_a_forked_process_writes_by_a_thread_of_its_own(tmp_path, monkeypatch):
    """With its parent's, which it does not have, it waits for ever."""
    go_on, real, parent = threading.Event(), checkpoint_io.write_state, os.getpid()
    monkeypatch.setattr(
        checkpoint_io, "write_state", lambda *args: (os.getpid() != parent or go_on.wait(60)) and real(*args)
    )
    io = DurableCheckpointIO(asynchronous=True)
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")

    def forked():
        for value in (2, 3):
            io.save_checkpoint(checkpoint(value), tmp_path / "b.ckpt")
        io.teardown()

    child = multiprocessing.get_context("fork").Process(target=forked)
    child.start()
    child.join(30)
    child.kill()
    go_on.set()
    io.teardown()
    child.join()
    assert child.exitcode == 0
    assert io.load_checkpoint(tmp_path / "b.ckpt")["step"] == 3
    assert io.load_checkpoint(tmp_path / "a.ckpt")["step"] == 1


def test_what_the_parent_holds_is_not_written_by_a_forked_process(tmp_path):
    """Else it writes the parent's state over a newer one of the parent's."""
    io, path = saved(tmp_path, 1, 2, min_seconds=60)
    child = multiprocessing.get_context("fork").Process(target=io.teardown)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert io.load_checkpoint(path)["step"] == 1
    io.teardown()
    assert io.load_checkpoint(path)["step"] == 2


def test_it_can_be_pickled_with_a_thread_that_has_written(tmp_path):
    """``ddp_spawn`` pickles the Trainer with its plugins; a pool cannot be."""
    io, path = saved(tmp_path, 1, asynchronous=True)
    io.flush()
    other = pickle.loads(pickle.dumps(io))
    other.save_checkpoint(checkpoint(2), path)
    other.teardown()
    assert io.load_checkpoint(path)["step"] == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_held_is_written_though_another_cannot_be(asynchronous, tmp_path):
    """One after the other, the newest first, none is written after the one that fails."""
    io = DurableCheckpointIO(min_seconds=60, asynchronous=asynchronous)
    places = [tmp_path / name / "a.ckpt" for name in ("one", "gone", "two")]
    for value in (1, 2):
        for path in places:
            io.save_checkpoint(checkpoint(value), path)
    io._finish_write()
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").write_text("a file")
    with pytest.raises(OSError, match="gone"):
        io.teardown()
    assert [io.load_checkpoint(path)["step"] for path in (places[0], places[2])] == [2, 2]


def fail_last_rename(monkeypatch, target):
    real = os.replace

    def replace(source, destination):
        if str(destination) == str(target):
            raise OSError(5, "Input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)


def test_saves_that_fail_again_and_again_leave_the_good_checkpoint(tmp_path, monkeypatch):
    """Without the file's own sum being kept, its sum has left the list after the third failure."""
    io, path = saved(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        fail_last_rename(patch, path)
        for value in range(3, 10):
            with pytest.raises(OSError, match="Input/output"):
                io.save_checkpoint(checkpoint(value), path)
            assert io.load_checkpoint(path)["step"] == 2
    io.save_checkpoint(checkpoint(3), path)
    path.write_bytes(path.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        fail_last_rename(patch, path)
        for value in range(4, 10):
            with pytest.raises(OSError, match="Input/output"):
                io.save_checkpoint(checkpoint(value), path)
    with pytest.warns(UserWarning, match="damaged"):  # it was not put in the place of the good one before it
        assert io.load_checkpoint(path)["step"] == 2
    io.save_checkpoint(checkpoint(10), path)
    assert io.load_checkpoint(path)["step"] == 10


def test_a_checkpoint_without_sums_is_not_lost_to_a_failing_save(tmp_path, monkeypatch):
    """Without its sum being taken over, the foreign file is refused once the sums of the new one are there."""
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint(1), path)
    fail_last_rename(monkeypatch, path)
    io = DurableCheckpointIO()
    with pytest.raises(OSError, match="Input/output"):
        io.save_checkpoint(checkpoint(2), path)
    assert io.load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize(("key", "name"), [(VERSION, "lit_basics"), ("pytorch-lightning_version", "lightning")])
def test_a_checkpoint_of_a_newer_version_is_refused(key, name, tmp_path):
    """Without ``check_versions`` it is loaded."""
    path = tmp_path / "a.ckpt"
    torch.save({**checkpoint(1), key: "99.0"}, path)
    with pytest.raises(UserError, match=rf"a.ckpt was written by a newer {name}, 99.0; here is .*: upgrade {name}"):
        DurableCheckpointIO().load_checkpoint(path)
    for older in ("0.0.1", version(name), f"{version(name)}.7", None):
        check_versions({key: older}, path)


def test_beside_a_checkpoint_of_slurms_nothing_has_its_name(tmp_path):
    """In ``hpc_ckpt_1.ckpt.sha256`` Lightning reads version 1256, and asks for it."""
    io, path = DurableCheckpointIO(), tmp_path / "hpc_ckpt_1.ckpt"
    for value in (1, 2):
        io.save_checkpoint(checkpoint(value), path)
    assert len(list(tmp_path.iterdir())) == 3
    assert [p.name for p in tmp_path.iterdir() if "hpc_ckpt_" in p.name] == [path.name]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        assert io.load_checkpoint(path)["step"] == 1


def test_hyper_parameters_that_no_load_takes_are_named_at_the_first_save(tmp_path):
    """Without a word a run of days would leave nothing to go on from."""
    io, path = DurableCheckpointIO(), tmp_path / "a.ckpt"
    bad = {**checkpoint(1), "hyper_parameters": {"lr": 0.1, "root": tmp_path}}
    with pytest.warns(UserWarning, match=r"hyper-parameter root, a PosixPath.*ignore=\['root'\]"):
        io.save_checkpoint(bad, path)
    io.save_checkpoint(bad, path)
    with pytest.raises(UserError, match=r"a.ckpt holds objects that a safe load refuses: pathlib.*; torch.serial"):
        io.load_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "warning"),
    [
        ("hyper_parameters", UserDict(lr=0.1), "hyper_parameters, a UserDict, .*numbers, text and tensors"),
        ("optimizer_states", [{"param_groups": [{"lr": np.sqrt(2)}]}], r"\['lr'\], a float64, .*write float\(lr\)$"),
        ("lr_schedulers", [{"base": (np.int64(2),)}], r"lr_schedulers\[0\]\['base'\]\[0\], a int64, .*write int"),
        ("callbacks", {"Own": {"seen": np.zeros(2)}}, r"callbacks\['Own'\]\['seen'\], a ndarray, .*numbers, text and"),
        ("counts", defaultdict(list), "counts, a defaultdict, "),
        ("losses", deque([0.5]), "losses, a deque, "),
        ("began", {"at": datetime(2026, 1, 1)}, r"began\['at'\], a datetime, "),
        ("files", {Path("a"): 1}, r"files\[PosixPath\('a'\)\], a PosixPath, "),
        ("state_dict", {"_extra_state": np.zeros(2)}, r"state_dict\['_extra_state'\], a ndarray, "),
    ],
)
def test_whatever_no_load_takes_is_named_at_the_first_save(key, value, warning, tmp_path):
    """Saves succeed for days, and the first resume finds a file that is "damaged"."""
    io, path = DurableCheckpointIO(), tmp_path / "a.ckpt"
    with pytest.warns(UserWarning, match=warning):
        io.save_checkpoint({**checkpoint(1), key: value}, path)
    io.save_checkpoint({**checkpoint(1), key: value}, path)
    with pytest.raises(UserError, match="holds objects that a safe load refuses"):
        io.load_checkpoint(path)


def test_what_no_load_takes_and_comes_later_is_named_once(tmp_path):
    """Looked for at the first save alone, every checkpoint after the warm-up is one that cannot be loaded."""
    io, path = DurableCheckpointIO(), tmp_path / "a.ckpt"
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2 if step < 2 else np.sqrt(1 / step))
    said = []
    for _ in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            io.save_checkpoint({**checkpoint(1), "optimizer_states": [optimizer.state_dict()]}, path)
        said.append([str(warning.message) for warning in caught if "cannot be loaded" in str(warning.message)])
        optimizer.step()
        warm_up.step()
    assert [len(messages) for messages in said] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert "['lr'], a float64, " in said[3][0]


def test_what_a_load_takes_is_not_warned_of(tmp_path):
    entries = {"a": OrderedDict(b=[(torch.ones(2), None, 1.5, 2**70, True, "c", b"d", 1j)])}
    entries |= {"e": torch.Size([2]), "f": torch.float32, "g": torch.device("cpu"), 3: nn.Parameter(torch.ones(1))}
    entries["itself"] = [entries]
    io, path = DurableCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({**checkpoint(1), **entries}, path)
    assert io.load_checkpoint(path)["a"]["b"][0][1:6] == (None, 1.5, 2**70, True, "c")


def test_what_a_killed_save_leaves_is_removed(tmp_path):
    io, path = saved(tmp_path, 1)
    for name in (".a.ckpt.", ".a.ckpt.sha256.", ".best.pth."):
        (tmp_path / f"{name}12345678").write_bytes(b"staged")
    io.save_checkpoint(checkpoint(2), path)
    with replace_file(tmp_path / "best.pth") as file:
        file.write(b"weights")
    names = ["a.ckpt", "a.ckpt.previous", "a.ckpt.sha256", "best.pth"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    "use",
    [
        LastCheckpoint,
        BestLossCheckpoint,
        lambda path: BestLossCheckpoint("here", weights_path=path),
        lambda path: DurableCheckpointIO().save_checkpoint(checkpoint(1), path),
        lambda path: DurableCheckpointIO(min_seconds=60, asynchronous=True).save_checkpoint(checkpoint(1), path),
        lambda path: DurableCheckpointIO().load_checkpoint(path),
    ],
)
def test_a_remote_folder_is_refused(use, tmp_path):
    """``Path`` makes a local folder ``s3:`` of it, which is lost with a machine that is lent."""
    for path in ("s3://bucket/run", Path("gs://bucket/run")):
        with pytest.raises(UserError, match=rf"^{path} is remote, and checkpoints are written to local files only"):
            use(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"min_seconds": 1000}, {"asynchronous": True}])
def test_a_save_after_the_end_of_a_run_is_made_at_once(options, tmp_path):
    """Held, it is lost at exit; handed to a thread, it may not be there yet, and nobody tells of an error."""
    io, path = DurableCheckpointIO(**options), tmp_path / "final.ckpt"
    io.teardown()  # of a fit that has saved nothing, or a validation
    trainer = quiet_trainer(plugins=[io])
    trainer.strategy.connect(LitLinearRegression())
    trainer.save_checkpoint(path)
    assert path.exists()
    path.unlink()
    last = LastCheckpoint(str(tmp_path))
    trainer = quiet_trainer(last, plugins=[io], enable_checkpointing=True)
    trainer.fit(LitLinearRegression(), LinearDataModule())
    for value in (1, 2):
        io.save_checkpoint(checkpoint(value), path)
        assert torch.load(path, weights_only=True)["step"] == value
        assert io._in_flight is None
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=re.escape(str(path))):
        trainer.save_checkpoint(path)
    deferred = []

    class Looks(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(last.path)
            trainer.save_checkpoint(last.path)
            deferred.append(bool(io._held) or io._in_flight is not None)

    trainer.fit_loop.max_epochs = 2
    trainer.callbacks.append(Looks())
    trainer.fit(LitLinearRegression(), LinearDataModule())
    assert deferred == [True]


def test_a_home_folder_is_that_of_lightning(tmp_path, monkeypatch):
    """Without ``expanduser`` a folder named ~ is made where the process stands."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    last, best = LastCheckpoint("~/r"), BestLossCheckpoint("~/r", weights_path="~/w/best.pth")
    trainer = quiet_trainer(last, best, plugins=[DurableCheckpointIO()], enable_checkpointing=True)
    trainer.fit(LitLinearRegression(), LinearDataModule())
    trainer.save_checkpoint("~/a.ckpt")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".pth")}
    assert files == {"home/r/best.ckpt", "home/r/last.ckpt", "home/w/best.pth", "home/a.ckpt"}
    trainer.strategy.checkpoint_io.load_checkpoint("~/a.ckpt")
    trainer.strategy.checkpoint_io.remove_checkpoint("~/a.ckpt")
    assert not (tmp_path / "home" / "a.ckpt").exists()


def test_a_file_system_that_cannot_synchronize_a_folder():
    """/proc refuses it with EINVAL, as some network file systems do."""
    sync_folder(Path("/proc"))
