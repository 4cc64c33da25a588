"""The recorder: what reaches the loggers, and when."""

import math

import pytest
import torch
from helpers import Rows, quiet_trainer
from torch import nn

from lit_basics import GradientMonitor, LitClassifier, LossReport, SyntheticCIFAR10, UserError
from lit_basics.recording import ROWS, StepRecorder, recorder_of


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def trainer(rows):
    return quiet_trainer(logger=rows)


def test_rows_reach_the_loggers_at_a_flush(trainer, rows):
    recorder = recorder_of(trainer)
    assert recorder is recorder_of(trainer)
    recorder.put(1, "train/loss", torch.tensor(2.0))
    recorder.put_all(1, ["a", "b"], torch.tensor([3.0, 4.0]))
    recorder.put_host(1, "lr", 0.5)
    assert rows.rows == []
    recorder.flush()
    assert rows.rows == [(1, {"train/loss": 2.0, "a": 3.0, "b": 4.0, "lr": 0.5})]


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("values", [torch.tensor([5.0, 6.0, 0.1]), [5.0, 6.0, 0.1]])
def test_values_whose_columns_are_apart_are_recorded_at_once(trainer, rows, values, on_host):
    """As of a parameter that has lost its gradient; the columns of a GPU by a stand-in, which takes its path."""
    recorder = recorder_of(trainer)
    recorder._on_host = on_host
    recorder._resize(16)
    recorder.put_all(1, ["a", "b", "c", "d"], torch.arange(4.0))
    names = ["d", "a", "c"]
    recorder.put_all(2, names, values)
    recorder.put_all(3, names, values)
    recorder.flush()
    assert rows.rows[0] == (1, {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0})
    number = values[2].item() if isinstance(values, torch.Tensor) else 0.1
    assert rows.rows[1:] == [(step, {"d": 5.0, "a": 6.0, "c": number}) for step in (2, 3)]


def test_a_full_buffer_flushes_itself(trainer, rows):
    recorder = recorder_of(trainer)
    for step in range(1, ROWS + 2):
        recorder.put(step, "x", float(step))
    assert [step for step, _ in rows.rows] == list(range(1, ROWS + 1))
    assert recorder.epoch_means() == {"x": sum(range(1, ROWS + 2)) / (ROWS + 1)}


def test_only_some_steps_are_logged_but_all_count(trainer, rows):
    recorder = recorder_of(trainer)
    for step in range(1, 5):
        recorder.put(step, "x", float(step), every=2)
        recorder.put_host(step, "lr", 0.1)
    assert recorder.epoch_means() == {"x": 2.5}
    assert rows.rows == [(1, {"lr": 0.1}), (2, {"x": 2.0, "lr": 0.1}), (3, {"lr": 0.1}), (4, {"x": 4.0, "lr": 0.1})]


def test_micro_batches_are_averaged_and_evaluations_are_not(trainer, rows):
    recorder = recorder_of(trainer)
    recorder.put(1, "x", torch.tensor(1.0), part=0)
    recorder.put(1, "x", torch.tensor(99.0), part=0)  # LBFGS evaluates again
    recorder.put(1, "x", torch.tensor(3.0), part=1)
    recorder.flush()
    assert rows.rows == [(1, {"x": 2.0})]


def test_not_a_number_is_logged(trainer, rows):
    recorder = recorder_of(trainer)
    recorder.put(1, "x", torch.tensor(float("nan")))
    recorder.flush()
    assert rows.rows[0][1]["x"] != rows.rows[0][1]["x"]


def test_a_step_that_broke_in_its_first_half_is_left_out_by_a_resumed_run_too(trainer):
    """Without ``left_out`` in the state the mean of the epoch is nan, where the run that never stopped has a number."""
    recorder = recorder_of(trainer)
    recorder.put(1, "x", math.nan, part=0)
    recorder.leave_out(1, 1)
    other = StepRecorder(trainer)
    other.load_state_dict(recorder.state_dict(), step=1, every=1)
    other.put(1, "x", 3.0, part=1)
    other.put(2, "x", 4.0)
    assert other.epoch_means() == {"x": 4.0}


def test_of_steps_that_broke_no_more_are_kept_than_could_be_left_out(trainer):
    """Without the bound a checkpoint of a run whose loss is NaN for long grows with every step."""
    recorder = recorder_of(trainer)
    for step in range(1, 11 * ROWS + 2):
        recorder.put(step, "x", math.nan)
    assert math.isnan(recorder.epoch_means()["x"])
    assert len(recorder.state_dict()["broken"]["x"]) == 10 * ROWS


