"""Two processes, by Lightning's launcher and by torchrun: killed, and stopped by a signal to one of them.

Without the agreement of ``Preemption`` (``_highest``) the ranks hang or stop at different steps; without
``let_launcher_leave`` Lightning's launcher may kill rank 0 (-9) in place of 143; without
``ending_with_launcher`` rank 1 outlives a rank 0 that is killed early.
"""

import os
import random
import re
import signal
import time

import pytest
from reliability.jobs import LAUNCHERS, Job
from reliability.processes import assert_each_sample_once, lines, results, step_of

WORDS = (
    *("fit", "--config", "quickstart", "--config", "ddp", "--data.train_images", "800", "--data.val_size", "80"),
    *("--data.batch_size", "8", "--trainer.max_epochs", "4", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
)
STEPS = 360
RESUME = ("--resume", "auto")


def job(launcher, run, *more):
    return Job([*LAUNCHERS[launcher], *WORDS, "--run_dir", str(run), *more], f"{run}.txt")


def at_step(started, run, step):
    """Wait until both ranks are at a step, and return their processes."""
    started.wait_for(lambda: min(max(lines(run, rank), default=-1) for rank in (0, 1)) >= step)
    return started.ranks()


def finished(launcher, run, *more):
    started = job(launcher, run, *more)
    try:
        assert started.process.wait(300) == 0, started.output.read_text()
    finally:
        started.end()
    return results(run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two ranks that nobody stops end with."""
    run = tmp_path_factory.mktemp("two") / "run"
    expected = finished("lightning", run)
    assert expected["step"] == STEPS
    assert_each_sample_once(expected["samples"], 4, 720)
    return expected


def check_stopped(launcher, target, step, run):
    """Send SIGTERM at a step; assert that all is well and return the seconds until the last process had left."""
    started = job(launcher, run)
    try:
        ranks = at_step(started, run, step)
        os.kill({"parent": started.pid, "rank 0": ranks[0], "rank 1": ranks[1]}[target], signal.SIGTERM)
        codes, seconds = started.wait(ranks)
    finally:
        started.end()
    said = started.output.read_text()
    assert sorted(re.findall(r"rank \d leaves with \d+", said)) == [f"rank {r} leaves with 143" for r in (0, 1)], said
    if launcher == "lightning":
        assert [codes[pid] for pid in ranks] == [143, 143], (codes, said)
    else:  # torchrun has reaped them; it reports those that ended before it was stopped itself
        assert set(re.findall(r"exitcode +: (-?\d+)", said)) <= {"143"}, said
    assert said.count("stopped by a signal, the state is saved") == 1
    # the same step on both, and nothing of it lost
    assert step_of(run) == len(lines(run, 0)) == len(lines(run, 1)) > step
    return seconds


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path):
    check_stopped("lightning", "rank 1", 30, tmp_path / "run")


@pytest.mark.slow
def test_a_rank_0_that_leaves_slowly_is_not_killed_by_its_launcher(tmp_path, monkeypatch):
    """Without ``let_launcher_leave``: Lightning looks every five seconds whether rank 1 has left, and kills."""
    monkeypatch.setenv("RANK_0_LEAVES_IN", "8")
    check_stopped("lightning", "rank 1", 30, tmp_path / "run")


@pytest.mark.slow
def test_a_guard_lets_rank_0_leave_slowly_too(tmp_path, monkeypatch):
    """Without ``let_launcher_leave`` it is killed while it writes its checkpoint, or finishes a W&B run."""
    monkeypatch.setenv("RANK_0_LEAVES_IN", "8")
    started = job("lightning", tmp_path / "run", "--model.optimizer.lr", "1e30", "--model.activation", "relu")
    try:
        started.wait_for(started.ranks)
        ranks = started.ranks()
        codes, _ = started.wait(ranks)
    finally:
        started.end()
    said = started.output.read_text()
    assert [codes[pid] for pid in ranks] == [1, 1], (codes, said)
    assert said.count("lit_basics: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "count"), [("lightning", 20), ("torchrun", 6)])
def test_signals(launcher, count, whole, tmp_path):
    draws = random.Random(launcher)
    taken = []
    for number in range(count):
        run, target = tmp_path / f"run{number}", ("rank 0", "rank 1", "parent")[number % 3]
        taken.append(check_stopped(launcher, target, draws.randrange(300), run))
        if number % 5 == 0:
            assert finished(launcher, run, *RESUME) == whole
    print(
        f"\n{launcher}: {count} of {count} left with 143; seconds {min(taken):.1f} to {max(taken):.1f}; "
        "each 5th resumed, equal"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "count"), [("lightning", 10), ("torchrun", 4)])
def test_kills(launcher, count, whole, tmp_path):
    draws = random.Random(launcher)
    taken, steps = [], []
    for number in range(count):
        run = tmp_path / f"run{number}"
        started = job(launcher, run)
        try:
            ranks = at_step(started, run, draws.randrange(STEPS - 20))
            steps.append(len(lines(run)))
            os.kill(ranks[number % 2], signal.SIGKILL)
            taken.append(started.wait(ranks)[1])  # also the other rank leaves
        finally:
            started.end()
        assert finished(launcher, run, *RESUME) == whole
    print(
        f"\n{launcher}: {count} of {count} equal after a kill at steps {sorted(steps)}; "
        f"the other rank left within {min(taken):.1f} to {max(taken):.1f} s"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_rank_1_does_not_wait_for_a_launcher_that_was_killed(seconds, tmp_path):
    started = job("lightning", tmp_path / "run")
    try:
        started.wait_for(started.ranks)
        time.sleep(seconds)
        ranks = started.ranks()
        os.kill(started.pid, signal.SIGKILL)
        started.wait(ranks)
    finally:
        started.end()
