"""Every test runs in one thread, from the default seed, in an empty folder."""

import os
import sys

import pytest
import torch

os.environ["WANDB_SILENT"] = "true"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_BASICS_RUN_DIR", raising=False)
    torch.manual_seed(0)
    yield
    for name in ("LIT_BASICS_RUN_DIR", "WANDB_MODE"):  # set for the processes that a run starts
        os.environ.pop(name, None)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write modules of the user's own, which leave nothing behind."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(text, name="mine_in_a_test"):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)