def test_many_columns_and_late_ones(trainer, rows):
    recorder = recorder_of(trainer)
    names = [f"n{i}" for i in range(40)]
    recorder.put_all(1, names[:3], torch.arange(3.0))
    recorder.put_all(2, ["n0", *names], torch.cat([torch.zeros(1), torch.arange(40.0)]))
    recorder.flush()
    assert rows.rows[1][1] == {name: float(i) for i, name in enumerate(names)}


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "as on a GPU"])
@pytest.mark.parametrize("values", [torch.arange(4.0), [0.0, 1.0, 2.0, 3.0]], ids=["tensor", "list"])
def test_names_in_another_order_than_their_columns(trainer, rows, on_host, values):
    recorder = recorder_of(trainer)
    if not on_host:
        recorder._on_host, recorder._cells = False, recorder._buffer
    recorder.put_all(1, ["a", "c"], values[:2])
    recorder.put_all(2, ["a", "b", "c", "d"], values)
    recorder.flush()
    assert rows.rows == [(1, {"a": 0.0, "c": 1.0}), (2, {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0})]


def test_float64_is_kept(trainer, rows):
    recorder = recorder_of(trainer)
    value = 1.0 + 2.0**-40
    recorder.put(1, "x", torch.tensor(value, dtype=torch.float64))
    recorder.flush()
    assert rows.rows[0][1]["x"] == value


def test_state_continues_the_means(trainer, rows):
    recorder = recorder_of(trainer)
    recorder.put(1, "x", 1.0)
    other = StepRecorder(trainer)
    recorder.flush()
    recorder.put(2, "x", 3.0, part=0)  # one of two micro-batches
    other.load_state_dict(recorder.state_dict(), step=2, every=1)
    other.put(2, "x", 5.0, part=1)
    assert other.epoch_means() == {"x": 2.5}
    other.start_epoch()
    assert other.epoch_means() == {}


def test_no_more_broken_values_are_kept_than_a_guard_may_leave_out(trainer):
    """A run that goes on with NaN would keep all of them, in memory and in each checkpoint."""
    recorder = recorder_of(trainer)
    for step in range(1, 11 * ROWS):
        recorder.put(step, "x", math.nan)
    assert len(recorder.state_dict()["broken"]["x"]) == 10 * ROWS
    assert math.isnan(recorder.epoch_means()["x"])


def test_the_recorder_does_not_keep_its_trainer_alive():
    import gc
    import weakref

    trainer = quiet_trainer()
    recorder_of(trainer).put(1, "x", 1.0)
    alive = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("manual", [False, True])
def test_steps_count_from_one_and_are_complete(rows, manual):
    class Recording(LitClassifier):
        def compute_loss(self, batch, batch_idx):
            loss = super().compute_loss(batch, batch_idx)
            self.record("train/double", 2 * loss)
            return loss

    model = Recording(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), automatic_optimization=not manual)
    trainer = quiet_trainer(GradientMonitor(), max_epochs=2, logger=rows, log_every_n_steps=1)
    trainer.fit(model, datamodule=SyntheticCIFAR10(100, 10, batch_size=10, val_size=20))
    table = rows.table()
    assert list(table) == list(range(1, 17))
    for row in table.values():
        assert row["train/double"] == pytest.approx(2 * row["train/loss"])
        assert row["grad/norm"] ** 2 == pytest.approx(row["grad/norm/1.weight"] ** 2 + row["grad/norm/1.bias"] ** 2)
    mean = sum(table[step]["train/loss"] for step in range(9, 17)) / 8
    assert table[16]["train/loss_epoch"] == pytest.approx(mean)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(mean)
    assert {"val/loss", "val/acc"} <= set(table[8]) & set(table[16])


def test_a_report_of_another_kind_is_refused():
    """Anything but "mean" was a sum."""
    with pytest.raises(UserError, match="reduction is 'avg'; it must be 'mean' or 'sum'"):
        LossReport(reduction="avg")


def test_a_report_of_two_steps_counts_anew_in_each_epoch(rows):
    """Without ``LossReport.on_train_epoch_start`` the second epoch's first report takes a loss of the first epoch."""
    fitted = quiet_trainer(LossReport(every_n_steps=2), max_epochs=2, logger=rows, log_every_n_steps=1)
    model = LitClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    fitted.fit(model, datamodule=SyntheticCIFAR10(30, 10, batch_size=10, val_size=0))
    table = rows.table()
    reports = {step: row["train/loss_mean_2"] for step, row in table.items() if "train/loss_mean_2" in row}
    losses = {step: table[step]["train/loss"] for step in range(1, 7)}
    assert reports == {step: (losses[step - 1] + losses[step]) / 2 for step in (2, 5)}


def test_a_training_step_of_the_users_is_recorded_too(rows):
    class Own(LitClassifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return {"loss": nn.functional.cross_entropy(self(x), y)}

    trainer = quiet_trainer(accumulate_grad_batches=2, logger=rows, log_every_n_steps=1)
    model = Own(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    trainer.fit(model, datamodule=SyntheticCIFAR10(50, 10, batch_size=10, val_size=0))
    losses = {step: row["train/loss"] for step, row in rows.rows if "train/loss" in row}
    assert list(losses) == [1, 2, 3]
    assert all(1.5 < loss < 3.5 for loss in losses.values())
