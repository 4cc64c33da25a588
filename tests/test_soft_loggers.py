"""Loggers that fail: the run finishes, its weights are those of a run without them, and a line says what is lost."""

import contextlib
import copy
import importlib.metadata
import os
import pickle
import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from breaking import children, fill
from helpers import assert_equal, copied, fit, metrics
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from test_tracking import leveldb_records

from lit_basics import MetricsCSV, fail_soft

WORDS = (
    *("--config", "quickstart", "--data.train_images", "200", "--data.test_images", "60"),
    *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
)
STEPS = 6
SHORT = ["--trainer.enable_progress_bar", "false"]
KEY = "c0ffee1234" * 4
SERVER = "WANDB_BASE_URL"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def weights(run):
    return torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The final weights of a run without loggers."""
    with contextlib.chdir(tmp_path_factory.mktemp("without")):
        return weights(fit(*WORDS, "--metrics_csv", "false"))


@pytest.fixture
def wandb_anew(monkeypatch, tmp_path):
    """W&B as in a process of its own, without a key."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", SERVER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    wandb.teardown()  # it has read the environment of the tests before
    yield
    wandb.teardown()


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=10).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def said(text, name):
    """Return the one line of our own about a logger, and the one below it."""
    lines = text.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith(f"lit_basics: {name}")]
    return "\n".join(lines[number : number + 2])


class Breaks(CSVLogger):
    """A user's logger that raises in one of its methods."""

    def __init__(self, save_dir, where):
        super().__init__(save_dir)
        self.where = where

    def _break(self, where):
        if where == self.where:
            raise RuntimeError(f"broken {where}\nand more")

    def log_metrics(self, *args, **kwargs):
        self._break("log_metrics")
        super().log_metrics(*args, **kwargs)

    def log_hyperparams(self, *args, **kwargs):
        self._break("log_hyperparams")
        super().log_hyperparams(*args, **kwargs)

    def save(self):
        self._break("save")
        super().save()

    def after_save_checkpoint(self, callback):
        self._break("after_save_checkpoint")

    def finalize(self, status):
        self._break("finalize")

    @property
    def experiment(self):
        self._break("experiment")
        return super().experiment

    @property
    def version(self):
        self._break("version")
        return super().version


