"""What is done for speed takes nothing away, and the benchmarks run."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import fit
from torch import nn

from lit_basics import DurableCheckpointIO
from lit_basics.callbacks.names import parameters_by_name

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_a_parameter_that_joins_the_optimizer_is_named():
    """Without the comparison of ids, the second list is the first."""
    module = pl.LightningModule()
    module.net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(module.net[0].parameters(), lr=0.1)
    assert [name for name, _ in parameters_by_name(module, optimizer)] == ["0.weight", "0.bias"]
    optimizer.add_param_group({"params": list(module.net[1].parameters())})
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [name for name, _ in parameters_by_name(module, optimizer)] == names
    assert [name for name, _ in parameters_by_name(module, optimizer)] == names


@pytest.mark.parametrize("options", [{"asynchronous": True}, {"min_seconds": 60.0}])
def test_what_is_saved_later_is_a_copy_that_shares_what_was_shared(tmp_path, monkeypatch, options):
    """Without the copy the weights are zeros; with one tensor by tensor the tied ones are two."""
    plugin, weight, save = DurableCheckpointIO(**options), torch.ones(50), torch.save
    gradients = (torch.ones(3, requires_grad=True) * 2).sum()  # part of a graph: such cannot be deep-copied
    state = {"state_dict": {"weight": weight, "tied": weight[:10]}, "loss": gradients, "list": [1]}
    plugin.save_checkpoint({"state_dict": {}}, tmp_path / "a.ckpt")
    threads, hold = [], threading.Event()

    def late(*args, **kwargs):
        hold.wait(10)
        threads.append(threading.current_thread())
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", late)
    plugin.save_checkpoint(state, tmp_path / "a.ckpt")
    weight.zero_()
    state["list"].append(2)
    hold.set()
    plugin.teardown()
    assert (threads == [threading.main_thread()]) == ("asynchronous" not in options)
    loaded = plugin.load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(50))
    assert loaded["loss"] == 6
    assert loaded["list"] == [1]
    loaded["state_dict"]["weight"].fill_(3)
    assert torch.equal(loaded["state_dict"]["tied"], torch.full((10,), 3.0))


def test_fit_imports_nothing_that_the_run_does_not_need():
    words = ["fit", "--config", "linear", "--trainer.max_epochs", "1", "--run_dir", "run"]
    code = (
        "import gc, sys\n"
        "from lit_basics.cli import main\n"
        f"assert main({words}) == 0\n"
        "assert gc.isenabled()\n"
        "unneeded = ('wandb', 'tensorboard', 'lit_basics.verification')\n"
        "found = [name for name in sys.modules if name.startswith(unneeded)]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_profiler_of_the_users_profiles(tmp_path):
    profiler = {"class_path": "SimpleProfiler", "init_args": {"dirpath": str(tmp_path), "filename": "times"}}
    fit("--config", "linear", "--trainer.max_epochs", "2", f"--trainer.profiler={json.dumps(profiler)}")
    assert "run_training_epoch" in (tmp_path / "fit-times.txt").read_text()


@pytest.mark.slow
def test_the_benchmarks_run(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--rounds", "1", "--json", "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "figures.json").read_text())
    figures = [figure for result in results.values() for figure in result["figures"]]
    wanted = [figure for figure in figures if figure["wanted"] is not None]
    assert len(wanted) >= 15
    assert all(
        figure["verdict"] == ("PASS" if figure["median"] <= figure["wanted"] else "FALLS SHORT") for figure in wanted
    )
    for figure in wanted:
        assert figure["name"] in done.stdout
