"""speed96: the module against the recipe written out here, its proxy trained first as in the source."""

import math

import pytest
import torch
from helpers import fit as fit_by_command
from helpers import metrics
from speed_runs import BATCH, EPOCHS, fit, images, same_batches, whitening
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lit_basics import LitSpeedNet96, LookaheadLR, LookaheadSGD, NonFiniteGuard, RandomState, SpeedNet, verify
from lit_basics.cli import main
from lit_basics.errors import UserError
from lit_basics.nets import patch_covariance

WIDTHS = {"widths": (8, 16, 16), "proxy_widths": (4, 8, 8)}
STEPS = EPOCHS * 3
CHOSEN = BATCH // 2


def rate(step):
    warmup = int(STEPS * 0.1)
    return 0.2 + 0.8 * step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)


class Summed:
    """The source's update, of the sum of the losses: SGD with the learning rates of 1024 images."""

    def __init__(self, net):
        scale = 1024 * (1 + 1 / 0.15)
        lr, decay = 9 / scale, 0.012 * 1024 / scale
        norms = [p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters() if p.requires_grad]
        others = [p for p in net.parameters() if p.requires_grad and not any(p is norm for norm in norms)]
        groups = [
            {"params": norms, "lr": 64 * lr, "weight_decay": decay / (64 * lr)},
            {"params": others, "lr": lr, "weight_decay": decay / lr},
        ]
        self.optimizer = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
        self.scheduler = LambdaLR(self.optimizer, rate)

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def choices(proxy, batches):
    """The proxy's run: which images of each step."""
    update, chosen = Summed(proxy), []
    for step in range(STEPS):
        x, y = batches[step % 3]
        losses = F.cross_entropy(proxy(x), y, label_smoothing=0.2, reduction="none")
        mask = torch.zeros(BATCH, dtype=torch.bool)
        mask[losses.argsort()[-CHOSEN:]] = True
        chosen.append(mask)
        if step % 4 == 0:
            update.step((losses * mask).sum())
        update.scheduler.step()
    return chosen


def written_out(net, batches, chosen):
    update = Summed(net)
    slow = {name: value.clone() for name, value in net.state_dict().items()}
    for step, mask in enumerate(chosen, 1):
        x, y = batches[(step - 1) % 3]
        update.step(F.cross_entropy(net(x[mask]), y[mask], label_smoothing=0.2, reduction="sum"))
        update.scheduler.step()
        if step % 5 == 0:
            share = 0.95**5 * (step / STEPS) ** 3
            for name, value in net.state_dict().items():
                if value.is_floating_point():
                    value.copy_(slow[name].lerp_(value, 1 - share))


def test_the_recipe_equals_the_one_written_out(monkeypatch):
    data, batches = same_batches(monkeypatch)
    scale = 1024 * (1 + 1 / 0.15)
    exact = {"lr": 9 / scale * CHOSEN, "bias_lr": 64 * 9 / scale * CHOSEN, "lookahead": 0.95**5}
    optimizer = lambda groups: LookaheadSGD(groups, **exact, weight_decay=0.012 * 1024 / scale)  # noqa: E731
    model = LitSpeedNet96(**WIDTHS, optimizer=optimizer).double()
    net = SpeedNet(10, WIDTHS["widths"], 3, 0.1, 1 / 9)
    proxy = SpeedNet(10, WIDTHS["proxy_widths"], 2, 0.1, 1 / 9)
    x = batches[0][0].double()
    for mine, theirs in ((net, model.net), (proxy, model.proxy)):
        mine.load_state_dict(theirs.state_dict())
        mine.double()
        with torch.no_grad():
            mine.whiten.weight.copy_(whitening(x))
    proxy.whiten.bias.requires_grad_(False)
    batches = [(x.double(), y) for x, y in batches]
    # in float64, where another order of the sums does not grow into another choice
    written_out(net, batches, choices(proxy, batches))
    fit(model, data, precision="64-true")
    for mine, theirs in ((net, model.net), (proxy, model.proxy)):
        for (name, expected), value in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            if "num_batches" not in name:
                assert (value - expected).abs().max() < 1e-10, name


def test_it_passes_verify():
    report = verify(
        LitSpeedNet96(**WIDTHS),
        datamodule=images(crop=4, cutout=12),
        checks=["loop", "resume", "manual"],
        steps=9,
        progress=False,
        callbacks=[RandomState()],
    )
    assert report.passed, str(report)


