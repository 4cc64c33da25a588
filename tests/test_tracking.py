"""Weights & Biases and TensorBoard, read back from their own files."""

import json
import os
import struct
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import wandb
from helpers import Rows, fit, metrics, quiet_trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_basics import (
    DurableCheckpointIO,
    GradientMonitor,
    LastCheckpoint,
    LitClassifier,
    MetricsCSV,
    SyntheticCIFAR10,
    loggers,
)
from lit_basics.callbacks import progress
from lit_basics.cli import main
from lit_basics.config import Config
from lit_basics.soft_loggers import finish_wandb

WORDS = (
    *("--config", "quickstart", "--data.train_images", "200", "--data.test_images", "60"),
    *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "2"),
)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    wandb.teardown()  # its own process writes where it was started


def leveldb_records(data):
    """Yield the records of a LevelDB log, after W&B's own 7 bytes: blocks of 32 KiB hold pieces of records."""
    record, place = b"", 7
    while place - 7 + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        start = place - 7
        _, length, kind = struct.unpack("<IHB", data[start : start + 7])  # checksum, size, whole/first/middle/last
        if kind == 0:
            return
        record += data[start + 7 : start + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(folder):
    """Return the rows, the configuration and the exit code in a W&B run file, once W&B's own process has written it."""
    deadline = time.monotonic() + 30
    while (read := _read_wandb(folder))[2] is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return read


def _read_wandb(folder):
    from wandb.proto import wandb_internal_pb2

    rows, config, code = [], {}, None
    for data in (data for path in Path(folder).rglob("run-*.wandb") for data in leveldb_records(path.read_bytes()[7:])):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind in ("run", "config"):
            source = record.run.config if kind == "run" else record.config
            for item in source.update:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "exit":
            code = record.exit.exit_code
    return rows, config, code


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("more", [[], ["--trainer.logger.log_model", "all"]], ids=["rows", "models"])
def test_wandb_without_a_key_goes_offline_and_holds_everything(no_key, capfd, more):
    run = fit(*WORDS[:2], "--config", "wandb", *more, *WORDS[2:])
    lines = [line for line in capfd.readouterr().err.splitlines() if "W&B" in line]
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert len(lines) == 1
    assert lines[0].endswith(f"wandb sync {folder}")
    rows, config, code = read_wandb(run)
    logged = {}
    for row in rows:
        if "trainer/global_step" in row:
            values = {k: v for k, v in row.items() if not k.startswith("_") and k != "trainer/global_step"}
            logged.setdefault(row["trainer/global_step"], {}).update(values)
    expected = metrics(run)
    assert list(logged) == list(expected)
    for step in expected:
        assert logged[step] == pytest.approx(expected[step])
    assert {"grad/norm", "val/acc", "train/loss"} <= set().union(*logged.values())
    assert config["model"]["class_path"] == "lit_basics.LitLeNet5"
    assert config["data"]["init_args"]["batch_size"] == 64
    assert code == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("words", "environment", "resume"),
    [
        ([], {}, "allow"),
        (["--trainer.logger.resume", "never"], {}, "never"),
        (["--trainer.logger.resume_from", "abc?_step=2"], {}, None),
        ([], {"WANDB_RESUME": "must"}, "must"),
    ],
)
def test_a_wandb_run_of_a_typed_id_goes_on(monkeypatch, words, environment, resume):
    for name, value in {"WANDB_MODE": "offline", **environment}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it has read the environment of the tests before
    config = Config([*WORDS[:2], "--config", "wandb", "--trainer.logger.id", "abc", *words])
    config.build(Path("run"))
    (logger,) = config.trainer_arguments["logger"]
    try:
        assert (logger.experiment.id, logger.experiment.settings.resume) == ("abc", resume)
    finally:
        finish_wandb([logger])
        wandb.teardown()
    assert "resume: null" in config.to_yaml() or resume == "never"


