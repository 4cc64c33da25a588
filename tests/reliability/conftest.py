"""The run that the stopped ones are compared with."""

import time

import pytest
from reliability.processes import STEPS, assert_each_sample_once, finish, lines, results, start_fit, until


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What a run that nobody stops ends with, and the seconds it takes to train."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = start_fit(run)
    assert until(lambda: lines(run), process)
    begun = time.monotonic()
    finish(process, run)
    seconds = time.monotonic() - begun
    expected = results(run)
    assert expected["step"] == STEPS
    assert_each_sample_once(expected["samples"], 5, 544)
    return expected, seconds
