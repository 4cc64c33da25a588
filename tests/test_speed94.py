"""speed94: the net, the optimizer and the module against loops and formulas written out here."""

import contextlib
import os
import shutil
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from helpers import Weights, assert_equal, on_ranks, ranks
from speed_runs import BATCH, EPOCHS, IMAGES, fit, images, same_batches, whitening
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lit_basics import (
    LitClassifier,
    LitSpeedNet,
    LitSpeedNet96,
    ProcessSettings,
    RandomState,
    SpeedNet,
    SpeedOptimizer,
    SyntheticCIFAR10,
    verify,
)
from lit_basics.callbacks import process_settings
from lit_basics.errors import UserError
from lit_basics.nets import patch_covariance

WIDTHS = (8, 16, 16)


def written_out(net, batches, epochs, hardest):
    """The recipe by hand: the sum of the losses, and the learning rates that belong to it."""
    steps, done = len(batches) * epochs, 0
    momenta, last = {}, {}
    for epoch in range(epochs):
        for x, y, index in batches:  # the same in each epoch
            if hardest[epoch] < 1:
                known = [last[number] for number in index.tolist()]
                chosen = sorted(sorted(range(BATCH), key=lambda n: -known[n])[: int(hardest[epoch] * BATCH)])
                x, y, index = x[chosen], y[chosen], index[chosen]
            side = [24, 24, 24, 28][epoch]
            x = F.interpolate(x, size=(side, side), mode="bilinear")
            for p in net.parameters():
                p.grad = None
            losses = F.cross_entropy(net(x), y, label_smoothing=0.2, reduction="none")
            (losses.mean() * BATCH).backward()
            last.update(zip(index.tolist(), losses.tolist(), strict=True))
            share, early = 1 - done / steps, max(0, 1 - done / (3 * len(batches)))
            with torch.no_grad():
                for name, p in net.named_parameters():
                    if p.grad is None:
                        continue
                    buffer = momenta.setdefault(name, torch.zeros_like(p))
                    if p.ndim == 4:
                        buffer.mul_(0.6).add_(p.grad)
                        g = (p.grad + 0.6 * buffer).flatten(1)
                        g = g / (g.norm() + 1e-7 * BATCH)  # as of the mean
                        wide = g if g.shape[0] <= g.shape[1] else g.T
                        for _ in range(3):
                            a = wide @ wide.T
                            wide = 3.4445 * wide - 4.7750 * a @ wide + 2.0315 * a @ a @ wide
                        g = wide if g.shape[0] <= g.shape[1] else wide.T
                        p.mul_(len(p) ** 0.5 / p.norm()).sub_(0.24 * share * g.view_as(p))
                    else:
                        lr = 0.67 if p.ndim == 2 else 0.053
                        g = p.grad + 2e-6 * BATCH / lr * p
                        buffer.mul_(0.85).add_(g)
                        lr *= early if name == "whiten.bias" else share
                        p.sub_(lr * (g + 0.85 * buffer))
            done += 1


@pytest.mark.parametrize("hardest", [(1, 1, 1, 1), (1, 1, 0.5, 0.25)])
def test_the_recipe_equals_the_one_written_out(hardest, monkeypatch):
    data, batches = same_batches(monkeypatch, with_indices=True)
    optimizer = lambda groups: SpeedOptimizer(  # noqa: E731
        groups, head_lr=0.67 * BATCH, bias_lr=0.053 * BATCH, weight_decay=2e-6 * BATCH
    )
    settings = {"hardest": hardest, "resolutions": [24, 24, 24, 28]}
    model = LitSpeedNet(widths=WIDTHS, **settings, optimizer=optimizer).double()
    net = SpeedNet(widths=WIDTHS)
    net.load_state_dict(model.net.state_dict())
    net.double()
    with torch.no_grad():
        net.whiten.weight.copy_(whitening(batches[0][0].double()))
    # in float64, where another order of the sums does not grow into another training
    batches = [(x.double(), y, index) for x, y, index in batches]
    written_out(net, batches, EPOCHS, hardest)
    fit(model, data, precision="64-true")
    for (name, value), expected in zip(model.net.state_dict().items(), net.state_dict().values(), strict=True):
        if "num_batches" not in name:
            assert (value - expected).abs().max() < 1e-10, name


