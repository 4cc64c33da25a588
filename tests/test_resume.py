"""A resumed run ends with the weights, the optimizer, the random state and the rows of one that never stopped."""

import functools
import importlib
import os
import random
import shutil
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from helpers import assert_equal, fit, metrics, quiet_trainer, write_npz
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_basics import (
    BestLossCheckpoint,
    LitBlitzNet,
    LitClassifier,
    RandomState,
    SyntheticCIFAR10,
    checkpoint_io,
    fitting,
)
from lit_basics.callbacks import last
from lit_basics.callbacks.last import LastCheckpoint
from lit_basics.callbacks.random_state import generator_states
from lit_basics.checkpoint_files import load_checked
from lit_basics.cli import main
from lit_basics.data.arrays import MEAN
from lit_basics.errors import UserError
from lit_basics.recipes import recipe_path
from lit_basics.resuming import check_changes, find_run, is_new_argument
from lit_basics.steps import at_step_boundary

SMALL = ("--config", "quickstart", "--data.train_images", "500", "--trainer.log_every_n_steps", "1")

CASES = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "validation within the epoch": {"val_check_interval": 2},
    "limited": {"limit_train_batches": 4},
    "clipped": {"gradient_clip_val": 0.1},
    # Lightning alone would end the epoch a second time and leave one out
    "steps": {"max_epochs": 5, "max_steps": 18},
    # Lightning alone would round the weights to float32
    "float64": {"precision": "64-true"},
    # Lightning alone would leave out its steps at the end of an epoch that was saved, or resumed
    "plateau": {"lr_scheduler": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10)},
}

MODES = {
    "automatic": {},
    "manual": {"automatic_optimization": False},
    "three steps": {"steps_per_execution": 3},
    "eight steps": {"steps_per_execution": 8},
}


class SaveEverywhere(Checkpoint):
    """Saves after every batch (but where an epoch's end or a validation follows at once) and every epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if at_step_boundary(trainer, halfway=True):
            trainer.save_checkpoint(self.folder / f"batch{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch}.ckpt")


def train(settings, mode, interval, checkpoint=None, save_to=None, epochs=3, callbacks=()):
    settings = dict(settings)
    lr_scheduler = settings.pop("lr_scheduler", lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.9))
    torch.manual_seed(0 if checkpoint is None else 99)
    random.seed(1)
    np.random.seed(2)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(196, 10)),
    )
    model = LitClassifier(
        net,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lr_scheduler=lr_scheduler,
        lr_interval=interval,
        **mode,
    )
    best = BestLossCheckpoint(f"best{checkpoint.stem if checkpoint else ''}")
    savers = [SaveEverywhere(save_to)] if save_to else []
    trainer = quiet_trainer(
        *(RandomState(), best, *savers, *callbacks),
        **{"enable_checkpointing": True, "max_epochs": epochs, **settings},
    )
    data = SyntheticCIFAR10(60, 10, batch_size=8, val_size=12, flip=True, crop=2)
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    optimizer = trainer.optimizers[0].state_dict()
    states = generator_states()
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "momentum": {str(k): v["momentum_buffer"] for k, v in optimizer["state"].items()},
        "random": {"torch": states["torch"], "numpy": states["numpy"][1]},
        "rest": (
            trainer.global_step,
            trainer.current_epoch,
            optimizer["param_groups"][0]["lr"],
            {name: value.item() for name, value in trainer.callback_metrics.items()},
            best.best_model_score.item(),
            states["python"],
        ),
    }


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("mode", [*list(MODES)[:-1], pytest.param("eight steps", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_resumes_exactly_from_every_step(case, mode, tmp_path):
    settings, interval = CASES[case], "step" if case == "clipped" else "epoch"
    whole = train(settings, MODES[mode], interval, save_to=tmp_path)
    last = f"epoch{whole['rest'][1] - 1}"
    checkpoints = [path for path in sorted(tmp_path.glob("*.ckpt")) if path.stem != last]
    assert len(checkpoints) >= 8
    if mode == "manual":  # the second epoch's batches, the first batch and the ends of epochs are enough
        middle = [f"batch{number}.ckpt" for number in (1, *range(7, 13))]
        checkpoints = [path for path in checkpoints if path.name in middle or path.stem.startswith("epoch")]
    for checkpoint in checkpoints:
        resumed = train(settings, MODES[mode], interval, checkpoint=checkpoint)
        for part in ("weights", "momentum", "random"):
            assert_equal(resumed[part], whole[part])
        assert resumed["rest"] == whole["rest"], checkpoint.stem


def test_no_step_boundary_where_a_validation_counted_over_epochs_is_due(tmp_path):
    """Lightning would not make up for the one after batch 9, the third of its epoch, which counts over all epochs."""
    train({"check_val_every_n_epoch": None, "val_check_interval": 9}, {}, "epoch", save_to=tmp_path)
    saved = {int(file.stem.removeprefix("batch")) for file in tmp_path.glob("batch*.ckpt")}
    assert saved == set(range(1, 18)) - {6, 12, 9}


def newest(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_by_command_the_run_goes_on_in_its_directory(tmp_path, capsys):
    whole = fit(*SMALL, "--trainer.max_epochs", "3", run_dir="whole")
    run = fit(*SMALL, "--trainer.max_epochs", "1", run_dir="run")
    capsys.readouterr()
    assert main(["fit", *SMALL, "--run_dir", "run", "--resume", "auto", "--trainer.max_epochs", "3"]) == 0
    assert "resuming with trainer.max_epochs 3 (was 1)" in capsys.readouterr().out
    assert_equal(newest(run)["state_dict"], newest(whole)["state_dict"])
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert_equal(torch.load(run / "best.pth", weights_only=True), torch.load(whole / "best.pth", weights_only=True))


def record(run):
    """Return the state of the run's BestLossCheckpoint."""
    return next(state for key, state in newest(run)["callbacks"].items() if key.startswith("BestLossCheckpoint"))