def test_the_loss_is_that_of_the_images_the_proxy_finds_hardest():
    model = LitSpeedNet96(**WIDTHS, hardest=0.25)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    loss = model.compute_loss((x, y), 0)
    losses = F.cross_entropy(model.logits(model.proxy, x), y, reduction="none", label_smoothing=0.2)
    hardest = losses.argsort()[-4:].sort().values
    assert torch.equal(loss, model.criterion(model(x[hardest]), y[hardest]))
    loss.backward()
    gradient = model.proxy.head.weight.grad
    (expected,) = torch.autograd.grad(losses[hardest].mean(), model.proxy.head.weight)
    assert torch.equal(gradient, expected)


def test_cut_out_squares_do_not_count_in_the_whitening():
    x = torch.randn(50, 3, 32, 32)
    holes = x.clone()
    holes[:, :, :16] = 0  # rows of patches within it, and one at its edge
    assert torch.allclose(patch_covariance(holes[:, :, 16:]), patch_covariance(x[:, :, 16:]))
    edge = patch_covariance(holes) / patch_covariance(x[:, :, 16:])
    assert 0.9 < edge.diagonal().mean() < 1


def test_lookahead_moves_statistics_too_and_is_saved():
    weight, statistic = nn.Parameter(torch.ones(2)), torch.ones(2)

    def made():
        return LookaheadSGD([{"name": "weights", "params": [weight, statistic]}], momentum=0.0, lookahead=0.5)

    def steps(optimizer, count):
        for _ in range(count):
            weight.grad = torch.full((2,), -1.0)
            statistic.add_(1)
            optimizer.step()

    optimizer = made()
    steps(optimizer, 7)  # slow from 2; at 5 half of it and 6
    state = optimizer.state_dict()
    optimizer = made()
    optimizer.load_state_dict(state)
    steps(optimizer, 3)
    assert torch.equal(statistic, torch.full((2,), 6.5))  # half of 4 and 9


def test_the_schedule():
    optimizer = LookaheadSGD([{"name": "weights", "params": [nn.Parameter(torch.ones(1))]}], lr=1.0, lookahead=0.5)
    scheduler, rows = LookaheadLR(optimizer, 20), []
    for _ in range(21):
        rows.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["lookahead"]))
        optimizer.step()
        scheduler.step()
    assert [lr for lr, _ in rows[:3]] == pytest.approx([0.2, 0.6, 1.0])
    assert [lr for lr, _ in rows[-2:]] == pytest.approx([1 / 18, 0.0])
    assert [share for _, share in rows[:2]] == pytest.approx([0.5 / 8000, 0.5 * 8 / 8000])
    assert rows[19][1] == 0.5


def test_the_sizes_are_the_sources():
    model = LitSpeedNet96()
    assert sum(p.numel() for p in model.net.parameters()) == 9_918_776
    assert sum(p.numel() for p in model.proxy.parameters()) == 146_744


class Spoilt(LitSpeedNet96):
    """Its loss is NaN in the third batch."""

    def compute_loss(self, batch, batch_idx):
        loss = super().compute_loss(batch, batch_idx)
        return loss * math.nan if self.trainer.fit_loop.total_batch_idx == 2 else loss


@pytest.mark.filterwarnings("ignore:loss is")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_guard_and_lookahead_go_together(policy):
    model = Spoilt(**WIDTHS)
    guard = NonFiniteGuard(policy)
    fit(model, images(), guard)  # rolled back to before the whitening and the slow weights
    assert guard.faults == 1
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model.net.whitened
    assert model.proxy.whitened


def test_a_step_without_gradients_is_none():
    weight = nn.Parameter(torch.ones(2))
    optimizer = LookaheadSGD([{"name": "weights", "params": [weight]}], lookahead=0.5, lookahead_steps=1)
    weight.grad = torch.ones(2)
    optimizer.step()
    after = weight.detach().clone()
    weight.grad = None
    optimizer.step()
    assert torch.equal(weight, after)


def test_each_net_is_whitened_once():
    model, other = LitSpeedNet96(**WIDTHS), LitSpeedNet96(**WIDTHS)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    model.compute_loss((x, y), 0)
    first = model.net.whiten.weight.clone()
    assert model.net.whitened
    assert not other.net.whitened
    model.compute_loss((2 * x, y), 0)
    assert torch.equal(model.net.whiten.weight, first)
    other.net.load_state_dict(model.net.state_dict())
    other.compute_loss((2 * x, y), 0)
    assert torch.equal(other.net.whiten.weight, first)
    assert other.proxy.whitened
    assert not torch.equal(other.proxy.whiten.weight, first)


