"""GradientMonitor in any Lightning project."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import Rows, quiet_trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch._subclasses import FakeTensorMode

from lit_basics import GradientMonitor, UserError, ValueMonitor
from lit_basics.callbacks.gradients import gradient_norms


class Foreign(pl.LightningModule):
    """Somebody's module, with two parts, one of which gets no gradient at first."""

    def __init__(self, manual=False, optimizers=1):
        super().__init__()
        self.backbone, self.head, self.late = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)
        self.automatic_optimization = not manual
        self.optimizer_count = optimizers
        self.norms = []

    def training_step(self, batch, batch_idx):
        hidden = self.backbone(batch)
        out = self.head(hidden) + (self.late(hidden) if batch_idx > 2 else 0)
        loss = (out**2).mean()
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.zero_grad()
            self.manual_backward(loss)
            self.keep_norms()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
            return None
        return loss

    def on_before_optimizer_step(self, optimizer):
        if self.automatic_optimization:
            self.keep_norms()

    def keep_norms(self):
        self.norms.append({n: p.grad.norm().item() for n, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        groups = [[*self.backbone.parameters(), *self.late.parameters()], list(self.head.parameters())]
        if self.optimizer_count == 1:
            return torch.optim.SGD([p for group in groups for p in group], lr=0.1)
        return [torch.optim.SGD(group, lr=0.1) for group in groups]

    def train_dataloader(self):
        draws = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(torch.randn(40, 4, generator=draws), batch_size=8)


def fit(module, *callbacks, **settings):
    rows = Rows()
    quiet_trainer(*callbacks, max_epochs=2, logger=rows, log_every_n_steps=1, **settings).fit(module)
    return rows.table()


class HalfPrecision(Foreign):
    """With a fused optimizer, or one that is not."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)


@pytest.mark.parametrize("monitor", [GradientMonitor, ValueMonitor])
def test_gradients_are_unscaled_under_a_fused_optimizer_too(monitor):
    """Without ``scale_left`` they are 256 times as large."""
    tables = []
    for fused in (False, True):
        torch.manual_seed(0)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        tables.append(fit(HalfPrecision(fused), monitor(), plugins=[precision]))
    expected, rows = ({key: value for key, value in table[1].items() if "grad" in key} for table in tables)
    assert rows == expected
    assert len(rows) > 4
    assert all(0 < rows[key] < 10 for key in rows if "norm" in key)


@pytest.mark.parametrize(("manual", "settings"), [(False, {}), (False, {"gradient_clip_val": 1e-3}), (True, {})])
def test_a_foreign_module_gets_its_unclipped_norms(manual, settings):
    module = Foreign(manual)
    table = fit(module, GradientMonitor(), **settings)
    assert list(table) == list(range(1, 11))
    for step, norms in enumerate(module.norms, start=1):
        row = {k.removeprefix("grad/norm/"): v for k, v in table[step].items() if k.startswith("grad/norm/")}
        assert row == pytest.approx(norms)  # by name, and only where there is a gradient
        assert table[step]["grad/norm"] == pytest.approx(sum(n**2 for n in norms.values()) ** 0.5)


def test_two_optimizers_each_show_their_own_parameters():
    table = fit(Foreign(manual=True, optimizers=2), GradientMonitor())
    assert set(table[1]) == {"grad/norm", "grad/norm/backbone.weight", "grad/norm/backbone.bias"}
    assert set(table[2]) == {"grad/norm", "grad/norm/head.weight", "grad/norm/head.bias"}


@pytest.mark.parametrize(("every", "steps"), [(4, [3, 4, 7, 8, 11, 12]), (3, [2, 3, 5, 6, 8, 9, 11, 12])])
def test_of_two_optimizers_that_take_turns_both_are_shown(every, steps):
    """Counted by the step alone an even ``every_n_steps`` shows the second only, and of a GAN never the generator."""
    table = fit(Foreign(manual=True, optimizers=2), GradientMonitor(every_n_steps=every))
    assert list(table)[: len(steps)] == steps
    for step in steps:
        of = [part for part in ("backbone", "head") if f"grad/norm/{part}.weight" in table[step]]
        assert of == ["backbone" if step % 2 else "head"]


def test_every_n_steps():
    assert list(fit(Foreign(), GradientMonitor(every_n_steps=3))) == [3, 6, 9]
    with pytest.raises(UserError, match="every_n_steps is 0"):
        GradientMonitor(0)


def test_the_weights_are_the_same_with_and_without_it():
    weights = []
    for callbacks in ([], [GradientMonitor()]):
        torch.manual_seed(0)
        module = Foreign()
        fit(module, *callbacks)
        weights.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_norms_of_sparse_complex_and_half_precision_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    half = torch.full((1000,), 200.0, dtype=torch.float16)  # its squares are beyond float16
    assert gradient_norms([torch.tensor([3 + 4j, 12j])])[1] == 13
    norms = gradient_norms([table.weight.grad, half])
    assert norms == pytest.approx([(10 + 4e7) ** 0.5, 10**0.5, 4e7**0.5])
    exact = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
    assert gradient_norms([exact])[1] == exact.item()
    assert gradient_norms([half, exact])[2] == exact.item()


def test_gradients_on_two_gpus():
    """By torch's stand-ins for tensors of GPUs."""
    with FakeTensorMode():
        norms = gradient_norms([torch.ones(2, device="cuda:0"), torch.ones(3, device="cuda:1")])
    assert (norms.shape, norms.device) == ((3,), torch.device("cuda:0"))