STOP = ("--trainer.callbacks+=lit_basics.verification.runs.StopAfter", "--trainer.callbacks.steps=10")
EARLY = ("monitor=val/loss", "min_delta=1000", "patience=3")
ENDS = {
    "max_steps before the first validation": (2, ["--trainer.max_steps=2"]),  # the best is then by train/loss
    "max_steps": (10, ["--trainer.max_steps=10"]),
    "max_steps with a validation": (11, ["--trainer.max_steps=11"]),
    "max_steps after the last validation": (15, ["--trainer.max_steps=15"]),
    "a request, as max_time's": (10, STOP),
    "EarlyStopping": (14, ["--trainer.callbacks+=EarlyStopping", *(f"--trainer.callbacks.{word}" for word in EARLY)]),
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A function that makes a whole run by these words, each once."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda *words: fit(*words, run_dir=folder / str(len(list(folder.iterdir())))))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("mode", [[], ["--model.steps_per_execution", "3"]])
@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_ends_within_an_epoch_goes_on_there(end, mode, whole_run, tmp_path):
    """Without the save within the epoch Lightning takes it for done, and the run lacks the rest of its steps."""
    every, (step, words) = ["--trainer.val_check_interval", "3", "--trainer.max_epochs", "3"], ENDS[end]
    whole = whole_run(*SMALL, *mode, *every)
    run = fit(*SMALL, *mode, *every, *words)
    ended = newest(run)["global_step"]
    assert step <= ended < step + (3 if words is STOP and mode else 1)
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "-1", "--trainer.callbacks", "null"]) == 0
    assert newest(run)["global_step"] == newest(whole)["global_step"] == 24
    assert_equal(newest(run)["state_dict"], newest(whole)["state_dict"])
    if ended == 15:  # the others had a validation at the end that the whole run has not
        assert_equal(*(torch.load(folder / "best.pth", weights_only=True) for folder in (run, whole)))
    records = [record(folder) for folder in (run, whole)]
    assert records[0]["monitor"] == records[1]["monitor"] == "val/loss"
    assert records[0]["best_model_score"] == records[1]["best_model_score"]
    rows, expected = metrics(run), metrics(whole)
    assert list(rows) == list(expected)
    for step in rows:
        if step != ended:  # this row keeps the mean, and the validation, of the epoch that was cut short
            assert rows[step]["train/loss"] == expected[step]["train/loss"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("every", [3, 1.0])
def test_a_run_that_early_stopping_ended_stays_ended(every, tmp_path, capsys):
    words = ["--trainer.val_check_interval", str(every), "--trainer.max_epochs", "6"]
    whole = fit(*SMALL, *words, run_dir="whole")
    run = fit(*SMALL, *words, *ENDS["EarlyStopping"][1])
    ended, rows = newest(run)["global_step"], (run / "metrics.csv").read_text()
    saved = (run / "checkpoints" / "last.ckpt").read_bytes()
    for _ in range(2):
        assert main(["fit", "--run_dir", str(run), "--resume", "auto"]) == 0
        assert f"EarlyStopping ended this run at step {ended}" in capsys.readouterr().out
        assert newest(run)["global_step"] == ended < 48
        assert (run / "checkpoints" / "last.ckpt").read_bytes() == saved
        assert (run / "metrics.csv").read_text() == rows
    assert main(["fit", "--resume", str(run), "--trainer.callbacks", "null"]) == 0
    assert newest(run)["global_step"] == 48
    assert_equal(newest(run)["state_dict"], newest(whole)["state_dict"])


@pytest.mark.parametrize("mode", ["automatic", "manual"])
def test_metrics_of_a_validation_within_the_epoch_are_kept(mode, tmp_path):
    """Without them a ReduceLROnPlateau finds none at the epoch's end, and the run cannot be resumed at all."""
    words = ["--trainer.val_check_interval", "3", "--trainer.max_epochs", "3", "--model.lr_monitor", "val/loss"]
    words += ["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.lr_scheduler.patience=0"]
    words += ["--model.lr_scheduler.threshold=10", "--model.automatic_optimization", str(mode == "automatic")]
    whole = fit(*SMALL, *words, run_dir="whole")
    run = fit(*SMALL, *words, "--trainer.max_steps", "15")  # two steps after the epoch's last validation
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "-1"]) == 0
    assert_equal(newest(run)["state_dict"], newest(whole)["state_dict"])
    rates = [newest(folder)["optimizer_states"][0]["param_groups"][0]["lr"] for folder in (run, whole)]
    assert rates[0] == rates[1] < 0.01