class Kept(LitSpeedNet):
    def training_step(self, batch, batch_idx):
        if self.global_step == 0:
            self.first = batch[0]
        return super().training_step(batch, batch_idx)

    def keep_losses(self, index, logits, y):
        super().keep_losses(index, logits, y)
        own = F.cross_entropy(logits, y, reduction="none", label_smoothing=0.2)
        assert torch.equal(self.losses[index], own.to(self.losses))


def test_two_ranks_keep_the_losses_and_whiten_by_the_images_of_both():
    """Without the exchange each rank knows the losses of its own images only, and whitens by those."""
    model, data = Kept(widths=WIDTHS, resolutions=[], hardest=[1, 0.5]), images(with_indices=True)

    def trained():
        on_ranks().fit(model, data)
        return model.first, model.losses, model.net.whiten.weight.detach()

    (first, losses, filters), (second, others, of_other) = ranks(trained)
    seen = torch.cat([first, second])
    assert len(seen) == BATCH
    assert torch.equal(losses < 1e4, torch.arange(len(losses)) < IMAGES)
    assert torch.equal(losses, others)
    assert torch.equal(filters, of_other)
    # each has its negative
    assert torch.allclose(filters.abs(), whitening(seen).float().abs(), rtol=1e-3, atol=1e-3)


def test_ranks_that_begin_apart_whiten_as_rank_0_does():
    """Asked each alone, rank 0 waits for ever: the other has got filters that are not as it made its own."""

    def filters():
        torch.manual_seed(int(os.environ["RANK"]))
        model = LitSpeedNet(widths=WIDTHS, resolutions=[])
        model.net.whiten.requires_grad_(True)
        on_ranks().fit(model, images())
        return model.net.whiten.weight.detach()

    one, other = ranks(filters)
    assert torch.equal(one, other)


def test_it_passes_verify():
    report = verify(
        LitSpeedNet(widths=WIDTHS, resolutions=[16, 24, 32], hardest=[1, 0.5]),
        datamodule=images(with_indices=True),
        checks=["loop", "resume", "manual"],
        steps=12,  # into the epoch that leaves the whitening as it is
        progress=False,
        callbacks=[RandomState()],
    )
    assert report.passed, str(report)


def test_the_whitening_makes_patches_white():
    x = torch.randn(200, 3, 32, 32).cumsum(3) / 4
    net = SpeedNet(widths=WIDTHS)
    assert not net.whitened
    net.whiten_(patch_covariance(x))
    out = F.conv2d(x, net.whiten.weight)[:, :12].transpose(0, 1).flatten(1)
    assert torch.allclose(out @ out.T / out.shape[1], torch.eye(12), atol=0.05)  # 0.05: from the 5e-4 under the root
    assert not net.whiten.weight.requires_grad


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_it_can_be_compiled_in_bfloat16():
    net = SpeedNet(widths=(24, 24, 24))
    net.blocks = nn.Sequential(nn.GELU())  # the rest takes a minute to compile
    x = torch.randn(20, 3, 16, 16)

    def gradients(net):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(net(x).float().square().sum(), [net.whiten.bias, net.head.weight])

    for gradient, expected in zip(gradients(torch.compile(net)), gradients(net), strict=True):
        assert (gradient - expected).norm() < 0.02 * expected.norm()  # bfloat16 has 8 bits: 0.004 a rounding


