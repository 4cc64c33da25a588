"""Real processes, really signalled."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_equal, fit, metrics

from lit_basics.cli import main

WORDS = (
    *("--config", "quickstart", "--data.train_images", "3000", "--trainer.max_epochs", "6"),
    *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
)


def start(run_dir, *more):
    command = [sys.executable, "-m", "lit_basics", "fit", *WORDS, "--run_dir", str(run_dir), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rows = Path(run_dir) / "metrics.csv"
    deadline = time.monotonic() + 120
    while not rows.is_file() or rows.read_text().count("\n") < 60:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_the_state_and_the_run_goes_on(number, code, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = start("run")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "go on with --resume run" in error
    assert "Traceback" not in error
    stopped = torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 50 <= stopped < 258
    assert main(["fit", "--resume", "run"]) == 0
    check(whole, Path("run"))


def test_a_kill_loses_little_and_the_run_goes_on(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = start("run")
    process.kill()
    process.communicate()
    assert main(["fit", *WORDS, "--run_dir", "run", "--resume", "auto"]) == 0
    check(whole, Path("run"))
