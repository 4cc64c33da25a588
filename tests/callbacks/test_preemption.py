"""Real processes, really signalled."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import Rows, assert_equal, fit, metrics, quiet_trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_basics import LastCheckpoint, LitBlitzNet, LitClassifier, Preemption, SyntheticCIFAR10, UserError
from lit_basics.callbacks.preemption import SAME_SECONDS, SIGNALS, Preempted
from lit_basics.cli import main

WORDS = (
    *("--config", "quickstart", "--data.train_images", "3000", "--trainer.max_epochs", "6"),
    *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
)


SLOW = """
import sys, time
from lit_basics import LitLeNet5
from lit_basics.cli import main

quick = LitLeNet5.compute_loss

def slow(self, *args):
    time.sleep(0.1 if self.global_step >= 60 else 0)
    return quick(self, *args)

LitLeNet5.compute_loss = slow
sys.exit(main(sys.argv[1:]))
"""
"""The command line, slow from step 60 on: a signal lands in the 20 seconds that are left, however late it is sent."""

NUMBERS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGHUP: 129}


def interruptible():
    """Take signals, though these tests may run in the background of a shell or under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(run_dir, *more):
    command = [sys.executable, "-c", SLOW, "fit", *WORDS, "--run_dir", str(run_dir), *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    wait_for_rows(process, run_dir, 60)
    return process


def wait_for_rows(process, run_dir, number):
    rows = Path(run_dir) / "metrics.csv"
    deadline = time.monotonic() + 120
    while not rows.is_file() or rows.read_text().count("\n") < number:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    return fit(*WORDS, run_dir=tmp_path_factory.mktemp("whole") / "run")


def check(whole, run):
    newest, expected = (
        torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (run, whole)
    )
    assert_equal(newest, expected)
    assert metrics(run) == metrics(whole)
    assert_equal(*(torch.load(r / "best.pth", weights_only=True) for r in (run, whole)))
    bests = [torch.load(r / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] for r in (run, whole)]
    assert bests[0] == bests[1]


@pytest.mark.parametrize(("number", "code"), NUMBERS.items())
def test_a_signal_saves_the_state_and_the_run_goes_on(number, code, whole, tmp_path):
    process = start("my run")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "go on with --resume 'my run'" in error
    assert error.count("saving the state after this step") == (number == signal.SIGINT)
    assert "Traceback" not in error
    stopped = torch.load("my run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 50 <= stopped < 258
    assert main(["fit", "--resume", "my run"]) == 0
    check(whole, Path("my run"))


def test_a_second_ctrl_c_leaves_at_once():
    """In a step that does not end; without the second handler it would have to be killed."""
    words = ["fit", *WORDS, "--run_dir", "run"]
    stuck = SLOW.replace("time.sleep(0.1 if self.global_step >= 60 else 0)", "print('stuck'), time.sleep(1000)")
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", stuck, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    try:
        while process.stdout.readline() != "stuck\n":
            assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGINT)
        while "again leaves at once" not in (line := process.stderr.readline()):
            assert line, process.wait()
        time.sleep(SAME_SECONDS + 0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


SLOW_DATA = """
import os, time
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

class Images(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        time.sleep(0 if os.path.exists("fast") else 0.1)
        return torch.full((3, 32, 32), index / 32), index % 10

class Slow(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Images(), batch_size=4, num_workers=2)
"""


@pytest.mark.parametrize(("number", "rows"), [(signal.SIGTERM, 3), (signal.SIGTERM, 11), (signal.SIGINT, 3)])
def test_a_signal_to_the_whole_group_ends_no_worker_before_the_state_is_saved(number, rows, tmp_path):
    """Without ``_shield`` the fit ends in RuntimeError: DataLoader worker exited unexpectedly, and nothing is saved."""
    (tmp_path / "slow.py").write_text(SLOW_DATA)
    program = [sys.executable, "-m", "lit_basics", "fit"]
    words = ["--model", "LitBlitzNet", "--data", "slow.Slow", "--trainer.max_epochs", "4", "--run_dir", "run"]
    words += ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
    process = subprocess.Popen(
        [*program, *words], stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=interruptible
    )
    wait_for_rows(process, "run", rows)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == NUMBERS[number], error
    assert error.count("the state is saved") == 1
    assert error.count("again leaves at once") == (number == signal.SIGINT)
    assert "Error" not in error
    assert (
        torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] >= rows - 1
    )  # one line is the header
    Path("fast").touch()
    done = subprocess.run([*program, "--resume", "run"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 32


class Programs(Dataset):
    """Each sample has the signals that a program started by its worker ignores."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        line = subprocess.run(["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True).stdout
        return torch.rand(3), index, int(line.split()[1], 16) & 0xFFFFFFFF


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_program_that_a_worker_starts_takes_signals(tmp_path):
    """With ``SIG_IGN`` in the place of ``_pass_over`` it inherits that, and no Ctrl-C ends it."""
    masks = []

    class Ends(LitClassifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            masks.extend(batch[2].tolist())

    numbers = {number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    assert signal.SIGTERM in numbers
    fitted = in_a_project(LastCheckpoint(str(tmp_path)))
    fitted.fit(Ends(nn.Linear(3, 2)), DataLoader(Programs(), num_workers=1))
    assert len(masks) == 2
    assert not {number for number in numbers for mask in masks if mask >> (number - 1) & 1}


STUCK = """
import sys, time
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset
from lit_basics import LastCheckpoint, LitClassifier, Preemption

class Stuck(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index >= 12:
            time.sleep(1000)
        return torch.rand(3), index % 2

class Failing(LitClassifier):
    def compute_loss(self, batch, batch_idx):
        if batch_idx == 1:
            raise ZeroDivisionError
        return super().compute_loss(batch, batch_idx)

callbacks = [Preemption(LastCheckpoint(sys.argv[1]))]
trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=callbacks, enable_model_summary=False)
trainer.fit(Failing(torch.nn.Linear(3, 2), 2), DataLoader(Stuck(), batch_size=4, num_workers=2))
"""


@pytest.mark.slow
def test_a_process_ends_its_workers_that_are_stuck(tmp_path):
    """Without ``_leave_with_parent`` it waits for them for ever."""
    done = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert "ZeroDivisionError" in done.stderr


def in_a_project(saver, **settings):
    """A Trainer with our callbacks alone, in the order in which they should not be."""
    return quiet_trainer(Preemption(saver), saver, enable_checkpointing=True, **settings)


def test_after_a_fit_the_handlers_are_those_from_before_it(tmp_path):
    """Put back at teardown they are Lightning's, which do nothing but take note: SIGTERM ends nothing. Put back by
    Lightning alone, a Ctrl-C is passed over from the last step on."""

    class Ends(LitBlitzNet):
        def on_train_end(self):
            self.at_the_end = signal.getsignal(signal.SIGINT)

    before = [signal.getsignal(number) for number in NUMBERS]
    fitted, module = in_a_project(LastCheckpoint(str(tmp_path))), Ends()
    fitted.fit(module, SyntheticCIFAR10(64, 16, batch_size=16))
    assert module.at_the_end == before[1]
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert [type(c) for c in fitted.callbacks[-2:]] == [LastCheckpoint, Preemption]


class Logs(pl.LightningModule):
    """Of another project; it gets a signal amid its ``number``-th step."""

    def __init__(self, number=None, signal_=signal.SIGTERM):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.number, self.signal, self.ended = nn.Linear(3072, 10), number, signal_, False

    def training_step(self, batch, batch_idx):
        if self.global_step + 1 == self.number:
            os.kill(os.getpid(), self.signal)
        loss = nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_end(self):
        self.ended = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("number", [2, 4, 8])
def test_the_rows_of_a_foreign_module_are_those_of_a_run_that_never_stopped(number, tmp_path):
    """Lightning logs a step, and an epoch, after the hook in which the state is saved: left there, their row is in no
    run. After the last epoch (step 8) nothing is left to train, and the module's ``on_train_end`` is in none."""

    def run(module, ckpt_path=None):
        rows, last = Rows(), LastCheckpoint(str(tmp_path / str(number)))
        settings = {"max_epochs": 2, "log_every_n_steps": 1, "enable_checkpointing": True}
        trainer = quiet_trainer(last, Preemption(last), logger=rows, **settings)
        data = SyntheticCIFAR10(64, 16, batch_size=16, val_size=0)
        with contextlib.nullcontext() if module.number is None else pytest.raises(Preempted):
            trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        shutil.copy(last.path, tmp_path / "stopped.ckpt")
        # the mean of an epoch that is resumed within is that of its rest
        return [row for row in rows.rows if number % 4 == 0 or "loss_epoch" not in row[1]]

    whole, first, second = Logs(), Logs(number), Logs()
    expected = run(whole)
    shutil.rmtree(tmp_path / str(number))
    rows = run(first)
    assert first.ended == (number == 8)
    assert first.trainer.callbacks[-1]._leaving == 0, "a fit that finds nothing to train would leave again"
    assert rows + run(second, tmp_path / "stopped.ckpt") == expected
    assert_equal((first if number == 8 else second).state_dict(), whole.state_dict())


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1])
def test_the_signal_of_slurms_plugin_requeues_the_job(number, tmp_path, monkeypatch):
    """Without a look at the plugin, SIGHUP ends the job for good, and SIGUSR2 stays with Lightning."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    slurm = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        settings = {"plugins": [SLURMEnvironment(requeue_signal=signal.SIGHUP if number == signal.SIGUSR1 else number)]}
        last = LastCheckpoint(str(tmp_path))
        trainer = quiet_trainer(last, Preemption(last), enable_checkpointing=True, **settings)
        with pytest.raises(Preempted) as left:
            trainer.fit(Logs(2, number), SyntheticCIFAR10(64, 16, batch_size=16, val_size=0))
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert left.value.code == 128 + number
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    assert calls == ("" if number == signal.SIGUSR1 else "requeue 4711\n"), "SIGUSR1 is not the plugin's here"


def test_a_handler_that_was_not_pythons_is_no_error(tmp_path):
    """``signal.signal`` returns None for it, which it does not take back."""

    class Foreign(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            saver._previous[signal.SIGUSR1] = None  # only a program that starts Python can have set one

    before = [signal.getsignal(number) for number in NUMBERS]
    saver = Preemption(LastCheckpoint(str(tmp_path)))
    fitted = quiet_trainer(Foreign(), saver, enable_checkpointing=True)
    fitted.fit(LitBlitzNet(), SyntheticCIFAR10(64, 16, batch_size=16))
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_what_it_saves_by_is_there_without_a_signal_too(tmp_path):
    """Without its setup nothing is saved, as Lightning adds no checkpoint callback beside it, and "best" is an
    AttributeError."""
    alone = quiet_trainer(Preemption(LastCheckpoint(str(tmp_path))), enable_checkpointing=True)
    module, data = LitBlitzNet(), SyntheticCIFAR10(64, 16, batch_size=16)
    with pytest.raises(ValueError, match="not configured to save the best model"):
        alone.test(module, data, ckpt_path="best")
    alone.fit(module, data)
    assert [type(c) for c in alone.callbacks[-2:]] == [LastCheckpoint, Preemption]
    assert_equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], module.state_dict())
    with pytest.warns(UserWarning, match="multiple `ModelCheckpoint`"):
        alone.test(module, data, ckpt_path="best", verbose=False, weights_only=True)
    assert alone.ckpt_path == str(tmp_path / "last.ckpt")
    both = [LastCheckpoint(str(tmp_path / "both")), Preemption(LastCheckpoint(str(tmp_path / "both")))]
    fitted = quiet_trainer(*both, enable_checkpointing=True)
    fitted.fit(module, data)
    assert [type(c) for c in fitted.callbacks[-2:]] == [LastCheckpoint, Preemption]
    assert fitted.callbacks[-2] is both[0]
    assert both[1].best_model_path == str(both[0].path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_signal_is_told_of_where_nothing_is_saved(command, number, code, tmp_path):
    """Lightning leaves with 0 after SIGTERM and 1 after Ctrl-C, and predicts on after SIGTERM."""
    if command == "fit":
        process = start("run", "--last_checkpoint", "false")
    else:
        words = [*WORDS, "--data.test_images", "30", "--data.batch_size", "1", "--trainer.max_epochs", "1"]
        fit(*words, "--data.train_images", "40", run_dir="run")
        slow = "lit_basics.ProcessSettings"  # any callback, to be made slow
        (tmp_path / "slow.py").write_text(
            "import sys, time\nfrom lit_basics import ProcessSettings\n\n"
            "def wait(*_):\n    print('begun', flush=True)\n    time.sleep(0.3)\n\n"
            "ProcessSettings.on_test_batch_start = ProcessSettings.on_predict_batch_start = wait\n"
            "from lit_basics.cli import main\nsys.exit(main())\n"
        )
        line = [sys.executable, "slow.py", command, "--run_dir", "run", "--trainer.callbacks", slow]
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
        )
        while "begun" not in process.stdout.readline():
            assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert "test/loss" not in output
    assert not (tmp_path / "run" / "predictions.npz").exists()
    assert (error.endswith("stopped by a signal\n")) == (command != "fit" or code == 143)


def test_what_nohup_ignores_stays_ignored(tmp_path):
    seen = []

    class Ends(LitBlitzNet):
        def on_train_batch_end(self, *_):
            seen.append(signal.getsignal(signal.SIGHUP))

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        in_a_project(LastCheckpoint(str(tmp_path))).fit(Ends(), SyntheticCIFAR10(64, 16, batch_size=16))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert set(seen) == {signal.SIG_IGN}


@pytest.mark.filterwarnings("ignore:this fit begins anew")
def test_a_requeued_job_that_would_begin_anew_is_refused(tmp_path, monkeypatch):
    """Without the refusal it trains from step 0, each time that it is requeued."""
    data = SyntheticCIFAR10(64, 16, batch_size=16)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    in_a_project(LastCheckpoint(str(tmp_path))).fit(LitBlitzNet(), data)  # the first start was killed before it saved
    saver = LastCheckpoint(str(tmp_path))
    with pytest.raises(UserError, match=r"was requeued, but would begin anew beside .*last.ckpt"):
        in_a_project(saver).fit(LitBlitzNet(), data)
    search = LearningRateFinder(num_training_steps=3, update_attr=False)  # leaves its own ckpt_path
    with pytest.raises(UserError, match=r"was requeued"):
        quiet_trainer(search, Preemption(saver), saver, enable_checkpointing=True).fit(LitBlitzNet(), data)
    more = in_a_project(saver, max_epochs=2)
    more.fit(LitBlitzNet(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert more.current_epoch == 2
    in_a_project(saver).fit(LitBlitzNet(), data)  # a second stage, over what this process has saved


def test_a_kill_loses_little_and_the_run_goes_on(whole, tmp_path, capsys):
    process = start("run")
    process.kill()
    process.communicate()
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] >= 43  # of 60: an epoch
    assert main(["fit", *WORDS, "--run_dir", "run", "--resume", "auto"]) == 0
    assert "starting afresh" not in capsys.readouterr().out
    check(whole, Path("run"))