def test_a_device_without_bfloat16_is_left_the_autocast_that_it_has():
    """Otherwise autocast is entered, to switch it off, and with it a T4's float16 under 16-mixed; meta has none."""
    module = LitSpeedNet(widths=WIDTHS).to("meta")
    assert module(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("side", [16, 24, 28, 32])
def test_any_resolution(side):
    assert SpeedNet()(torch.zeros(2, 3, side, side)).shape == (2, 10)
    assert sum(p.numel() for p in SpeedNet().parameters()) == 1_972_792


def test_a_narrow_net_learns_at_the_learning_rates_of_the_wide_one():
    """With logits divided by the number of channels all activations of this one die within ten steps."""
    torch.manual_seed(0)
    assert SpeedNet().logit_scale == 1 / 256
    data = SyntheticCIFAR10(2000, 200, batch_size=250)
    trainer = fit(LitSpeedNet(widths=(16, 32, 32), resolutions=[]), data, max_epochs=2)
    assert trainer.callback_metrics["val/acc"] > 0.8


def test_images_flip_in_turns():
    data = images(crop=0, noise=24.0)
    data.setup("fit")
    loader = data.train_dataloader()
    plain = data.normalize(loader.inputs)

    def flipped(epoch):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        loader.sampler.set_epoch(epoch)
        out = torch.zeros(IMAGES, dtype=torch.bool)
        for (x, _), (_, index) in zip(batches, loader.sampler, strict=True):
            for image, number in zip(x, index, strict=True):
                out[number] = torch.equal(image, plain[number].flip(-1))
                assert out[number] or torch.equal(image, plain[number])
        return out

    first = flipped(0)
    assert 20 < first.sum() < IMAGES - 20
    assert torch.equal(flipped(1), ~first)
    assert torch.equal(flipped(2), first)


def test_tested_with_six_views():
    model = LitSpeedNet(widths=WIDTHS).eval()
    x = torch.randn(4, 3, 32, 32)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    views = [(0.5, x), (0.25, padded[:, :, 0:32, 0:32]), (0.25, padded[:, :, 2:34, 2:34])]
    expected = sum(w * (model(v) + model(v.flip(3))) / 2 for w, v in views)
    assert torch.allclose(model.predict_step(x, 0), expected, atol=1e-6)
    assert not torch.allclose(model(x), expected, atol=1e-6)


def test_the_learning_rates_fall_to_zero():
    rows = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rows.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    fit(LitSpeedNet(widths=WIDTHS), images(), Rates(), max_epochs=-1, max_steps=4)
    assert [row["whitening"] for row in rows] == pytest.approx([106 * (1 - i / 4) for i in range(4)])
    rows.clear()
    fit(LitSpeedNet(widths=WIDTHS), images(), Rates())
    assert len(rows) == 12
    assert [row["filters"] for row in rows] == pytest.approx([0.24 * (1 - i / 12) for i in range(12)])
    assert rows[9]["whitening"] == 0 < rows[8]["whitening"]


def test_no_gradient_of_the_whitening_when_its_rate_is_zero():
    seen, biases = [], []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            bias = pl_module.net.whiten.bias
            seen.append((trainer.current_epoch, bias.grad is not None))
            biases.append(bias.detach().clone())

    fit(LitSpeedNet(widths=WIDTHS), images(), Look())
    assert seen == [(epoch, epoch < 3) for epoch in range(EPOCHS) for _ in range(3)]
    assert not torch.equal(biases[8], biases[9])
    assert torch.equal(biases[9], biases[11])


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist")
def test_in_a_process_group_the_whitening_is_left_even_so(one_process_group):
    """There its gradient goes on being computed; a scheduler of the user's own does not hold it."""
    biases = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            biases.append(pl_module.net.whiten.bias.detach().clone())

    fit(LitSpeedNet(widths=WIDTHS, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 100)), images(), Look())
    assert not torch.equal(biases[7], biases[8])
    assert torch.equal(biases[8], biases[11])


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.rand(3, 32, 32), 0)] * 6)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
@pytest.mark.parametrize("kind", [LitSpeedNet, LitSpeedNet96])
def test_a_loader_without_a_length_tells_no_end(kind):
    """Lightning's number of steps is -1: the rates would grow."""
    with pytest.raises(UserError, match="without a length does not tell: give max_steps"):
        fit(kind(), None, max_epochs=2, train_dataloaders=DataLoader(Endless(), batch_size=3))
    fit(kind(widths=WIDTHS), None, max_steps=3, train_dataloaders=DataLoader(Endless(), batch_size=3))


