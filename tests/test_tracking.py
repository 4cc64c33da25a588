"""Weights & Biases and TensorBoard, read back from their own files."""

import json
import struct
from pathlib import Path

import pytest
from helpers import fit, metrics

from lit_basics import MetricsCSV

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
    """Return the rows and the configuration in a W&B run file."""
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(folder).rglob("run-*.wandb")
    rows, config = [], {}
    for data in leveldb_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind in ("run", "config"):
            source = record.run.config if kind == "run" else record.config
            for item in source.update:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return rows, config


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_wandb_without_a_key_goes_offline_and_holds_everything(no_key, capfd):
    run = fit(*WORDS[:2], "--config", "wandb", *WORDS[2:])
    lines = [line for line in capfd.readouterr().err.splitlines() if "W&B" in line]
    assert len(lines) == 1
    assert "wandb sync run/wandb/offline-run-*" in lines[0]
    assert list((run / "wandb").glob("offline-run-*"))
    rows, config = read_wandb(run)
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
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        log.log_metrics({"größe/é": step}, step)
    log.log_metrics({"later": 0.5}, 3)
    log.log_metrics({"later": 0.25}, 2)
    log.log_metrics({"größe/é": 4}, 4)
    log.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().split("\n") == [
        *("step,größe/é,later", "1,1.0,", "2,2.0,0.25", "3,3.0,0.5", "4,4.0,", ""),
    ]
