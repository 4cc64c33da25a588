"""System E: LeNet-5 with the best-loss checkpoint, and the tutorial's mistakes that are not ours."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import assert_equal, assert_same_steps, copied, epoch_indices, fit, metrics, train, write_npz
from torch import nn

from lit_basics import BestLossCheckpoint, LeNet5, LitClassifier


def lenet5():
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


@pytest.mark.parametrize("overlay", [[], ["--config", "manual"]], ids=["automatic", "manual"])
def test_recipe_equals_the_loop(overlay, tmp_path):
    path = write_npz(tmp_path / "images.npz", train=650)  # the last batch of an epoch is smaller
    _, weights, _ = train(
        *("--config", "lenet5", *overlay, "--data", "NpzDataModule", "--data.path", path),
        *("--trainer.max_epochs", "3"),
    )
    net = lenet5()
    net.load_state_dict(dict(zip(net.state_dict(), weights.before.values(), strict=True)))
    with np.load(path) as file:
        x = (torch.from_numpy(file["x_train"]).permute(0, 3, 1, 2).contiguous().float() / 255 - 0.5) / 0.5
        y = torch.from_numpy(file["y_train"]).long()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    after = []
    for epoch in range(3):
        for index in epoch_indices(0, epoch, 650).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
            after.append(dict(zip(weights.before, copied(net).values(), strict=True)))
    assert_same_steps(weights.after, after, 33)


def test_the_loss_is_reported_every_hundred_batches(tmp_path):
    path = write_npz(tmp_path / "images.npz", train=500)
    run = fit(
        *("--config", "lenet5", "--data", "NpzDataModule", "--data.path", path, "--data.batch_size", "2"),
        *("--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"),
    )
    table = metrics(run)
    losses = [table[step]["train/loss"] for step in range(1, 251)]
    reports = {step: row["train/loss_mean_100"] for step, row in table.items() if "train/loss_mean_100" in row}
    assert reports == pytest.approx({100: np.mean(losses[:100]), 200: np.mean(losses[100:200])})


def test_lenet5_has_the_papers_layers():
    shapes = [tuple(p.shape) for p in LeNet5().parameters() if p.ndim > 1]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]


class Scripted(LitClassifier):
    """A classifier whose training losses are given; each step moves its one weight by one."""

    def __init__(self, losses):
        super().__init__(nn.Linear(1, 2), num_classes=2, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        self.losses = losses
        self.net.requires_grad_(False)
        self.net.weight.zero_()
        self.net.weight.requires_grad_(True)

    def compute_loss(self, batch, batch_idx):
        loss = self.losses[self.trainer.global_step]
        # the value is scripted, the gradient is -1
        return loss - (self.net.weight.sum() - self.net.weight.sum().detach()) / 2 * 2

    def train_dataloader(self):
        return [0, 0]

    def val_dataloader(self):
        return []


def train_scripted(losses, tmp_path, manual=False):
    best = BestLossCheckpoint(str(tmp_path / "checkpoints"))
    model = Scripted(losses)
    model.automatic_optimization = not manual
    trainer = pl.Trainer(
        max_epochs=len(losses) // 2,
        limit_val_batches=0,
        callbacks=[best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model)
    return best, model


@pytest.mark.parametrize("manual", [False, True])
def test_best_is_a_copy_and_not_the_live_model(tmp_path, manual):
    best, model = train_scripted([5.0, 5.0, 3.0, 3.0, 4.0, 4.0], tmp_path, manual)
    saved = torch.load(tmp_path / "checkpoints" / "best.pth", weights_only=True)
    assert saved["weight"].tolist() == [[4.0], [4.0]]  # after the second epoch's two steps... and no later
    assert model.net.weight.tolist() == [[6.0], [6.0]]
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    assert_equal({k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items()}, saved)
    bare = nn.Linear(1, 2)
    bare.load_state_dict(saved)


def test_losses_above_one_count_too(tmp_path):
    # the tutorial's minimum starts at 1: a loss that never falls below it would keep nothing
    best, _ = train_scripted([9.0, 9.0, 8.0, 8.0], tmp_path)
    assert best.best_model_score.item() == 8.0


def test_the_minimum_is_updated(tmp_path):
    # the tutorial's minimum never changes: every loss below 1 would count as the best
    best, _ = train_scripted([0.5, 0.5, 0.1, 0.1, 0.3, 0.3], tmp_path)
    assert best.best_model_score.item() == pytest.approx(0.1)
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] == 4


def test_one_lucky_batch_is_not_the_best(tmp_path):
    # the tutorial judges by one batch: the 0.0 of the second epoch would win, its mean is worse
    best, _ = train_scripted([1.0, 1.0, 0.0, 4.0], tmp_path)
    assert best.best_model_score.item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, bad):
    best, _ = train_scripted([bad, bad, 2.0, 2.0, bad, bad], tmp_path)
    assert best.best_model_score.item() == 2.0


def test_without_a_finite_loss_there_is_no_best(tmp_path):
    best, _ = train_scripted([float("nan")] * 4, tmp_path)
    assert best.best_model_path == ""
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())