class StopAt(pl.Callback):
    """Ends a run after a batch, as max_time does."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.fit_loop.total_batch_idx + 1 == self.batch


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("mode", ["automatic", "manual"])
@pytest.mark.parametrize("batch", [9, 10, 11])
def test_a_run_that_ends_within_a_step_goes_on_there(batch, mode, tmp_path):
    settings = {"accumulate_grad_batches": 3}
    whole = train(settings, MODES[mode], "epoch")
    train(settings, MODES[mode], "epoch", callbacks=[StopAt(batch), LastCheckpoint(str(tmp_path))])
    resumed = train(settings, MODES[mode], "epoch", checkpoint=tmp_path / "last.ckpt")
    for part in ("weights", "momentum", "random"):
        assert_equal(resumed[part], whole[part])
    assert resumed["rest"] == whole["rest"]


def test_a_stop_that_must_wait_is_no_end(tmp_path, monkeypatch):
    """Without the look at ``min_epochs`` each batch after the request would be saved."""
    saved = []
    monkeypatch.setattr(last, "MIN_SECONDS", 1e6)
    save = LastCheckpoint.save
    monkeypatch.setattr(LastCheckpoint, "save", lambda self, trainer: [saved.append(1), save(self, trainer)])
    stop = ["--trainer.callbacks+=lit_basics.verification.runs.StopAfter", "--trainer.callbacks.steps=3"]
    run = fit(*SMALL, *stop, "--trainer.min_epochs", "2", "--trainer.max_epochs", "3")
    assert newest(run)["global_step"] == 16
    assert len(saved) <= 2


def test_rows_after_the_checkpoint_are_cut_and_made_again(tmp_path):
    run = fit(*SMALL, "--trainer.max_epochs", "2")
    rows = (run / "metrics.csv").read_text()
    with (run / "metrics.csv").open("a") as file:
        file.write("17,0.5\n9999,")  # a later row, and half a row: what a kill leaves
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "3"]) == 0
    assert (run / "metrics.csv").read_text().startswith(rows)
    assert max(metrics(run)) == 24


def test_auto_takes_the_newest_good_run_of_the_recipe(tmp_path, capsys):
    words = [*SMALL, "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *words, "--resume", "auto"]) == 0
    assert "starting afresh" in capsys.readouterr().out
    assert main(["fit", *words]) == 0
    first, second = sorted((tmp_path / "runs" / "quickstart").iterdir())
    for file in (second / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="is damaged .*; looking for an earlier run"):
        assert main(["fit", *words[:-4], "--resume", "auto", "--trainer.max_epochs", "2"]) == 0
    assert newest(first)["global_step"] == 16
    assert len(list((tmp_path / "runs" / "quickstart").iterdir())) == 2


def test_auto_takes_the_best_if_the_last_is_damaged_and_names_it(tmp_path):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    for name in ("last.ckpt", "last.ckpt.previous"):
        (run / "checkpoints" / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged.*; going on from .*best.ckpt"):
        assert main(["fit", *SMALL, "--run_dir", "run", "--resume", "auto", "--trainer.max_epochs", "2"]) == 0
    assert newest(run)["global_step"] == 16


def test_auto_does_not_go_round_a_whole_checkpoint_that_it_cannot_load(tmp_path, monkeypatch, capsys):
    """Without the look at ``is_whole`` a run that a newer version made is taken for damaged, and begun anew."""
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint_io, "installed", lambda package: "99.0")
        run = fit(*SMALL, "--trainer.max_epochs", "1", run_dir="runs/quickstart/newer")
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    for place in ([], ["--run_dir", str(run)]):
        assert main(["fit", *SMALL, *place, "--resume", "auto", "--trainer.max_epochs", "2"]) == 2
        assert "was written by a newer lit_basics, 99.0" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_auto_never_writes_over_a_run_that_it_cannot_read(tmp_path, capsys):
    """Without the error in ``find_run`` a new run is begun in the folder; all its files go when that fails."""
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for words in ([], ["--data", "NpzDataModule", "--data.path", "missing.npz"]):
        assert main(["fit", "--config", "quickstart", "--run_dir", "run", "--resume", "auto", *words]) == 2
        assert "last.ckpt is damaged" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_failing_start_removes_only_what_it_wrote(tmp_path):
    """Without the list of what was not there before, the rows of a run that was killed before its first save go."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step\n")
    words = ["--data", "NpzDataModule", "--data.path", "missing.npz", "--resume", "auto"]
    assert main(["fit", "--config", "quickstart", "--run_dir", "run", *words]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]


def test_without_last_ckpt_auto_goes_on_from_the_best(tmp_path, capsys):
    """Without ``best.ckpt`` among the candidates the run is begun anew, over its only checkpoint."""
    whole = fit(*SMALL, "--trainer.max_epochs", "3", run_dir="whole")
    run = fit(*SMALL, "--trainer.max_epochs", "1", "--last_checkpoint", "false", run_dir="run")
    assert not (run / "checkpoints" / "last.ckpt").exists()
    words = ["--last_checkpoint", "true", "--trainer.max_epochs", "3"]
    capsys.readouterr()
    assert main(["fit", "--resume", "run", *words]) == 2
    assert "last.ckpt; to go on from the best: --resume run/checkpoints/best.ckpt" in capsys.readouterr().err
    assert main(["fit", *SMALL, "--run_dir", "run", "--resume", "auto", *words]) == 0
    assert "resuming with trainer.max_epochs 3 (was 1)" in capsys.readouterr().out
    assert_equal(newest(run)["state_dict"], newest(whole)["state_dict"])
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_auto_does_not_begin_anew_over_checkpoints_of_ones_own(tmp_path, capsys):
    """Without the refusal ``metrics.csv`` and ``config.yaml`` are those of a new run."""
    words = [*SMALL, "--trainer.max_epochs", "2", "--last_checkpoint", "false", "--best_checkpoint", "false"]
    run, own = tmp_path / "my run", ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    fit(*words, *own, run_dir=run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["fit", *words, "--run_dir", str(run), "--resume", "auto"]) == 2
    newest = str(run / "checkpoints" / "epoch=1-step=16.ckpt")
    assert f"go on with --resume '{newest}', or name another --run_dir" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert main(["fit", "--resume", newest, "--trainer.max_epochs", "3"]) == 0
    assert list(metrics(run)) == list(range(1, 25))