FAILS = """
import lightning.pytorch as pl

class Fails(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            raise ZeroDivisionError("mine")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_wandb_shows_a_run_that_failed_as_failed(no_key, mine):
    mine(FAILS, "fails_at_three")
    words = [*WORDS[:2], "--config", "wandb", *WORDS[2:], "--trainer.callbacks+=fails_at_three.Fails"]
    with pytest.raises(ZeroDivisionError):
        main(["fit", *words, "--run_dir", "run"])
    assert read_wandb("run")[2] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_everything(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = fit(*WORDS[:2], "--config", "tensorboard", *WORDS[2:])
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = metrics(run)
    for key in ("train/loss", "val/loss", "val/acc", "grad/norm", "grad/norm/c1.weight", "lr"):
        scalars = {event.step: event.value for event in events.Scalars(key)}
        assert scalars == pytest.approx({step: row[key] for step, row in expected.items() if key in row})


def test_metrics_csv_grows_while_the_run_goes_on(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, 1)
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n1,1.0\n"
    log.log_metrics({"b,c": 2.0}, 1)  # the same step shares a row, a new key adds a column
    assert (tmp_path / "metrics.csv").read_text() == 'step,a,"b,c"\n1,1.0,2.0\n'
    log.log_metrics({"a": float("nan")}, 2)
    log.log_metrics({"d": 3.0}, 3)
    log.finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == 'step,a,"b,c",d\n1,1.0,2.0,\n2,nan,,\n3,,,3.0\n'


def test_a_key_of_letters_of_several_bytes(tmp_path):
    """Without the bytes beyond one a letter a late value is written into the row before."""
    log = MetricsCSV(str(tmp_path / "metrics.csv"))
    for step in (1, 2, 3):
        log.log_metrics({"größe/é": step}, step)
    log.log_metrics({"later": 0.5}, 3)
    log.log_metrics({"later": 0.25}, 2)
    log.log_metrics({"größe/é": 4}, 4)
    log.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().split("\n") == [
        *("step,größe/é,later", "1,1.0,", "2,2.0,0.25", "3,3.0,0.5", "4,4.0,", ""),
    ]


def test_a_row_before_the_file_is_cut_back_takes_no_other_away(tmp_path):
    """Callbacks before the one that cuts it back may log."""
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    for step in range(1, 6):
        log.log_metrics({"a": step}, step)
    log.finalize("success")
    path.write_text(path.read_text() + "6,0.")  # as of a run that was killed
    resumed = MetricsCSV(path, resume=True)
    resumed.log_metrics({"size": 7, "a": 4}, 4)
    resumed.cut_back(4)
    resumed.log_metrics({"a": 5}, 5)
    resumed.finalize("success")
    assert path.read_text().split() == ["step,a,size", "1,1.0,", "2,2.0,", "3,3.0,", "4,4.0,7.0", "5,5.0,"]


@pytest.mark.parametrize("killed", [False, True])
def test_what_comes_much_too_late_is_in_its_place_in_the_end(killed, tmp_path):
    """As of a GAN: two steps a batch, and what the module logs counts batches."""
    log = MetricsCSV(tmp_path / "metrics.csv")
    for batch in range(350):
        for step in (2 * batch + 1, 2 * batch + 2):
            log.log_metrics({"grad/norm": float(step)}, step)
        log.log_metrics({"loss": float(-batch)}, batch)
    if killed:
        log._file.close()
        log = MetricsCSV(tmp_path / "metrics.csv", resume=True)
        log.cut_back(700)
    log.finalize("success")
    rows = metrics(tmp_path)
    assert list(rows) == list(range(701))
    for step, row in rows.items():
        assert row == ({"grad/norm": step} if step else {}) | ({"loss": -step} if step < 350 else {})


def test_half_a_number_at_the_end_is_no_row(tmp_path):
    """``5,0.125`` of which a kill, or a power loss, has left ``5,0.1``."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n4,0.5\n5,0.1")
    resumed = MetricsCSV(path, resume=True)
    resumed.cut_back(5)
    resumed.finalize("success")
    assert path.read_text() == "step,a\n4,0.5\n"


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_the_rows_are_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    """Else a power loss takes rows of steps that are not made again. Once a save: each row would be slow."""
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        if calls[-1] == "metrics.csv":
            calls[-1] += f" of {len(metrics(tmp_path))} steps"
        real(descriptor)

    def replace(source, target, real=os.replace):
        calls.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    last = LastCheckpoint(str(tmp_path))
    plugins = {"plugins": [DurableCheckpointIO()], "enable_checkpointing": True}
    train(LitClassifier(net()), MetricsCSV(tmp_path / "metrics.csv"), last, **plugins)
    assert [call for call in calls if "metrics.csv of" in call or call == "last.ckpt"] == [
        "metrics.csv of 28 steps",
        "last.ckpt",
    ]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed", [False, True])
