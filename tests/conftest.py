"""Every test runs in one thread, from the default seed, in an empty folder."""

import os

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
