"""SLURM's signal before the end of the time, and a second Ctrl-C.

Without ``_requeue`` no call of ``scontrol`` is recorded; with Lightning's own handler it comes before the save
at the step boundary, and the exit code is 0. Without the second Ctrl-C's rule the process sits in its step.
"""

import os
import re
import signal
import sys
import time

import pytest
from reliability.jobs import PROGRAM, Job
from reliability.processes import WORDS, lines, results, step_of

COMMAND = [sys.executable, "-m", PROGRAM, "fit", *WORDS]
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "127.0.0.1",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program of that name that writes down its arguments and, as SLURM does, sends the job SIGTERM."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nkill -TERM $PPID\nexit ${{SCONTROL_CODE:-0}}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


def slurm_job(run, **more):
    return Job([*COMMAND, "--run_dir", str(run), "--resume", "auto"], f"{run}.txt", **{**SLURM, **more})


def signalled_at(started, run, step, number=signal.SIGUSR1):
    started.wait_for(lambda: max(lines(run), default=-1) >= step)
    os.kill(started.pid, number)
    return started.process.wait(120)


def test_slurm_requeues_the_job_after_the_state_is_saved(scontrol, tmp_path):
    run = tmp_path / "run"
    started = slurm_job(run)
    try:
        assert signalled_at(started, run, 20) == 128 + signal.SIGUSR1, started.output.read_text()
    finally:
        started.end()
    said = started.output.read_text()
    assert scontrol.read_text() == "requeue 4711\n"
    assert "SLURM job 4711 is requeued" in said
    assert step_of(run) == len(lines(run)) > 20
    assert not list(run.rglob("hpc_ckpt*")), "Lightning's handler has run too"


@pytest.mark.slow
def test_a_requeued_job_ends_as_one_that_was_not(scontrol, tmp_path, whole):
    run = tmp_path / "run"
    for step in (20, 60, 110):  # the job's script is run again by SLURM
        array = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}
        assert signalled_at(slurm_job(run, **array), run, step) == 138
    assert slurm_job(run).process.wait(120) == 0
    assert scontrol.read_text() == "requeue 4700_3\n" * 3
    assert results(run) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "calls", "said"),
    [
        ({"SCONTROL_CODE": "1"}, "requeue 4711\n", "SLURM job 4711 could not be requeued: code 1"),
        ({"SLURM_JOB_NAME": "bash"}, None, "the state is saved"),  # an interactive job
    ],
)
def test_a_job_that_is_not_requeued_is_saved_all_the_same(more, calls, said, scontrol, tmp_path):
    run = tmp_path / "run"
    started = slurm_job(run, **more)
    assert signalled_at(started, run, 20) == 138
    assert (scontrol.read_text() if scontrol.exists() else None) == calls
    assert said in started.output.read_text()
    assert step_of(run) == len(lines(run)) > 20


@pytest.mark.slow
def test_two_ranks_requeue_once(scontrol, tmp_path):
    run, ranks = tmp_path / "run", []
    for rank in ("0", "1"):
        two = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        words = ["--run_dir", str(run), "--config", "ddp"]
        ranks.append(Job([*COMMAND, *words], tmp_path / f"{rank}.txt", **{**SLURM, **two}))
    ranks[0].wait_for(lambda: min(max(lines(run, rank), default=-1) for rank in (0, 1)) >= 20)
    os.kill(ranks[1].pid, signal.SIGUSR1)  # to one of them
    assert [rank.process.wait(120) for rank in ranks] == [138, 138]
    assert scontrol.read_text() == "requeue 4711\n"
    assert step_of(run) == len(lines(run, 0)) == len(lines(run, 1)) > 20


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    run = tmp_path / "run"
    started = Job([*COMMAND, "--run_dir", str(run)], f"{run}.txt", SLEEP_AT_STEP="30")
    try:
        started.wait_for(lambda: max(lines(run), default=-1) >= 30)
        for seconds in (0.0, 0.2):  # the terminal's and the launcher's are one
            time.sleep(seconds)
            os.kill(started.pid, signal.SIGINT)
        time.sleep(2)
        assert started.process.poll() is None, started.output.read_text()  # waits for the step to end
        os.kill(started.pid, signal.SIGINT)
        assert started.process.wait(20) == -signal.SIGINT
    finally:
        started.end()
    said = started.output.read_text()
    assert said.count("again leaves at once") == 1
    assert not re.search("Traceback", said)