def test_auto_begins_where_there_was_no_run(tmp_path):
    """Weights that lie there are not a run's, and a link may lead to nothing."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "pretrained.ckpt").write_bytes(b"weights")
    (checkpoints / "old.ckpt").symlink_to("gone.ckpt")
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1", "--run_dir", "run", "--resume", "auto"]) == 0
    assert newest(tmp_path / "run")["global_step"] == 8
    assert (checkpoints / "pretrained.ckpt").read_bytes() == b"weights"


def test_auto_takes_the_run_that_was_saved_last_whatever_its_name(tmp_path):
    """Without the sort by time ``zzz`` is taken, whose name comes last."""
    for name in ("zzz", "2026-01-01_00-00-00"):
        fit(*SMALL, "--trainer.max_epochs", "1", run_dir=f"runs/quickstart/{name}")
    assert main(["fit", *SMALL, "--resume", "auto", "--trainer.max_epochs", "2"]) == 0
    steps = {run.name: newest(run)["global_step"] for run in (tmp_path / "runs" / "quickstart").iterdir()}
    assert steps == {"zzz": 8, "2026-01-01_00-00-00": 16}


def test_what_is_null_now_is_a_change():
    """Without the keys that were nulled nothing is said, and the run goes on without its scheduler."""
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}
    saved = {"model": {"init_args": {"lr_scheduler": scheduler}}, "data": {"class_path": "SyntheticCIFAR10"}}
    with pytest.raises(UserError, match=r"lr_scheduler None: the run to resume has torch.optim.lr_scheduler.StepLR"):
        check_changes(saved, {**saved, "model": {"init_args": {"lr_scheduler": None}}})
    with pytest.raises(UserError, match="--data None"):
        check_changes(saved, {**saved, "data": None})
    assert check_changes(saved, {**saved, "new_option": None}) == {}


def test_an_argument_whose_name_begins_as_a_schedulers_is_not_one():
    """As one of a scheduler it could not change even with ``reset``."""

    def config(**arguments):
        return {"model": {"class_path": "mine.M", "init_args": arguments}}

    names = ("lr_decay", "lr_scheduler_gamma", "optimizer_name")
    assert check_changes(config(**dict.fromkeys(names, 0.5)), config(**dict.fromkeys(names, 0.1)), reset=True) == {}
    for name in ("lr_interval", "lr_monitor", "lr_scheduler"):
        with pytest.raises(UserError, match=f"model.{name} b: the run to resume has a, which cannot change"):
            check_changes(config(**{name: "a"}), config(**{name: "b"}), reset=True)


def test_what_is_not_there_any_more_is_a_change():
    """Without ``is_gone`` the run goes on with another model, and nothing is said."""
    options = {"a": 1, "drop": 0.5}
    saved = {"model": {"class_path": "mine.M", "init_args": {"options": options}}, "data": None}

    def typed(options):
        return {**saved, "model": {"class_path": "mine.M", "init_args": {"options": options}}}

    with pytest.raises(UserError, match=r"model.options.drop None: the run to resume has 0.5"):
        check_changes(saved, typed({"a": 1}))
    with pytest.raises(UserError, match=r"model.options {}: the run to resume has one"):
        check_changes(saved, typed({}))
    with pytest.raises(UserError, match=r"model.options.a 1: the run to resume has None"):
        check_changes(typed({}), saved)
    # with another class its arguments change, of which the class alone tells
    other = {**saved, "model": {"class_path": "mine.N", "init_args": {"size": 1}}}
    with pytest.raises(UserError, match=r"model.class_path mine.N"):
        check_changes(saved, other)


LATE = """
from torch import nn
from lit_basics import LitClassifier

class Late(LitClassifier):
    def __init__(self, **settings):
        super().__init__(net=nn.Identity(), **settings)

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

class Part(LitClassifier):
    def __init__(self, **settings):
        super().__init__(net=nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), **settings)
        self.strict_loading = False

    def predict_step(self, batch, batch_idx):
        return {"logits": self(batch[0])}

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "bias" not in name}
"""


@pytest.mark.parametrize("name", ["Late", "Part"])
def test_modules_that_are_complete_only_later_or_save_a_part(name, tmp_path, monkeypatch, capsys):
    """With a strict ``load_state_dict`` before Lightning's, both are checkpoints of another model."""
    module = f"late_{name}"
    (tmp_path / f"{module}.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["--allow_import", module]
    data = ["--data", "SyntheticCIFAR10", "--data.train_images", "100", "--data.test_images", "20"]
    bar = ["--trainer.enable_progress_bar", "false"]
    assert (
        main(
            ["fit", *mine, "--model", f"{module}.{name}", *data, *bar, "--trainer.max_epochs", "1", "--run_dir", "run"]
        )
        == 0
    )
    assert main(["fit", *mine, "--resume", "run", "--trainer.max_epochs", "2"]) == 0
    for command in ("validate", "test"):
        assert main([command, *mine, "--run_dir", "run"]) == 0
    assert main(["predict", *mine, "--run_dir", "run"]) == (2 if name == "Part" else 0)
    assert ("Part.predict_step returns a dict" in capsys.readouterr().err) == (name == "Part")
    assert main(["test", "--model", "LitLeNet5", *data, *bar, "--run_dir", "run"]) == 2
    assert "another model than LitLeNet5" in capsys.readouterr().err


def test_another_number_of_threads_is_said(tmp_path):
    # without the comparison in RandomState there is no warning
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"the run had {threads} threads, here are {threads + 1}"):
            assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    finally:
        torch.set_num_threads(threads)


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for more, longer in ([], "max_epochs"), (["--trainer.max_epochs", "9", "--trainer.max_steps", "8"], "max_steps"):
        assert main(["fit", "--resume", "run", *more]) == 0
        assert f"the run is complete at step 8; --trainer.{longer} makes it longer" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_has_used_up_its_time(tmp_path, capsys):
    """Without the look at the Timer it is said to be complete, and that more epochs make it longer."""
    fit(*SMALL, "--trainer.max_epochs", "2", "--trainer.max_steps", "10", "--trainer.max_time", "01:00:00:00")
    said = "max_time is used up at step 10; --trainer.max_time makes it longer, null lifts it"
    capsys.readouterr()
    more, time = ["--trainer.max_epochs", "3", "--trainer.max_steps", "-1"], ["--trainer.max_time", "00:00:00:00"]
    assert main(["fit", "--resume", "run", *more, *time]) == 0
    assert said in capsys.readouterr().out
    assert main(["fit", *SMALL, "--ckpt_path", "run/checkpoints/last.ckpt", "--run_dir", "other", *more, *time]) == 2
    assert said in capsys.readouterr().err
    with pytest.warns(UserWarning, match="add the following callbacks: \\['Timer'\\]"):
        assert main(["fit", "--resume", "run", *more, "--trainer.max_time", "null"]) == 0
    assert newest(tmp_path / "run")["global_step"] == 24


def test_a_new_learning_rate_wins_over_the_checkpoint(tmp_path, capsys):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "2", "--model.optimizer.lr", "0.001"]) == 0
    table = metrics(run)
    assert {row["lr"] for step, row in table.items() if step <= 8 and "lr" in row} == {0.03}
    assert {row["lr"] for step, row in table.items() if step > 8 and "lr" in row} == {0.001}
    assert "resuming with model.optimizer.lr 0.001 (was 0.03)" in capsys.readouterr().out


