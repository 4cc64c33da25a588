"""Damaged checkpoints: each is seen and named, the one before it is used, and the training finishes.

Without the checksums beside the files one flip in ten loads silently, without the archive's as well all but one in
twenty (torch.load does not look at them); without the previous file a damaged one is the end of the run.
"""

import random
import shutil
import warnings

import pytest
import torch
from reliability.processes import finish, results, start_fit, until

from lit_basics.checkpoint_files import load_checked, previous_path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, whole):
    """A run that was killed in the middle, and what it would have ended with."""
    run = tmp_path_factory.mktemp("damage") / "run"
    process = start_fit(run)
    path = run / "checkpoints" / "last.ckpt"
    assert until(lambda: previous_path(path).exists(), process)
    process.kill()
    process.join()
    return run, whole[0]


def damages(content, flips, truncations, seed=0):
    draws = random.Random(seed)
    for place in draws.sample(range(len(content) * 8), flips):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        yield f"bit {place}", bytes(damaged)
    for length in [0, *draws.sample(range(len(content)), truncations - 1)]:
        yield f"length {length}", content[:length]


def check_damages(stopped, tmp_path, flips, truncations, resumed):
    """Damage ``last.ckpt``; load it each time, and ``resumed`` times go on to the end of the training."""
    run, expected = stopped
    good = (run / "checkpoints" / "last.ckpt").read_bytes()
    before = torch.load(previous_path(run / "checkpoints" / "last.ckpt"), weights_only=True)
    every = (flips + truncations) // resumed
    seen = finished = 0
    for number, (name, content) in enumerate(damages(good, flips, truncations)):
        copy = tmp_path / f"run{number}"
        to_the_end = number % every == 0
        shutil.copytree(run, copy) if to_the_end else shutil.copytree(run / "checkpoints", copy / "checkpoints")
        path = copy / "checkpoints" / "last.ckpt"
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load_checked(path)
        assert [w for w in caught if f"{path} is damaged" in str(w.message)], name
        assert loaded["global_step"] == before["global_step"]
        for key, value in before["state_dict"].items():
            assert torch.equal(loaded["state_dict"][key], value), name
        seen += 1
        if to_the_end:
            finish(start_fit(copy, "--resume", "auto"), copy)
            assert "last.ckpt is damaged" in (tmp_path / f"run{number}.txt").read_text(), name
            assert results(copy) == expected, name
            finished += 1
        shutil.rmtree(copy)
    print(f"\n{flips} flips and {truncations} truncations: {seen} seen and fallen back from, {finished} runs finished")
    assert seen == flips + truncations


def test_a_damaged_checkpoint_is_named_and_the_run_finishes(stopped, tmp_path):
    check_damages(stopped, tmp_path, flips=4, truncations=2, resumed=2)


@pytest.mark.slow
def test_five_hundred_flips_and_fifty_truncations(stopped, tmp_path):
    check_damages(stopped, tmp_path, flips=500, truncations=50, resumed=55)