class TrainsFilters(LitSpeedNet96):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net.whiten.requires_grad_(True)


def test_whitening_filters_that_are_trained_are_not_set_again(monkeypatch):
    whiten, set_nets = SpeedNet.whiten_, []
    monkeypatch.setattr(SpeedNet, "whiten_", lambda net, covariance: set_nets.append(net) or whiten(net, covariance))
    model = TrainsFilters(**WIDTHS)
    fit(model, images())
    assert set_nets == [model.net, model.proxy]
    assert not model.net.whitened
    fit(model, images(), max_epochs=1)
    loaded = TrainsFilters(**WIDTHS)
    loaded.load_state_dict(model.state_dict())
    fit(loaded, images(), max_epochs=1)
    assert set_nets == [model.net, model.proxy]


def test_a_longer_schedule_goes_on_from_a_shorter_ones_state():
    rates = []
    for first in (10, 20):
        optimizer = LookaheadSGD([{"name": "weights", "params": [nn.Parameter(torch.ones(1))]}])
        scheduler = LookaheadLR(optimizer, first)
        for step in range(12):
            if step == 5:
                state, optimizers = scheduler.state_dict(), optimizer.state_dict()
                scheduler = LookaheadLR(optimizer, 20)
                optimizer.load_state_dict(optimizers)
                scheduler.load_state_dict(state)
            optimizer.step()
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] > 0


def test_every_parameter_is_in_a_group():
    model = LitSpeedNet96(**WIDTHS)
    model.net.head = nn.Linear(16, 10)
    names = [name for name, _ in model.named_parameters() if not name.endswith("whiten.weight")]
    for converted in (model, nn.SyncBatchNorm.convert_sync_batchnorm(model)):
        groups = {group["name"]: group["params"] for group in converted.trained_parameters()}
        trained = [p for params in groups.values() for p in params if p.requires_grad]
        assert len(trained) == len([p for p in converted.parameters() if p.requires_grad]) < len(names)
        assert [len(groups[name]) for name in ("biases", "proxy_biases")] == [9, 6]
        assert len(groups["weights"]) == 9 + 1 + 2 + 18  # filters, the whitening's bias, the head, statistics


def test_a_resume_with_another_rate_is_refused(capsys):
    small = ["--model.widths", "[8,16,16]", "--model.proxy_widths", "[4,8,8]", "--data", "SyntheticCIFAR10"]
    small += ["--data.train_images", "80", "--data.test_images", "20", "--data.batch_size", "40"]
    run = fit_by_command("--config", "speed96", *small, "--trainer.max_epochs", "1")
    for flag in ("lr", "bias_lr", "weight_decay", "lookahead"):
        words = ["fit", "--resume", str(run), "--trainer.max_epochs", "2", f"--model.optimizer.{flag}", "0.1"]
        assert main(words) == 2
        assert f"LookaheadSGD has no one {flag} for all parameters" in capsys.readouterr().err
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "3", "--model.optimizer.momentum", "0.8"]) == 0
    assert math.isfinite(metrics(run)[6]["train/loss_epoch"])
    (optimizer,) = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {group["momentum"] for group in optimizer["param_groups"]} == {0.8}


def test_a_training_without_an_end_is_refused():
    with pytest.raises(UserError, match="give max_epochs or max_steps"):
        fit(LitSpeedNet96(**WIDTHS), images(), max_epochs=-1, max_time="00:00:00:01")


def test_bad_arguments():
    for wrong in ({"lr": -1.0}, {"bias_lr": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(UserError, match="negative"):
            LookaheadSGD(LitSpeedNet96(**WIDTHS).trained_parameters(), **wrong)
    for wrong in ({"lookahead": 7.0}, {"lookahead_steps": 0}):
        with pytest.raises(UserError, match="they must be from 0 to 1"):
            LookaheadSGD(LitSpeedNet96(**WIDTHS).trained_parameters(), **wrong)
    with pytest.raises(UserError, match="hardest is 0"):
        LitSpeedNet96(hardest=0)
    with pytest.raises(UserError, match="depth is 4"):
        SpeedNet(depth=4)
    with pytest.raises(UserError, match="groups named weights, biases"):
        LookaheadSGD(nn.Linear(2, 2).parameters())
