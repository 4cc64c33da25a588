"""System D: a line through eleven points, and every optimizer of the tutorial."""

import pytest
import torch
from helpers import assert_same_steps, copied, fit, metrics, train
from torch import nn

X = 0.1 * torch.tensor([0.5, 14, 15, 28, 11, 8, 3, -4, 6, 13, 21])
Y = torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])
TABLE = [39.538250, 18.696901, 12.456582, 10.581183, 10.017575, 9.848182, 9.797276, 9.781981, 9.777378, 9.776002]

OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))
        self.b = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return self.w * x + self.b


def loop(optimizer_class, steps, **arguments):
    """The hand-written loop; its weights after every step."""
    line = Line()
    optimizer = optimizer_class(line.parameters(), **arguments)
    weights = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(line(X), Y)
            loss.backward()
            return loss

        optimizer.step(closure)
        weights.append(copied(line))
    return weights


def test_the_published_losses_stand_in_metrics_csv():
    table = metrics(fit("--config", "linear"))
    assert list(table) == list(range(1, 1001))
    # the table has 7 digits, and another order of summation moves the last
    losses = [table[step]["train/loss"] for step in range(100, 1001, 100)]
    assert losses == pytest.approx(TABLE, rel=1e-6)
    assert table[1000]["param/w"] == pytest.approx(17.9473, abs=5e-5)
    assert table[1000]["param/b"] == pytest.approx(32.9443, abs=5e-5)
    assert table[1]["lr"] == 0.01


def test_one_step_at_a_small_learning_rate():
    model, _, _ = train("--config", "linear", "--model.optimizer.lr", "1e-5", "--trainer.max_epochs", "1")
    assert model.net.w.item() == pytest.approx(1.0013, abs=5e-5)
    assert model.net.b.item() == pytest.approx(0.0010, abs=5e-5)


def test_the_update_by_hand_is_the_recipe():
    params = torch.tensor([1.0, 0.0], requires_grad=True)
    by_hand = []
    for _ in range(1000):
        if params.grad is not None:
            params.grad.zero_()
        ((params[0] * X + params[1] - Y) ** 2).mean().backward()
        with torch.no_grad():
            params -= 0.01 * params.grad
        by_hand.extend(params.tolist())
    _, weights, _ = train("--config", "linear")
    recipe = [number for state in weights.after for number in (state["w"].item(), state["b"].item())]
    # not bit for bit: SGD multiplies and adds in one rounding, by hand there are two
    assert recipe == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_equals_its_loop_by_flag(name, manual):
    overlay = ["--config", "manual"] if manual else []
    _, weights, _ = train("--config", "linear", *overlay, "--model.optimizer", name, "--trainer.max_epochs", "10")
    # the recipe's learning rate stays when only the optimizer is changed
    assert_same_steps(weights.after, loop(getattr(torch.optim, name), 10, lr=0.01), 10)


@pytest.mark.parametrize("overlay", [[], ["--config", "manual"]])
def test_lbfgs_logs_the_loss_and_gradient_that_each_step_started_from(overlay):
    run = fit("--config", "linear", *overlay, "--model.optimizer", "LBFGS", "--trainer.max_epochs", "3")
    first = metrics(run)[1]
    assert first["train/loss"] == pytest.approx(nn.functional.mse_loss(Line()(X), Y).item())
    assert first["grad/b"] == pytest.approx(2 * (Line()(X) - Y).mean().item())


@pytest.mark.parametrize("overlay", [[], ["--config", "manual"]])
def test_embedding_equals_its_loop(overlay):
    _, weights, _ = train("--config", "embedding", *overlay, "--trainer.max_epochs", "50")
    table = nn.Embedding(11, 1, sparse=True)
    table.load_state_dict(weights.before)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.3)
    after = []
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.mse_loss(table(torch.arange(11)), Y[:, None]).backward()
        assert table.weight.grad.is_sparse
        optimizer.step()
        after.append(copied(table))
    assert_same_steps(weights.after, after, 50)


def test_embedding_learns_its_table():
    run = fit("--config", "embedding")
    last = metrics(run)[1000]
    assert last["train/loss"] < 1e-3
    assert last["param/weight[3,0]"] == pytest.approx(81.9, abs=0.1)
