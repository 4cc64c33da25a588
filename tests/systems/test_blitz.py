"""System C: the four-step image classifier, beside the tutorial's loop with PIL images."""

import numpy as np
import pytest
import torch
from helpers import assert_same_steps, copied, epoch_indices, train, write_npz
from PIL import Image
from torch import nn
from torchvision import transforms

STEPS = 500
ONE = ["--model.steps_per_execution", "1"]
DEFAULTS = ["--trainer.callbacks", "[{class_path: GradientMonitor}]", "--model.optimizer.fused", "false"]


class Net(nn.Module):
    """The tutorial's net."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(nn.functional.relu(self.conv1(x)))
        x = self.pool(nn.functional.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = nn.functional.relu(self.fc1(x))
        x = nn.functional.relu(self.fc2(x))
        return self.fc3(x)


def tutorial(path, initial, size, fused):
    """The tutorial's loop: the losses and the weights after every step; ``fused`` is whether SGD is."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    with np.load(path) as file:
        images, labels = file["x_train"], file["y_train"]
    net = Net()
    net.load_state_dict(initial)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, fused=fused)
    losses, weights = [], []
    for epoch in range(STEPS * 4 // size):
        for index in epoch_indices(0, epoch, size).split(4):
            inputs = torch.stack([transform(Image.fromarray(images[i])) for i in index.tolist()])
            targets = torch.from_numpy(labels[index.numpy()]).long()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            weights.append(copied(net))
    return losses, weights


@pytest.mark.parametrize(
    ("words", "switched"),
    [([], True), (ONE, True), ([*ONE, "--config", "manual"], True), (DEFAULTS, False)],
    ids=["as the recipe is", "automatic", "manual", "at torch's defaults"],
)
def test_recipe_equals_the_tutorials_loop(words, switched, tmp_path, monkeypatch):
    path = write_npz(tmp_path / "images.npz", train=1000)
    data = ["--data", "NpzDataModule", "--data.path", path]
    _, weights, trainer = train("--config", "blitz", *words, *data, "--trainer.max_epochs", "2")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", not switched)
    losses, after = tutorial(path, weights.before, 1000, fused=switched)
    assert_same_steps(weights.after, after, STEPS)
    epoch_mean = trainer.callback_metrics["train/loss"].item()
    assert epoch_mean == pytest.approx(np.mean(losses[250:]))