def test_a_new_learning_rate_is_scaled_by_the_schedule_so_far(tmp_path):
    """Without the scaling the rates after the resume are 0.4 and 0.2, or the old ones."""
    fall = [
        "--model.lr_scheduler",
        "StepLR",
        "--model.lr_scheduler.step_size",
        "1",
        "--model.lr_scheduler.gamma",
        "0.5",
    ]
    words = ["--config", "quickstart", "--data.train_images", "200", "--trainer.log_every_n_steps", "1"]
    run = fit(*words, *fall, "--model.optimizer.lr", "0.04", "--trainer.max_epochs", "2")
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "4", "--model.optimizer.lr", "0.4"]) == 0
    table = metrics(run)
    assert len(table) == 12
    assert [table[step]["lr"] for step in (1, 4, 7, 10)] == pytest.approx([0.04, 0.02, 0.1, 0.05])


def rates(table, above):
    return {row["lr"] for step, row in table.items() if step > above and "lr" in row}


def test_what_was_typed_since_the_checkpoint_is_not_lost(tmp_path, capsys):
    """Held against config.yaml alone, which has it, the checkpoint's old learning rate comes back without a word."""
    fit(*SMALL, "--trainer.max_epochs", "1")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("lr: 0.03", "lr: 0.001"))
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "2"]) == 0
    assert "resuming with model.optimizer.lr 0.001 (was 0.03)" in capsys.readouterr().out
    assert rates(metrics("run"), 8) == {0.001}


def test_a_new_run_from_a_checkpoint_has_the_learning_rate_that_was_typed(tmp_path, capsys):
    """Without ``changed_arguments`` it is the checkpoint's, and Adam ends in KeyError: 'betas'."""
    fit(*SMALL, "--trainer.max_epochs", "1", run_dir="old")
    words = ["--ckpt_path", "old/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]
    capsys.readouterr()
    assert main(["fit", *SMALL, *words, "--run_dir", "new", "--model.optimizer.lr", "0.001"]) == 0
    assert "model.optimizer.lr is 0.001 (old/checkpoints/last.ckpt has 0.03)" in capsys.readouterr().out
    assert rates(metrics("new"), 8) == {0.001}
    assert main(["fit", *SMALL, *words, "--run_dir", "other", "--model.optimizer", "Adam"]) == 2
    assert "has torch.optim.SGD, whose state the new run would be given" in capsys.readouterr().err
    assert not Path("other").exists()
    fit(
        *SMALL,
        "--trainer.max_epochs",
        "1",
        "--model.lr_scheduler",
        "StepLR",
        "--model.lr_scheduler.step_size",
        "1",
        run_dir="fell",
    )
    scheduler = ["--model.lr_scheduler", "LinearLR"]
    assert main(["fit", *SMALL, *words, "--run_dir", "other", *scheduler]) == 2  # it would end at three times the rate
    assert "lr_scheduler.LinearLR, but old/checkpoints/last.ckpt was not trained with it" in capsys.readouterr().err
    words[1] = "fell/checkpoints/last.ckpt"
    assert main(["fit", *SMALL, *words, "--run_dir", "other"]) == 2
    assert "model.lr_scheduler.class_path is None, but" in capsys.readouterr().err


def test_the_learning_rate_of_a_checkpoint_of_ones_own_script_is_said(tmp_path, capsys):
    """Lightning restores it, and what was typed would be passed over without a word."""
    halved = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)}
    model = LitBlitzNet(optimizer=lambda p: torch.optim.SGD(p, lr=0.04), **halved)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, logger=False)
    trainer.fit(model, SyntheticCIFAR10(60, 10, batch_size=8))
    trainer.save_checkpoint("own.ckpt")
    words = ["--model", "LitBlitzNet", "--data", "SyntheticCIFAR10", *SMALL[2:], "--ckpt_path", "own.ckpt"]
    words += ["--trainer.max_epochs", "2", "--model.optimizer", "SGD", "--model.optimizer.lr"]
    fall = ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "1"]
    capsys.readouterr()
    assert rates(metrics(fit(*words, "0.3", run_dir="other")), 8) == {0.02}
    assert "the learning rate is that of own.ckpt, 0.02, not 0.3\n" in capsys.readouterr().out
    fit(*words, "0.3", *fall, run_dir="falls")
    assert "the learning rate is that of own.ckpt, 0.04, not 0.3\n" in capsys.readouterr().out
    fit(*words, "0.04", *fall, run_dir="same")
    assert "the learning rate is" not in capsys.readouterr().out


OWN = """
import torch
from lightning.pytorch import LightningModule

class Own(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer, self.other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)[:, :1]
        loss = (self.layer(x) + self.other(x)).square().mean()
        self.manual_backward(loss)
        self.log("train/loss", loss)
        for optimizer in self.optimizers():
            if STEPS:
                optimizer.step()
                optimizer.zero_grad()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.layer, self.other)]
"""


@pytest.mark.parametrize("monitor", [[], ["--trainer.callbacks+=GradientMonitor"]])
@pytest.mark.parametrize("steps", ["batch_idx % 4 == 3", "True"])
def test_the_rows_of_a_foreign_module_in_manual_optimization(steps, monitor, tmp_path, monkeypatch):
    """Cut back to ``global_step``, rows are lost where not each batch makes a step, and kept where it makes two."""
    (tmp_path / "own_manual.py").write_text(OWN.replace("STEPS", steps))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model", "own_manual.Own", "--data", "SyntheticCIFAR10", "--data.train_images", "500"]
    words += ["--trainer.log_every_n_steps", "1", "--best_checkpoint", "false", "--allow_import", "own_manual"]
    try:
        whole = fit(*words, *monitor, "--trainer.max_epochs", "4", run_dir="whole")
        run = fit(*words, *monitor, "--trainer.max_epochs", "2")
        half = (run / "metrics.csv").read_text()
        shutil.copytree(run / "checkpoints", "checkpoints")
        again = ["fit", *words[-2:], "--resume", "run", "--trainer.max_epochs"]
        assert main([*again, "3"]) == 0
        shutil.rmtree(run / "checkpoints")
        shutil.copytree("checkpoints", run / "checkpoints")  # as if killed after the third epoch
        assert main([*again, "4"]) == 0
        if not monitor:  # which numbers rows by steps
            assert (run / "metrics.csv").read_text().startswith(half)
        assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    finally:
        sys.modules.pop("own_manual", None)


