"""``--resume_reset``: the weights, the optimizer and the counters go on; the data begins anew with the next epoch."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import assert_equal, fit, metrics, write_npz

from lit_basics import LitLeNet5, SyntheticCIFAR10
from lit_basics.cli import main

SMALL = ("--config", "quickstart", "--data.train_images", "500", "--data.test_images", "20")
SMALL += ("--trainer.log_every_n_steps", "1")


def newest(run="run"):
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


def files(run):
    return {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def resumed(*words):
    return main(["fit", "--resume", "run", "--trainer.max_epochs", "3", *words])


@pytest.mark.parametrize(
    ("mode", "max_steps", "words", "steps", "line"),
    [
        ("automatic", -1, ["--data.batch_size", "32"], 15, "resuming with data.batch_size 32 (was 64)"),
        ("automatic", 4, ["--data.batch_size", "32"], 15, "resuming with data.batch_size 32 (was 64)"),
        ("automatic", 4, ["--data.batch_size", "128"], 4, "resuming with data.batch_size 128 (was 64)"),
        ("manual", 4, ["--data.train_images", "300"], 5, "resuming with data.train_images 300 (was 500)"),
        ("manual", -1, ["--data.seed", "3"], 8, "resuming with data.seed 3 (was 0)"),
        ("automatic", 4, ["--seed_everything", "3"], 8, "resuming with seed_everything 3 (was 0)"),
        ("automatic", -1, ["--model.activation", "relu"], 8, "resuming with model.activation relu (was tanh)"),
    ],
)
def test_with_the_flag_the_run_goes_on(mode, max_steps, words, steps, line, tmp_path, capsys):
    """Without the reset in ``ResumedData`` the order refuses another order, and "begin anew" is missing."""
    mode = [] if mode == "automatic" else ["--config", "manual"]
    run = fit(*SMALL, *mode, "--trainer.max_epochs", "1", "--trainer.max_steps", str(max_steps))
    before, contents = newest(), files(run)
    assert resumed("--trainer.max_steps", "-1", *words) == 2
    assert "--resume_reset" in capsys.readouterr().err
    assert files(run) == contents
    assert resumed("--trainer.max_steps", "-1", *words, "--resume_reset") == 0
    out = capsys.readouterr().out
    assert line in out
    assert "begin anew with epoch 1" in out
    assert ("the validation images are drawn anew" in out) == ("--data.seed" in words)
    assert newest()["global_step"] == before["global_step"] + 2 * steps  # two whole epochs of the new length
    assert sorted(metrics(run)) == list(range(before["global_step"] + 2 * steps + 1))[1:]
    if "--seed_everything" in words:  # without the reset of the random state it is the checkpoint's
        assert not torch.equal(newest()["random_state"][0]["torch"], before["random_state"][0]["torch"])
    # and from there on it is a run like any other
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "4"]) == 0
    assert newest()["global_step"] == before["global_step"] + 3 * steps


@pytest.mark.parametrize("at", [3, 8])
def test_a_run_that_a_signal_stopped_amid_an_epoch(at, monkeypatch):
    """Without ``ResumedData``'s end of the checkpoint's epoch its rest is done first: fewer steps, or more."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop = lambda self, *_: signal.raise_signal(signal.SIGUSR1) if self.global_step == at - 1 else None  # noqa: E731
        patch.setattr(LitLeNet5, "on_train_batch_start", stop)
        assert main(["fit", *SMALL, "--trainer.max_epochs", "3", "--run_dir", "run"]) == 138
    signal.signal(signal.SIGTERM, before)
    assert newest()["global_step"] == at
    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(LitLeNet5, "on_train_epoch_start", lambda self: begun.append(self.current_epoch))
        assert resumed("--data.batch_size", "32", "--resume_reset") == 0
    assert newest()["global_step"] == at + 2 * 15
    assert len(begun) == 2  # without the reset of the loop's restart stage the first of them is not begun
    batches = newest()["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert batches["ready"] == batches["completed"] == at + 2 * 15


def test_half_an_accumulated_step_is_left_behind(monkeypatch):
    """Without ``ResumedData``'s dropping of "lit_basics" its loss counts in the first step of the new data."""
    words = (*SMALL, "--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "2")

    def save(self, outputs, batch, batch_idx):
        if batch_idx in (1, 2):  # one step, then half of another: the weights are the same
            self.trainer.save_checkpoint(f"run/checkpoints/{batch_idx}.ckpt")

    with monkeypatch.context() as patch:
        patch.setattr(LitLeNet5, "on_train_batch_end", save)
        fit(*words, "--trainer.max_epochs", "1")
    assert torch.load("run/checkpoints/2.ckpt", weights_only=True)["lit_basics"]["recorder"]["unfinished"]
    rows = []
    for name in ("1", "2"):
        shutil.copytree("run", name)
        reset = ("--data.seed", "3", "--resume_reset", "--trainer.max_epochs", "2")
        assert main(["fit", "--resume", f"{name}/checkpoints/{name}.ckpt", *reset]) == 0
        rows.append(metrics(Path(name)))
    assert rows[0] == rows[1]


def test_it_is_the_state_and_the_order_that_are_promised():
    """Weights and momentum of the checkpoint, then the documented order of the next epoch."""
    fit(*SMALL, "--trainer.max_epochs", "1", "--trainer.max_steps", "4")
    state = newest()
    assert resumed("--trainer.max_steps", "5", "--data.batch_size", "32", "--resume_reset") == 0
    data = SyntheticCIFAR10(500, 20, batch_size=32)
    data.setup("fit")
    model = LitLeNet5()
    model.load_state_dict(state["state_dict"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    optimizer.load_state_dict(state["optimizer_states"][0])
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    x, y = next(iter(loader))
    torch.nn.functional.cross_entropy(model.net(x), y).backward()
    optimizer.step()
    assert_equal(newest()["state_dict"], model.state_dict())


def test_data_of_another_length_behind_the_same_key(tmp_path, capsys):
    """Without ``ResumedData`` the run goes on after the epoch's end with exit code 0 and not a word."""
    words = ("--model", "LitLeNet5", "--data", "NpzDataModule", "--data.path")
    run = fit(*words, write_npz(tmp_path / "a.npz", 100, 20), "--trainer.max_epochs", "1")
    contents = files(run)
    longer = ("--data.path", write_npz(tmp_path / "b.npz", 200, 20))
    assert resumed(*longer) == 2
    assert "had size 90, here it is 180: cannot resume; by command, --resume_reset" in capsys.readouterr().err
    assert files(run) == contents
    assert resumed(*longer, "--resume_reset") == 0
    assert "resuming with data of size 180 (was 90)" in capsys.readouterr().out
    assert newest()["global_step"] == 2 + 2 * 3


def test_another_number_of_processes(capsys):
    """Without "world_size" among what is compared each process would go on at another place of the data."""
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    state = newest()  # to be as of two processes
    state["random_state"] *= 2
    for part in state["loops"]["fit_loop"]["state_dict"]["combined_loader"]:
        part["world_size"] = 2
    (run / "checkpoints" / "last.ckpt.sha256").unlink()
    torch.save(state, run / "checkpoints" / "last.ckpt")
    contents = files(run)
    assert resumed() == 2
    assert "had world_size 2, here it is 1" in capsys.readouterr().err
    assert files(run) == contents
    assert resumed("--resume_reset") == 0
    assert "data of world_size 1 (was 2)" in capsys.readouterr().out
    assert newest()["global_step"] == 24


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--model.num_classes", "11"], ["another model"]),
        (["--model", "LitBlitzNet"], ["another model"]),
        (
            ["--model.optimizer", "Adam"],
            ["torch.optim.Adam: the run to resume has torch.optim.SGD", "cannot change with"],
        ),
        (["--model.automatic_optimization", "false"], ["the run to resume has True", "cannot change with"]),
        (["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "1"], ["cannot change with"]),
    ],
)
def test_what_cannot_take_the_state_is_refused_even_so(words, fragments, capsys):
    """Without ``RESTORED`` the last three train on with a state that is not theirs."""
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    contents = files(run)
    capsys.readouterr()
    assert resumed("--resume_reset", *words) == 2
    message = capsys.readouterr().err
    assert len(message) < 400
    for fragment in fragments:
        assert fragment in message
    assert files(run) == contents


def test_a_part_of_an_optimizer_is_not_changed_in_silence(capsys):
    words = ("--config", "muon", *SMALL[2:], "--trainer.max_epochs", "1")
    fit(*words)
    assert resumed("--model.optimizer.matrices.lr", "0.5") == 2
    assert "--model.optimizer.matrices.lr 0.5: the run to resume has 0.01" in capsys.readouterr().err
