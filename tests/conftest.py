"""Every test runs in one thread, from the default seed, in an empty folder."""

import os
import sys

import pytest
import torch

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LIT_BASICS_RUN_DIR")

# neither this machine's GPUs nor its launcher are the suite's; the processes that tests start inherit this
for name in list(os.environ):
    if name in LAUNCHERS or name.startswith(("SLURM_", "TORCHELASTIC_", "PL_", "WANDB_")):
        del os.environ[name]
if "LIT_BASICS_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_SILENT"] = "true"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    os.environ.pop("WANDB_MODE", None)  # set for the processes that a run starts


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