@pytest.mark.parametrize("kind", [LitSpeedNet, LitSpeedNet96])
def test_the_default_rates_do_not_change_by_epochs(kind):
    """They would hardly change at all."""
    message = f"{kind.__name__}'s learning rates change step by step, but lr_interval is 'epoch': give an lr_scheduler"
    with pytest.raises(UserError, match=message):
        fit(kind(widths=WIDTHS, lr_interval="epoch"), images())
    by_epochs = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)  # noqa: E731
    fit(kind(widths=WIDTHS, lr_interval="epoch", lr_scheduler=by_epochs), images(), max_epochs=1)


def test_states_with_and_without_losses():
    """Without the hook a checkpoint loads only where ``hardest`` is what it was."""
    plain, choosy = LitSpeedNet(widths=WIDTHS), LitSpeedNet(widths=WIDTHS, hardest=[0.5])
    choosy.losses.fill_(2.0)
    choosy.load_state_dict(plain.state_dict())
    assert torch.equal(choosy.net.head.weight, plain.net.head.weight)
    assert torch.equal(choosy.losses, torch.full_like(choosy.losses, 2.0))
    plain.load_state_dict(choosy.state_dict())
    again = LitSpeedNet(widths=WIDTHS, hardest=[0.5])
    again.load_state_dict(choosy.state_dict())
    assert torch.equal(again.losses, choosy.losses)


def test_batches_with_indices_are_batches_for_other_modules_too():
    data = images(with_indices=True)
    trainer = fit(LitClassifier(nn.Sequential(nn.Flatten(), nn.LazyLinear(10))), data, max_epochs=1)
    trainer.validate(trainer.model, data.train_dataloader(), verbose=False)


def test_bad_arguments():
    with pytest.raises(UserError, match="at least 16 pixels"):
        LitSpeedNet(resolutions=[8])
    with pytest.raises(UserError, match="a share above 0, at most 1"):
        LitSpeedNet(hardest=[1, 0])
    with pytest.raises(UserError, match="with_indices true"):
        fit(LitSpeedNet(widths=WIDTHS, hardest=[0.5]), images())
    with pytest.raises(UserError, match="groups named filters, head"):
        SpeedOptimizer(nn.Linear(2, 2).parameters())


def smooth(count):
    """Images whose neighbouring pixels are nearly alike, as those of photographs: the spectrum falls by 1/f."""
    frequencies = torch.fft.fftfreq(32).abs()
    radius = (frequencies[:, None] ** 2 + frequencies**2).sqrt().clamp_min(1 / 32)
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = torch.fft.ifft2(torch.fft.fft2(noise) / radius**2).real
    return x / x.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whitening_is_as_precise_within_autocast(dtype):
    """In bfloat16 the smallest eigenvalues are below 0; in float16 sums are infinite."""
    x = smooth(64)
    expected = patch_covariance(x)
    assert torch.linalg.eigvalsh(expected).min() > 0
    with torch.autocast("cpu", dtype):
        assert torch.equal(patch_covariance(x), expected)
    net = SpeedNet(widths=WIDTHS)
    covariance = patch_covariance(x.bfloat16())
    assert covariance.dtype == torch.float32
    net.whiten_(covariance - 0.01 * torch.eye(12))  # as rounding may leave it
    assert net.whiten.weight.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trains_in_bfloat16_of_the_trainer(precision):
    class Smooth(SyntheticCIFAR10):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return smooth(len(batch[0])).to(batch[0].dtype), batch[1]

    model, data = LitSpeedNet(widths=WIDTHS), Smooth(IMAGES, 20, batch_size=BATCH, val_size=0)
    fit(model, data, max_epochs=1, precision=precision, limit_val_batches=0)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("length", [{"max_epochs": 9, "max_steps": 15}, {"max_epochs": 5}])
