"""kill -9 at random moments: a restarted run ends as one that was never killed, bit for bit.

Each kill falls between the first batch and the last; a run that has finished before does not count and another is
taken. Without ``RandomState``'s restore the weights differ; without the loader's state
(``ArrayLoader.load_state_dict``) the samples and the rows do.
"""

import random
import time

import pytest
from reliability.processes import STEPS, finish, results, start_fit, step_of, until


def kill_within_training(run, delay, *more):
    """Start a run, kill it ``delay`` seconds after its first batch, and return whether it was still training."""
    size = (run / "seen0.txt").stat().st_size if run.exists() else 0
    process = start_fit(run, *more)
    assert until(lambda: (run / "seen0.txt").exists() and (run / "seen0.txt").stat().st_size > size, process)
    time.sleep(delay)
    training = process.is_alive()
    process.kill()
    process.join()
    return training and process.exitcode == -9


def began_at(run, size):
    """Return the step at which a run began that found ``size`` bytes of witness; None if it made no step."""
    said = (run / "seen0.txt").read_bytes()[size:]
    return int(said.split()[0]) if said else None


def check_killed_runs(tmp_path, whole, runs, kills, seed):
    expected, seconds = whole
    draws = random.Random(seed)
    resumed_from, number = [], 0
    while len(resumed_from) < runs * kills:
        run = tmp_path / f"run{number}"
        number += 1
        points = []
        for _ in range(kills):
            more = ("--resume", "auto") if points else ()
            size = (run / "seen0.txt").stat().st_size if points else 0
            if not kill_within_training(run, draws.uniform(0, 0.9 * seconds / kills), *more):
                break
            assert began_at(run, size) == (points[-1] if points else 0)
            # a kill before the first save leaves nothing to go on from, and the restart begins anew
            points.append(step_of(run) if (run / "checkpoints" / "last.ckpt").exists() else 0)
        if len(points) < kills:
            continue
        size = (run / "seen0.txt").stat().st_size
        finish(start_fit(run, "--resume", "auto"), run)
        assert began_at(run, size) == (points[-1] if points[-1] < STEPS else None)
        assert results(run) == expected, (run, points)
        resumed_from += points
    steps = sorted(resumed_from)
    print(
        f"\n{len(steps)} kills in {runs} runs ({number - runs} runs finished before a kill and do not count), all "
        f"equal; resumed from steps {steps[0]} to {steps[-1]}, {len(set(steps))} different, "
        f"median {steps[len(steps) // 2]} of {STEPS}"
    )
    return steps


def test_a_killed_run_ends_as_if_it_had_not_been(whole, tmp_path):
    check_killed_runs(tmp_path, whole, runs=1, kills=2, seed=0)


@pytest.mark.slow
def test_a_hundred_kills(whole, tmp_path):
    steps = check_killed_runs(tmp_path, whole, runs=100, kills=1, seed=1)
    assert len(set(steps)) > 30


@pytest.mark.slow
def test_twenty_runs_killed_five_times_each(whole, tmp_path):
    steps = check_killed_runs(tmp_path, whole, runs=20, kills=5, seed=2)
    assert len(set(steps)) > 30