def test_a_checkpoint_of_the_runs_own_name_is_refused(tmp_path, capsys):
    """Without the check a ModelCheckpoint writes over ``best.ckpt``."""
    for name in ("best", "last"):
        callback = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", name]
        assert main(["fit", *SMALL, "--run_dir", "run", *callback]) == 2
        assert (
            f"ModelCheckpoint writes {name}.ckpt: the run keeps a checkpoint of its own under this name"
            in capsys.readouterr().err
        )
        assert not Path("run").exists()


def test_a_checkpoint_of_the_runs_own_name_beside_another_logger(tmp_path, capsys):
    """Without a ``dirpath`` it is written into that logger's folder."""
    words = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "."]
    words += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", "best"]
    assert main(["fit", *SMALL, *words, "--trainer.callbacks.dirpath", "run/checkpoints", "--run_dir", "run"]) == 2
    assert "ModelCheckpoint writes best.ckpt" in capsys.readouterr().err
    assert not Path("run").exists()
    run = fit(*SMALL, *words, "--trainer.max_epochs", "1")
    assert len(list(run.rglob("best.ckpt"))) == 2


@pytest.mark.parametrize("settings", [["save_last", "link"], ["save_weights_only", "true"]])
def test_a_last_checkpoint_of_another_kind_is_refused(settings, capsys):
    """Without the check a link to another checkpoint, or weights alone, take the place of the run's ``last.ckpt``."""
    callback = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last", "true"]
    words = [*callback, f"--trainer.callbacks.{settings[0]}", settings[1]]
    assert main(["fit", *SMALL, "--run_dir", "run", *words]) == 2
    told = capsys.readouterr().err
    assert "ModelCheckpoint writes last.ckpt: the run keeps" in told
    assert "leave out save_last" in told
    assert not Path("run").exists()


def test_a_best_loss_checkpoint_of_ones_own_takes_the_place_of_the_runs(tmp_path):
    """Beside it the run's own writes the same files, by another loss."""
    callback = ["--trainer.callbacks+=BestLossCheckpoint", "--trainer.callbacks.monitor", "train/loss"]
    callback += [
        "--trainer.logger+=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir",
        ".",
    ]  # whose folder would be Lightning's choice
    run = fit(*SMALL, "--trainer.max_epochs", "2", *callback)
    states = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    assert [key for key in states if "BestLossCheckpoint" in key] == ["BestLossCheckpoint{'monitor': 'train/loss'}"]
    assert (run / "best.pth").is_file()


def test_a_config_in_the_runs_directory_is_not_written_over(tmp_path, capsys):
    """Without ``check_own_configs`` the resolved configuration takes its place."""
    Path("mine").mkdir()
    text = recipe_path("quickstart").read_text() + "# my own\n"
    Path("mine/config.yaml").write_text(text)
    for words in ([], ["--resume", "auto"]):
        assert main(["fit", "--config", "mine/config.yaml", "--run_dir", "mine", *words]) == 2
        assert "--config mine/config.yaml: the run would write over it" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["config.yaml"]
    assert Path("mine/config.yaml").read_text() == text


def test_auto_takes_no_run_of_another_model(tmp_path, capsys):
    """Without the check the newest run of a config of the same name goes on."""
    for name, model in (("a", "LitLeNet5"), ("b", "LitBlitzNet")):
        Path(name).mkdir()
        content = yaml.safe_load(recipe_path("quickstart").read_text()) | {"model": {"class_path": model}}
        Path(name, "mine.yaml").write_text(yaml.safe_dump(content))
    words = ["--data.train_images", "200", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", "a/mine.yaml", *words]) == 0
    assert main(["fit", "--config", "b/mine.yaml", *words, "--resume", "auto"]) == 2
    message = capsys.readouterr().err
    assert "whose model is lit_basics.LitLeNet5, not lit_basics.LitBlitzNet: name the run's own --run_dir" in message


def test_the_patience_of_a_resumed_run_is_the_new_one(tmp_path):
    """Its state alone brings back the old one: the run ends after one epoch more."""
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    stop += ["--trainer.callbacks.min_delta", "100"]
    fit(*SMALL, "--trainer.max_epochs", "1", *stop, "--trainer.callbacks.patience", "2")
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("patience: 2", "patience: 9"))
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "4"]) == 0
    assert newest(Path("run"))["global_step"] == 32


@pytest.mark.parametrize("text", ["1e-4", "1.5e4"])
def test_text_that_looks_like_a_number_stays_text(text, tmp_path, capsys):
    """Without the quotes the run's configuration has 0.0001, which no text may be."""
    words = [
        "--trainer.logger",
        "lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir",
        ".",
        "--trainer.max_epochs",
        "1",
    ]
    words += ["--trainer.logger.name", text]
    run = fit("--config", "linear", *words)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]["init_args"]["name"] == text
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "2"]) == 0


def test_a_class_typed_again_keeps_the_runs_arguments(tmp_path, capsys):
    """Where a typed model has the run's configuration not read, the net is another."""
    fit(*SMALL, "--trainer.max_epochs", "1", "--model.activation", "relu")
    capsys.readouterr()
    assert main(["test", "--run_dir", "run"]) == 0
    expected = capsys.readouterr().out
    assert main(["test", "--run_dir", "run", "--model", "LitLeNet5", "--data", "SyntheticCIFAR10"]) == 0
    assert capsys.readouterr().out == expected


SCHEDULED = """
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, CyclicLR, LambdaLR, OneCycleLR, SequentialLR, StepLR
from lit_basics import LitLinearRegression

def scheduler(o):
    return {}

class Scheduled(LitLinearRegression):
    def __init__(self, **kwargs):
        super().__init__(lr_scheduler=scheduler, **kwargs)
"""