def test_the_whitenings_rate_is_0_after_three_epochs(length):
    rates = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(LitSpeedNet(widths=WIDTHS), images(), Look(), **length)  # of three steps an epoch
    assert min(rates[:8]) > 0
    assert rates[8:] == [0] * (len(rates) - 8)
    assert len(rates) > 9


class Failing(LitSpeedNet):
    def compute_loss(self, batch, batch_idx):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_settings_are_put_back(fails, monkeypatch):
    calls, seen = [], []
    monkeypatch.setattr(process_settings, "set_malloc", lambda libc, values: calls.append(values))

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((len(calls), torch.backends.mkldnn.enabled))

    model = Failing(widths=WIDTHS) if fails else LitSpeedNet(widths=WIDTHS)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        fit(model, images(), ProcessSettings(onednn=False, keep_memory=True), Look(), max_epochs=1)
    assert seen == [(1, False)]
    assert torch.backends.mkldnn.enabled
    assert calls == [process_settings.KEEP, process_settings.USUAL]


FAULTS = """
import ctypes, resource, torch
from lit_basics.callbacks.process_settings import KEEP, set_malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
set_malloc(ctypes.CDLL("libc.so.6"), KEEP)
faults()
print(usual, faults())
"""


def test_kept_memory_is_not_asked_for_again():
    # 40 MB five times: 51,200 pages, or 100 huge ones
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert usual >= 50
    assert kept <= usual / 2  # the few of other memory


CHURN = """
import ctypes, resource, sys, torch
from lit_basics.callbacks.process_settings import KEEP, USUAL, set_malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        [torch.ones(2_000_000) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "after":
    for values in (KEEP, USUAL):
        set_malloc(ctypes.CDLL("libc.so.6"), values)
faults()
print(faults())
"""


def test_a_process_is_as_quick_after_memory_was_kept():
    """150 tensors of 8 MB; with the thresholds of glibc's start each is asked for again: 2000 pages, or 4 huge ones."""
    never, after = (
        int(subprocess.run([sys.executable, "-c", CHURN, when], capture_output=True, text=True, check=True).stdout)
        for when in ("never", "after")
    )
    assert after <= never + 150


def test_memory_is_kept_with_the_same_weights():
    states = []
    for callbacks in ([], [ProcessSettings(keep_memory=True)]):
        torch.manual_seed(0)
        weights = Weights()
        fit(LitSpeedNet(widths=WIDTHS), images(), weights, *callbacks, max_epochs=1)
        states.append(weights.after[-1])
    assert_equal(*states)


class Unreadable(SyntheticCIFAR10):
    def train_dataloader(self):
        return int("x")


@pytest.mark.parametrize("kind", [LitSpeedNet, LitSpeedNet96])
def test_faults_of_the_data_are_not_the_schedulers(kind):
    """Both ask for the number of steps where the scheduler is made: "lr_scheduler cannot be made" was said of all."""
    with pytest.raises(UserError, match=r"^batch_size is 500"):
        fit(kind(widths=(8, 8, 8)), images(batch_size=500))
    with pytest.raises(ValueError, match=r"^invalid literal"):
        fit(kind(widths=(8, 8, 8)), Unreadable(96, 20))


@pytest.mark.parametrize("kind", [LitSpeedNet, LitSpeedNet96])
def test_no_step_at_all(kind):
    """The learning rates fall to 0 over none: a division by zero."""
    assert fit(kind(widths=(8, 8, 8)), images(), max_steps=0).global_step == 0
