"""System B: gradients by hand."""

import pytest
import torch
from helpers import assert_same_steps, copied, fit, metrics, train

from lit_basics import LitObjective, Quadratic, Square


def test_quadratic_shows_its_gradient_in_metrics_csv():
    row = metrics(fit("--config", "objective-quadratic"))[1]
    assert row["train/loss"] == 27
    assert [row[f"grad/{name}"] for name in "abc"] == [16, 4, 1]


def test_square_shows_its_gradient_in_metrics_csv():
    row = metrics(fit("--config", "objective-square"))[1]
    assert [row["grad/x"], row["grad/y"]] == [6, 6]


def test_powers_ends_where_it_was_published():
    table = metrics(fit("--config", "objective-powers"))
    assert list(table) == list(range(1, 101))
    assert f"{table[100]['param/x']:.4f}" == "-9.0000"
    assert f"{table[100]['param/y']:.4e}" == "4.0741e-10"
    assert f"{table[100]['param/z']:.4f}" == "0.0296"


@pytest.mark.parametrize("overlay", [[], ["--config", "manual"]])
@pytest.mark.parametrize(
    ("name", "start", "function", "lr", "steps"),
    [
        ("quadratic", {"a": 1.0, "b": 2.0, "c": 3.0}, lambda p: p["a"] * 4.0**2 + p["b"] * 4.0 + p["c"], 0.01, 1),
        ("square", {"x": 1.0, "y": 2.0}, lambda p: (p["x"] + p["y"]) ** 2, 0.01, 1),
        ("powers", {"x": 1.0, "y": 2.0, "z": 3.0}, lambda p: p["x"] + p["y"] ** 2 + p["z"] ** 3, 0.1, 100),
    ],
)
def test_objective_equals_its_loop(name, start, function, lr, steps, overlay):
    variables = {key: torch.tensor(value, requires_grad=True) for key, value in start.items()}
    optimizer = torch.optim.SGD(variables.values(), lr=lr)
    after = []
    for _ in range(steps):
        optimizer.zero_grad()
        function(variables).backward()
        optimizer.step()
        after.append({key: value.detach().clone() for key, value in variables.items()})
    _, weights, _ = train("--config", f"objective-{name}", *overlay)
    assert_same_steps([{k: s[k] for k in start} for s in weights.after], after, steps)


def test_worked_gradients():
    for objective, value, gradient in ((Quadratic(), 27, [16, 4, 1]), (Square(), 9, [6, 6])):
        result = objective()
        result.backward()
        assert result.item() == value
        assert [p.grad.item() for p in objective.parameters()] == gradient


@pytest.mark.parametrize("manual", [False, True])
def test_accumulation_is_a_trainer_setting(manual, tmp_path):
    import lightning.pytorch as pl

    class TwoBatches(LitObjective):
        def train_dataloader(self):
            return [0, 0]

    model = TwoBatches(Square(), automatic_optimization=not manual)
    before = copied(model.net)
    trainer = pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model)
    assert trainer.global_step == 1
    # two halves of the gradient 6 make one update by SGD 0.01
    assert torch.equal(model.net.x.detach(), before["x"] - 0.01 * torch.tensor(6.0))