class Module(BoringModel):
    """Logs as users do, also by the logger's own object."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"size": 2})

    def training_step(self, batch, batch_idx):
        self.log("loss", 1.0)
        if self.logger is not None:
            self.logger.experiment.log_metrics({"mine": 2.0}, 0)
        return super().training_step(batch, batch_idx)


def boring(logger):
    torch.manual_seed(0)
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=3, limit_val_batches=1, log_every_n_steps=1, logger=logger,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir="root",
    )  # fmt: skip
    trainer.fit(module)
    return copied(module), trainer


@pytest.mark.parametrize(
    "where", ["experiment", "version", "log_hyperparams", "log_metrics", "save", "after_save_checkpoint", "finalize"]
)
def test_what_a_logger_raises_does_not_end_the_run(tmp_path, capsys, where):
    # with fail_soft returning the logger as it is, each ends in the RuntimeError
    expected, _ = boring(False)
    state, trainer = boring(fail_soft(Breaks(tmp_path, where)))
    assert_equal(state, expected)
    assert trainer.global_step == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lit_basics: Breaks failed (RuntimeError: broken {where}) and is switched off;")
    trainer.logger.experiment.config.update({"a": [0]}, allow=True)["b"].c = 1  # takes everything
    assert trainer.logger.log_metrics({"a": 1.0}, 4) is None


def test_a_soft_logger_is_still_what_it_was(tmp_path):
    logger = CSVLogger(tmp_path)
    assert fail_soft(fail_soft(logger)) is logger
    assert isinstance(logger, CSVLogger)
    assert type(logger).__name__ == "CSVLogger"
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    assert Path(logger.log_dir, "metrics.csv").read_text() == "a,step\n1.0,1\n"
    broken = fail_soft(Breaks(tmp_path, "save"))
    for again in (copy.deepcopy(broken), pickle.loads(pickle.dumps(broken))):
        again.save()  # soft as well
        assert isinstance(again, Breaks)
        assert again.where == "save"
    with pytest.raises(KeyboardInterrupt):  # only errors are kept from the run
        fail_soft(Interrupted(tmp_path)).save()


class Interrupted(CSVLogger):
    def save(self):
        raise KeyboardInterrupt


def test_wandb_killed(wandb_anew, without, capfd):
    # without fail_soft the run ends in ConnectionResetError, and without teardown the next one finds the dead run
    run = fit(*WORDS, "--config", "wandb", "--trainer.callbacks+", "breaking.KillWandb", "--allow_import", "breaking")
    assert_equal(weights(run), without)
    line = said(capfd.readouterr().err, "WandbLogger")
    assert re.search(
        r"ConnectionResetError.*\n +to upload what was written: wandb sync run/wandb/offline-run-\S+$", line
    )
    assert Path(line.split()[-1]).is_dir()
    assert len(metrics(run)) >= STEPS
    fit(*WORDS, "--config", "wandb", run_dir="next")
    assert "failed" not in capfd.readouterr().err
    assert children("wandb-core")


def canary_files(*folders):
    """Return the files that hold the canary, looking into archives and records."""
    hits, seen = [], 0
    for path in [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]:
        texts = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                texts += [archive.read(name) for name in archive.namelist()]
        if path.suffix == ".wandb":
            texts.append(b"".join(leveldb_records(texts[0][7:])))
        seen += len(texts)
        hits += [path for text in texts if KEY.encode() in text]
    assert seen > 15
    return hits


SETTINGS = """
trainer:
  logger+:
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args:
        project: mine
        settings: {init_timeout: 3}