@pytest.mark.parametrize(
    "scheduler",
    [
        "SequentialLR(o, [ConstantLR(o, 0.1, 2), StepLR(o, 3)], [2])",
        "ChainedScheduler([LambdaLR(o, lambda n: 0.9**n), StepLR(o, 3)])",
        "OneCycleLR(o, 0.1, 50)",
        "CyclicLR(o, 0.1, 0.2)",
    ],
)
def test_a_new_learning_rate_that_a_scheduler_would_undo_is_refused(scheduler, tmp_path, monkeypatch, capsys):
    """Without ``OWN_RATES`` the run ends with 0 at the old rate; written after RunFiles, config.yaml is changed."""
    (tmp_path / "scheduled.py").write_text(SCHEDULED.format(scheduler))
    monkeypatch.syspath_prepend(tmp_path)
    model = ("--model", "scheduled.Scheduled", "--model.optimizer", "SGD", "--model.optimizer.lr", "0.05")
    try:
        run = fit(*model, "--model.lr_interval", "step", "--data", "LinearDataModule", "--trainer.max_epochs", "3")
        before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        resume = ["fit", "--resume", "run", "--trainer.max_epochs", "6"]
        assert main([*resume, "--model.optimizer.lr", "0.01"]) == 2
        message = capsys.readouterr().err
        assert f"{scheduler.partition('(')[0]} keeps learning rates of its own" in message
        assert "so lr cannot be 0.01 with the checkpoint's state: leave it out, or start afresh with it" in message
        assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        assert main(resume) == 0
    finally:
        sys.modules.pop("scheduled", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.batch_size", "32"], "--data.batch_size 32: the run to resume has 64"),
        (["--data.train_images", "400"], "--data.train_images 400: the run to resume has 500"),
        (["--seed_everything", "3"], "--seed_everything 3: the run to resume has 0"),
        (["--model.activation", "relu"], "--model.activation relu: the run to resume has tanh"),
    ],
)
def test_another_net_order_or_seed_is_refused(words, message, tmp_path, capsys):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "2", *words]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_callback_that_gives_another_state_back_is_refused(tmp_path, capsys):
    """Without the comparison of the steps Lightning begins at step 0, and the rows of the run are cut away."""
    finder = (
        "--trainer.callbacks+=BatchSizeFinder",
        "--trainer.callbacks.init_val=50",
        "--trainer.callbacks.max_val=50",
    )
    run = fit(*SMALL, *finder, "--trainer.max_epochs", "1")
    contents = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 2
    assert "would begin at 0: a callback has given back another state" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == contents


def test_a_run_does_not_go_on_in_the_directory_of_another(tmp_path, capsys):
    """It would have the other's settings, and its files would be written over."""
    runs = [fit(*SMALL, "--trainer.max_epochs", str(epochs), run_dir=name) for name, epochs in (("a", 1), ("b", 2))]
    contents = {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()}
    for place in ("a", "a/checkpoints/last.ckpt"):
        for directory in ("b", "new"):
            assert main(["fit", "--resume", place, "--run_dir", directory, "--trainer.max_epochs", "3"]) == 2
            assert f"would write over --run_dir {directory}" in capsys.readouterr().err
    assert {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()} == contents
    assert main(["fit", "--resume", "a", "--run_dir", "./a", "--trainer.max_epochs", "2"]) == 0


def test_another_checkpoint_beside_that_of_the_run(tmp_path, capsys):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    assert main(["fit", "--resume", "run", "--ckpt_path", "nowhere.ckpt", "--trainer.max_epochs", "2"]) == 2
    assert "--ckpt_path nowhere.ckpt beside --resume" in capsys.readouterr().err
    words = ["--run_dir", "run", "--resume", "auto", "--ckpt_path", "first.ckpt", "--trainer.max_epochs", "2"]
    assert main(["fit", *SMALL, *words]) == 0
    assert "goes on from run/checkpoints/last.ckpt, not from --ckpt_path first.ckpt" in capsys.readouterr().out
    assert max(metrics(run)) == 16


def test_a_checkpoint_is_named_from_within_its_folder(tmp_path, monkeypatch):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    monkeypatch.chdir(run / "checkpoints")
    assert main(["fit", "--resume", "last.ckpt", "--trainer.max_epochs", "2"]) == 0
    assert max(metrics(tmp_path / run)) == 16


MORE_ARGUMENTS = """
from lit_basics import LitLeNet5

class Mine(LitLeNet5):
    def __init__(self, scale: float = 1.0, {more}**kwargs):
        super().__init__(**kwargs)
"""


