"""System A: three linear convolutions, five epochs of ten batches of one image."""

import numpy as np
import pytest
import torch
from helpers import assert_same_steps, copied, epoch_indices, fit, metrics, train, write_npz
from torch import nn


def tutorial(path, initial):
    """The tutorial's run: the summed loss of each epoch and the weights after every step."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.Linear(64, 10),
    )
    net.load_state_dict(initial)
    with np.load(path) as file:
        images, labels = file["x_train"], file["y_train"]
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    sums, weights = [], []
    for epoch in range(5):
        running_loss = 0.0
        for index in epoch_indices(0, epoch, len(images))[:10].split(1):
            inputs = torch.from_numpy(images[index.numpy()]).permute(0, 3, 1, 2).contiguous().float() / 255
            loss = criterion(net(inputs), torch.from_numpy(labels[index.numpy()]).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            weights.append(copied(net))
        sums.append(running_loss)
    return sums, weights


@pytest.mark.parametrize("overlay", [[], ["--config", "manual"]], ids=["automatic", "manual"])
def test_recipe_equals_the_tutorials_run(overlay, tmp_path):
    path = write_npz(tmp_path / "images.npz")
    _, weights, _ = train("--config", "convnet3", *overlay, "--data", "NpzDataModule", "--data.path", path)
    _, after = tutorial(path, weights.before)
    assert_same_steps(weights.after, after, 50)


def test_the_summed_loss_of_each_epoch_is_reported(tmp_path, capsys):
    path = write_npz(tmp_path / "images.npz")
    _, weights, _ = train("--config", "convnet3", "--data", "NpzDataModule", "--data.path", path)
    sums, _ = tutorial(path, weights.before)
    capsys.readouterr()
    table = metrics(fit("--config", "convnet3", "--data", "NpzDataModule", "--data.path", path))
    assert [table[step]["train/loss_sum_epoch"] for step in range(10, 51, 10)] == pytest.approx(sums)
    printed = [line for line in capsys.readouterr().out.splitlines() if "] loss: " in line]
    assert printed == [f"[{epoch + 1},    10] loss: {total:.3f}" for epoch, total in enumerate(sums)]