def test_a_late_value_takes_no_row_away_if_a_kill_comes(killed, tmp_path, monkeypatch):
    """With the rows cut away before they are written again all from the late one on are lost."""

    class File(loggers.FileIO):
        def write(self, text):
            if killed and b"0.5" in text:
                raise Killed
            return super().write(text)

    monkeypatch.setattr(loggers, "FileIO", File)
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 6):
        log.log_metrics({"a": step + 0.125, "b": step} if step == 3 else {"a": step + 0.125}, step)
    log.log_metrics({"b": 2}, 2)
    before = (tmp_path / "metrics.csv").read_text()
    try:
        log.log_metrics({"b": 0.5}, 2)
    except Killed:
        log.finalize("")
        assert (tmp_path / "metrics.csv").read_text() == before
        return
    log.log_metrics({"a": 4}, 4)  # a shorter row
    log.finalize("")
    rows = ["step,a,b", "1,1.125,", "2,2.125,0.5", "3,3.125,3.0", "4,4.0,", "5,5.125,"]
    assert (tmp_path / "metrics.csv").read_text().split() == rows


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


class Foreign(pl.LightningModule):
    """Of another project, without a part of lit_basics."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(module, logger, *callbacks, **settings):
    trainer = quiet_trainer(*callbacks, logger=logger, **{"log_every_n_steps": 1, **settings})
    trainer.fit(module, SyntheticCIFAR10(56, 8, batch_size=2, val_size=0))  # 28 steps
    return trainer


KINDS = {"ours": (lambda: LitClassifier(net()), ()), "foreign": (Foreign, (GradientMonitor,))}


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_rows_before_an_exception_are_there(kind, tmp_path):
    module, callbacks = KINDS[kind]

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 20:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(module(), MetricsCSV(tmp_path / "metrics.csv"), Fails(), *(callback() for callback in callbacks))
    assert list(metrics(tmp_path)) == [*range(1, 21)]


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_stands_at_a_step_whose_rows_are_there(kind, tmp_path):
    """A resumed run does not make them again."""
    module, callbacks = KINDS[kind]
    rows, seen = Rows(), []

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 20:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                seen.extend(rows.table())

    train(module(), rows, Saves(), *(callback() for callback in callbacks))
    assert seen == [*range(1, 21)]


def test_a_logger_that_keeps_its_rows_is_let_write_them(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10**6)
    seen = []

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(len((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))

    train(LitClassifier(net()), logger, Looks(), max_epochs=2)
    assert seen[0] > 28
    assert seen[1] > 56


def test_the_bar_shows_the_newest_losses_and_is_drawn_now_and_then(monkeypatch):
    drawn = []
    monkeypatch.setattr(TQDMProgressBar, "on_train_batch_end", lambda *_: drawn.append(_[-1]))
    monkeypatch.setattr(progress, "MIN_SECONDS", 1000.0)
    rows, bar, module = Rows(), progress.ProgressBar(refresh_rate=1), LitClassifier(net())
    trainer = quiet_trainer(bar, max_epochs=2, logger=rows, log_every_n_steps=1, enable_progress_bar=True)
    trainer.fit(module, SyntheticCIFAR10(64, 8, batch_size=2, val_size=8))
    assert drawn == [0, 27, 27]  # the first, and the last of each epoch
    shown = bar.get_metrics(trainer, module)
    assert shown["train/loss"] == rows.table()[56]["train/loss"]
    assert shown["val/loss"] == rows.table()[56]["val/loss"]


def test_the_bar_reads_each_value_of_a_validation_once(monkeypatch):
    """Without ``_numbers`` it does so at each refresh, which a GPU makes it wait for."""
    read = []
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(progress, "float", lambda value: read.append(value) or value.item(), raising=False)
    bar = progress.ProgressBar(refresh_rate=1)
    trainer = quiet_trainer(bar, max_epochs=2, num_sanity_val_steps=0, enable_progress_bar=True)
    trainer.fit(LitClassifier(net()), SyntheticCIFAR10(64, 8, batch_size=8, val_size=8))
    names = [name for name in trainer.callback_metrics if name.startswith("val/")]
    assert len(read) == 2 * len(names)


class Refuses(Rows):
    def log_metrics(self, metrics, step=None):
        raise OSError("no such device")


def test_rows_that_cannot_be_logged_leave_the_first_exception():
    """The callbacks behind have their turn."""
    ended = []

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                raise ZeroDivisionError

    class Behind(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            ended.append(type(exception))

    class Both(LitClassifier):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), Behind()]

    with (
        pytest.warns(UserWarning, match="the last rows could not be logged: OSError: no such device"),
        pytest.raises(ZeroDivisionError),
    ):
        train(Both(net()), Refuses(), Fails())
    assert ended == [ZeroDivisionError]