def test_an_argument_that_the_class_did_not_have_has_its_default(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model", "more_arguments.Mine", "--data", "SyntheticCIFAR10", "--data.train_images", "100"]
    try:
        (tmp_path / "more_arguments.py").write_text(MORE_ARGUMENTS.format(more=""))
        fit(*words, "--trainer.max_epochs", "1")
        (tmp_path / "more_arguments.py").write_text(MORE_ARGUMENTS.format(more="smoothing: float = 0.0, "))
        sys.modules.pop("more_arguments")
        importlib.invalidate_caches()
        longer = ["fit", "--resume", "run", "--trainer.max_epochs", "2"]
        assert main([*longer, "--model.smoothing", "0.5"]) == 2
        assert "--model.smoothing 0.5: the run to resume has None" in capsys.readouterr().err
        assert main(longer) == 0
        assert "the run's config.yaml has no model.smoothing; it has its default, 0.0" in capsys.readouterr().out
    finally:
        sys.modules.pop("more_arguments", None)


def test_a_class_in_the_place_of_none_is_no_new_argument(tmp_path, capsys):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    before = (run / "config.yaml").read_bytes()
    words = ["--model.criterion", "MultiMarginLoss", "--trainer.max_epochs", "2"]
    assert main(["fit", "--resume", "run", *words]) == 2
    assert "the run to resume has None" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_new_arguments_are_those_of_a_class_that_is_the_same():
    saved = {"model.class_path": "a.M", "model.init_args.old": 1, "model.init_args.loss": None}
    same, other = {}, {"model.class_path": "a.N"}
    assert is_new_argument("model.init_args.new", saved, same, ())
    assert is_new_argument("model.init_args.new.class_path", saved, same, ())
    assert is_new_argument("model.init_args.new.init_args.x", saved, same, ("model.old",))
    assert not is_new_argument("model.init_args.new", saved, other, ())
    assert not is_new_argument("model.init_args.new.init_args.x", saved, same, ("model.new",))
    assert not is_new_argument("model.init_args.loss.class_path", saved, same, ())
    assert not is_new_argument("model.init_args.old", saved, same, ())


@pytest.mark.parametrize("command", [["fit", "--resume", "run"], ["test", "--run_dir", "run"]])
def test_a_config_of_a_run_that_was_edited(command, tmp_path, capsys):
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    whole = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("trainer:\n\t- x\n")
    assert main(command) == 2
    assert "config.yaml: not a YAML text file at line 2" in capsys.readouterr().err
    content = yaml.safe_load(whole)
    del content["trainer"]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    more = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    assert main([*command, *(more if command[0] == "fit" else [])]) == 0


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        (
            {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}},
            "model.lr_scheduler.class_path torch.optim.lr_scheduler.StepLR: the run to resume has None",
        ),
        ({"automatic_optimization": False}, "model.automatic_optimization False: the run to resume has True"),
        ({"activation": "relu"}, "model.activation relu: the run to resume has tanh"),
        ({}, "seed_everything 7: the run to resume has 0"),
    ],
)
def test_an_edit_of_a_run_counts_as_typed(edits, told, tmp_path, capsys):
    """Held against config.yaml alone, which has it, the run goes on with another net or seed without a word."""
    run = fit(*SMALL, "--trainer.max_epochs", "1")
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["model"]["init_args"] |= edits
    content |= {} if edits else {"seed_everything": 7}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "2"]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_of_runs_is_no_run(tmp_path, capsys):
    for name in ("first", "second"):
        fit(*SMALL, "--trainer.max_epochs", "1", run_dir=Path("runs", name))
    capsys.readouterr()
    assert main(["fit", "--resume", "runs"]) == 2
    assert "--resume runs: there are runs in it, no checkpoint; the newest: --resume runs/second" in (
        capsys.readouterr().err
    )
    assert main(["test", "runs/first"]) == 2
    assert "'runs/first' stands alone; did you mean '--run_dir runs/first'?" in capsys.readouterr().err


def test_a_schedule_that_is_shorter_than_the_run(tmp_path, capsys):
    """A traceback of torch's, after a longer run was typed on a resume, too."""
    words = ["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "0.1"]
    words += ["--model.lr_scheduler.total_steps", "3", "--model.lr_interval", "step"]
    assert main(["fit", *SMALL, *words, "--trainer.enable_progress_bar", "false", "--run_dir", "run"]) == 2
    assert capsys.readouterr().err.startswith("lit_basics: Tried to step 4 times. The specified number of total steps")


def test_a_process_of_another_rank_takes_the_run_of_rank_0(tmp_path, monkeypatch):
    """Another run of the recipe may have saved since."""
    for name in ("first", "second"):
        fit(*SMALL, "--trainer.max_epochs", "1", run_dir=Path("runs", "quickstart", name))
    assert "LIT_BASICS_RUN_DIR" not in os.environ  # processes of a torchrun that this one starts would take it
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LIT_BASICS_RUN_DIR", str(Path("runs", "quickstart", "first").resolve()))
    found = []

    def find(*arguments):
        found.append(find_run(*arguments)[0].name)
        raise UserError("enough")

    monkeypatch.setattr(fitting, "find_run", find)
    for rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["fit", *SMALL, "--resume", "auto"]) == 2
    assert found == ["first", "second"]


def test_a_path_without_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        assert main(["fit", "--resume", place]) == 2
        assert "there is no checkpoint" in capsys.readouterr().err


def test_a_checkpoints_mean_holds_for_data_of_another_class(tmp_path):
    """Lightning looks under the name of this class: without ``load_weights`` the weights see another scale."""
    first = fit(*SMALL, "--trainer.max_epochs", "1", run_dir=Path("first"))
    path = write_npz(tmp_path / "images.npz", train=200)
    words = ["--config", "quickstart", "--data", "NpzDataModule", "--data.path", path]
    more = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]
    second = fit(*words, *more, "--ckpt_path", str(first / "checkpoints" / "last.ckpt"), run_dir=Path("second"))
    loaded = [load_checked(run / "checkpoints" / "last.ckpt") for run in (first, second)]
    means = [next(part[MEAN] for part in c.values() if isinstance(part, dict) and MEAN in part) for c in loaded]
    assert means[0] == means[1]


RAISES = """
from lit_basics import LitLeNet5

class Raises(LitLeNet5):
    broken = False

    def on_train_start(self):
        if self.broken:
            raise KeyError("mine")

    def on_train_batch_end(self, *args):
        if self.current_epoch == 1:
            self.load_state_dict({})
"""


@pytest.mark.parametrize(("broken", "what"), [(True, "mine"), (False, "Missing key")])
def test_an_error_of_the_modules_own_is_not_the_checkpoints(broken, what, tmp_path, monkeypatch):
    """Without the look at where and when, both are said to be about ``last.ckpt``, and have no traceback."""
    (tmp_path / "raises.py").write_text(RAISES)
    monkeypatch.syspath_prepend(tmp_path)
    mine = ("--allow_import", "raises", *SMALL, "--model", "raises.Raises")
    run = fit(*mine, "--trainer.max_epochs", "1")
    monkeypatch.setattr(sys.modules["raises"].Raises, "broken", broken)
    with pytest.raises((KeyError, RuntimeError), match=what):
        main(["fit", "--allow_import", "raises", "--resume", str(run), "--trainer.max_epochs", "2"])
    del sys.modules["raises"]