"""


@pytest.mark.parametrize("case", ["refused", pytest.param("settings", marks=pytest.mark.slow), "offline"])
def test_wandb_refused_goes_offline_and_no_file_holds_the_key(wandb_anew, without, monkeypatch, capfd, case, tmp_path):
    # without the second start offline the refused run logs nothing; a key written to config.yaml is found
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv(SERVER, f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if case == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    elif case == "refused":
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    Path("mine.yaml").write_text(SETTINGS)
    run = fit(*WORDS, "--config", "mine.yaml" if case == "settings" else "wandb")
    assert_equal(weights(run), without)
    printed = capfd.readouterr()
    if case == "offline":
        assert "lit_basics:" not in printed.err
    else:
        line = said(printed.err, "W&B cannot be used online").splitlines()[0]
        assert Path(line.partition("wandb sync ")[2]).is_dir()
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # W&B's own process may still be writing where the machine is busy
    while path.read_bytes().count(b"val/loss") < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert path.read_bytes().count(b"val/loss") >= 2  # every row is there
    assert canary_files(tmp_path) == []
    assert KEY not in printed.out + printed.err
    (run / "config.yaml").write_text(f"key: {KEY}")
    assert canary_files(tmp_path) == [tmp_path / run / "config.yaml"]  # it would be found


def wandb_to(disk):
    return ["--config", "wandb", "--trainer.logger.save_dir", str(disk)]


def test_wandb_with_a_full_disk(wandb_anew, without, disk, capfd):
    # without the look for room nothing is said, and W&B's own log prints tracebacks
    fill(disk)
    assert_equal(weights(fit(*WORDS, *wandb_to(disk))), without)
    printed = capfd.readouterr().err
    assert "No space left on device) and is switched off" in said(printed, "WandbLogger")
    assert "Traceback" not in printed


def test_wandb_whose_disk_fills_up(wandb_anew, without, disk, capfd):
    # without the look for room nothing is said
    filling = f'{{"class_path": "breaking.FillDisk", "init_args": {{"folder": "{disk}"}}}}'
    more = ["--trainer.callbacks+", filling, "--allow_import", "breaking"]
    assert_equal(weights(fit(*WORDS, *wandb_to(disk), *more)), without)
    printed = capfd.readouterr().err
    text = said(printed, "WandbLogger")
    assert "No space left on device) and is switched off" in text
    assert f"wandb sync {disk}/wandb/offline-run-" in text
    assert "Traceback" not in printed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fills_up", [False, True])
@pytest.mark.parametrize("name", ["TensorBoardLogger", "CSVLogger"])
def test_files_on_a_full_disk(without, disk, capfd, name, fills_up):
    # without fail_soft the run ends in OSError
    more = [
        "--trainer.logger+",
        f"lightning.pytorch.loggers.{name}",
        "--trainer.logger.save_dir",
        str(disk),
        "--allow_import",
        "breaking",
    ]
    if fills_up:
        filling = f'{{"class_path": "breaking.FillDisk", "init_args": {{"folder": "{disk}"}}}}'
        more += ["--trainer.callbacks+", filling]
    else:
        fill(disk)
    assert_equal(weights(fit(*WORDS, *more)), without)
    assert "No space left on device) and is switched off" in said(capfd.readouterr().err, name)


def test_metrics_csv_on_a_full_disk(disk, capsys):
    # without fail_soft this ends in OSError; without the truncation the file ends in a part of a row
    logger = fail_soft(MetricsCSV(disk / "metrics.csv"))
    row = {f"key{n}": 1 / 3 for n in range(30)}
    logger.log_metrics(row, 1)
    fill(disk)
    for step in range(2, 50):
        logger.log_metrics(row, step)
    logger.finalize("success")
    lines = logger.path.read_text().splitlines()
    assert 2 <= len(lines) < 49
    assert {line.count(",") for line in lines} == {30}
    assert logger.path.read_text().endswith("\n")
    assert f"rows from about step {len(lines)} on" in said(capsys.readouterr().err, "MetricsCSV")


def test_metrics_csv_goes_on_where_there_is_room_again(disk):
    logger = MetricsCSV(disk / "metrics.csv")
    logger.log_metrics({"a": 1.0}, 1)
    fill(disk)
    step = 1
    with contextlib.suppress(OSError):
        while True:
            step += 1
            logger.log_metrics({"a": 1.0}, step)
    (disk / "fill").unlink()
    logger.log_metrics({"a": 2.0}, 6000)
    logger.finalize("success")
    steps = [int(line.partition(",")[0]) for line in logger.path.read_text().splitlines()[1:]]
    assert steps == [*range(1, step), 6000]


def test_without_wandb_installed(tmp_path, without):
    # without leaving it out this ends in exit code 2; a folder named wandb is no package
    (tmp_path / "wandb").mkdir()
    (tmp_path / "site").mkdir()
    for folder in {Path(torch.__file__).parents[1], Path(importlib.metadata.distribution("wandb").locate_file(""))}:
        for entry in folder.iterdir():
            if not entry.name.startswith("wandb") and not (tmp_path / "site" / entry.name).exists():
                (tmp_path / "site" / entry.name).symlink_to(entry)
    paths = [str(tmp_path / "site")]
    package = Path(sys.modules["lit_basics"].__file__).parents[1]
    if not (package / "wandb").exists():  # an editable install; else it is among the links
        paths.append(str(package))
    command = [sys.executable, "-S", "-m", "lit_basics", "fit", *WORDS, "--config", "wandb", "--run_dir", "run", *SHORT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_equal(weights("run"), without)
    assert "wandb>=" in said(done.stderr, "WandbLogger is left out")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_wandb_refused_takes_half_a_minute(wandb_anew, monkeypatch, capfd, tmp_path):
    """By the settings of its own, W&B waits for 100 seconds."""
    import time

    monkeypatch.setenv(SERVER, "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    start = time.monotonic()
    fit(*WORDS, "--config", "wandb")
    assert time.monotonic() - start < 60
    assert "W&B cannot be used online" in capfd.readouterr().err
