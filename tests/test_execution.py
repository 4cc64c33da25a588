"""``steps_per_execution``: what K changes (how often Lightning is asked) and what it does not (all else)."""

import gc
import inspect
import os
import random
import shutil
import signal
import weakref
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from helpers import Rows, SaveEverywhere, assert_equal, copied, fit, metrics, quiet_trainer, write_npz
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_basics import (
    ArrayLoader,
    EpochOrder,
    FilterMuon,
    GradientMonitor,
    LastCheckpoint,
    LitClassifier,
    LitSupervised,
    PairedOptimizer,
    Preemption,
    RandomState,
    ResumableDataLoader,
    SyntheticCIFAR10,
    UserError,
    ValueMonitor,
)
from lit_basics.callbacks.preemption import Preempted
from lit_basics.cli import main
from lit_basics.execution import StepsInBetween

KS = (1, 3, 8)
trainer = partial(quiet_trainer, max_epochs=2)
NO_VALIDATION = "ignore:You defined a `validation_step` but have no `val_dataloader`"


class Small(LitClassifier):
    """A net with dropout and batch-norm; keeps the (epoch's) index of each batch that Lightning handles."""

    def __init__(self, steps_per_execution=1, inputs=3072, automatic=False, **settings):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(inputs, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
        super().__init__(
            net,
            optimizer=settings.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
            automatic_optimization=automatic,  # manual at K = 1 too: its checkpoints are to be the same
            steps_per_execution=steps_per_execution,
            **settings,
        )
        self.handled = []


def counted(module):
    """Let a module keep the index of each batch that Lightning hands it."""
    step = module._manual_step

    def manual_step(batch, batch_idx):
        module.handled.append(batch_idx)
        return step(batch, batch_idx)

    module._manual_step = manual_step
    return module


class Halved(SyntheticCIFAR10):
    """Data with transfer hooks of its own."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 3, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 2, batch[1]


def data():
    return Halved(96, 10, batch_size=8, val_size=16)


@pytest.mark.parametrize(
    ("settings", "handled"),
    [
        ({}, [2, 5, 8, 9]),
        ({"accumulate_grad_batches": 2}, [5, 9]),
        ({"val_check_interval": 5}, [2, 4, 5, 8, 9]),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [2, 5, 6, 8, 9]),
        ({"limit_train_batches": 7}, [2, 5, 6]),
        ({"max_steps": 5}, [2, 4]),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, [4, 5]),
    ],
)
def test_a_group_ends_at_every_third_step_and_where_lightning_has_something_to_do(settings, handled):
    module = counted(Small(3))
    fitted = trainer(**{**settings, "max_epochs": 1})
    fitted.fit(module, data())
    assert module.handled == handled
    batches = min(10, settings.get("limit_train_batches", 10))
    steps = -(-batches // settings.get("accumulate_grad_batches", 1))
    assert fitted.global_step == min(steps, settings.get("max_steps", steps))


class Everything(pl.Callback):
    """Keeps what each hook of a batch sees; somebody's callback, which knows nothing of K."""

    def __init__(self):
        self.seen = []

    def note(self, name, trainer, *more):
        loop = trainer.fit_loop
        state = trainer.global_step, loop.batch_idx, loop.total_batch_idx, trainer.current_epoch, trainer.is_last_batch
        self.seen.append((name, *state, torch.get_rng_state().sum().item(), *more))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((batch_idx, batch[0].sum().item(), pl_module.net[2].weight.sum().item()))
        loop = trainer.fit_loop
        self.seen.append((trainer.global_step, loop.batch_idx, loop.total_batch_idx, trainer.current_epoch))
        self.seen.append(trainer.is_last_batch)

    def on_before_backward(self, trainer, pl_module, loss):
        self.note("before backward", trainer, loss.item())

    def on_after_backward(self, trainer, pl_module):
        self.note("after backward", trainer, pl_module.net[2].weight.grad.sum().item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert isinstance(optimizer, torch.optim.SGD)
        self.note("before step", trainer, pl_module.net[2].weight.grad.sum().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note("end", trainer, outputs["loss"].item(), batch[0].sum().item(), batch_idx)

    def on_validation_start(self, trainer, pl_module):
        self.note("validation", trainer)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3, "val_check_interval": 4}])
def test_a_foreign_callback_sees_every_step_as_at_one(settings):
    # without the counters of a batch in between, the first difference is at the second batch
    seen = {}
    for k in KS:
        callback = Everything()
        trainer(callback, **settings).fit(Small(k), data())
        seen[k] = callback.seen
    assert len(seen[1]) > 80
    assert seen[3] == seen[1]
    assert seen[8] == seen[1]


class Another(SingleDeviceStrategy):
    """Any strategy but Lightning's for one device has a part in each step."""


class Stepped(Small):
    def lr_scheduler_step(self, scheduler, metric):
        self.handled.append(self.trainer.global_step)
        super().lr_scheduler_step(scheduler, metric)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, Another])
def test_a_scheduler_sees_the_number_of_its_step(strategy):
    for k in KS:
        module = Stepped(k, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2), lr_interval="step")
        trainer(strategy=strategy(torch.device("cpu"))).fit(module, data())
        assert module.handled == list(range(1, 21))


def leaves(value, place=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{place}/{index}")
    else:
        yield place, value


def test_the_checkpoint_after_every_batch_is_the_same(tmp_path):
    for k in KS:
        (tmp_path / str(k)).mkdir()
        fitted = trainer(RandomState(), SaveEverywhere(tmp_path / str(k)), enable_checkpointing=True)
        fitted.fit(Small(k, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2), lr_interval="step"), data())
    for number in range(1, 21):
        one, *others = (
            dict(leaves(torch.load(tmp_path / str(k) / f"{number:03}.ckpt", weights_only=True))) for k in KS
        )
        for other in others:
            assert other.keys() == one.keys()
            for place, value in one.items():
                if "steps_per_execution" in place:
                    continue
                same = torch.equal(value, other[place]) if isinstance(value, torch.Tensor) else value == other[place]
                assert same, (number, place, value, other[place])


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}])
def test_a_run_is_resumed_with_another_k_and_in_the_other_mode(settings, tmp_path):
    # without carry_steps the steps are counted from 0 in the other mode: max_steps comes too late
    settings = {"max_steps": 6 if settings else 18, **settings}
    for k, automatic in ((3, False), (1, True)):
        whole, folder = Small(k, automatic=automatic), tmp_path / str(k)
        folder.mkdir()
        trainer(RandomState(), SaveEverywhere(folder), enable_checkpointing=True, **settings).fit(whole, data())
        for number, (other, mode) in ((1, (8, False)), (5, (1, True)), (4, (2, False)), (13, (1, False))):
            module = Small(other, automatic=mode)
            torch.manual_seed(number)
            resumed = trainer(RandomState(), **settings)
            resumed.fit(module, data(), ckpt_path=folder / f"{number:03}.ckpt", weights_only=True)
            assert resumed.global_step == settings["max_steps"]
            assert_equal(module.state_dict(), whole.state_dict())


class Noisy(Dataset):
    """Draws from the process's random state, as torchvision's transforms do."""

    def __len__(self):
        return 38

    def __getitem__(self, index):
        return torch.rand(3, 4, 4) + random.random(), index % 10


class Drawing(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        torch.rand(1)  # comes after the seed of a DataLoader's workers


@pytest.mark.filterwarnings(NO_VALIDATION)
@pytest.mark.parametrize("kind", [DataLoader, ResumableDataLoader])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_loader_with_a_length(kind, workers, monkeypatch):
    monkeypatch.setenv("PL_SEED_WORKERS", "1")  # as seed_everything(workers=True) does
    # drawn in advance, the batches' random numbers would come before the dropout's of the steps between
    results = []
    for k in KS:
        module = Small(k, inputs=48)
        torch.manual_seed(1)
        random.seed(1)
        loader = kind(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
        fitted = trainer(Drawing())
        fitted.fit(module, loader)
        results.append({**copied(module), "draws": torch.get_rng_state()})
        assert (type(fitted.train_dataloader) is StepsInBetween) == (k > 1)
        assert len(fitted.train_dataloader) == fitted.num_training_batches == 10
        assert fitted.train_dataloader.dataset is loader.dataset
        assert loader.worker_init_fn is not None
        # how isinstance of a protocol looks from Python 3.12 on: not by __getattr__
        stateful = inspect.getattr_static(fitted.train_dataloader, "state_dict", None) is not None
        assert stateful == (kind is ResumableDataLoader)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


class Watched(list):
    """Batches whose iterators are watched."""

    def __init__(self, batches):
        super().__init__(batches)
        self.iterators = []

    def __iter__(self):
        iterator = (batch for batch in list(super().__iter__()))
        self.iterators.append(weakref.ref(iterator))
        return iterator


@pytest.mark.filterwarnings(NO_VALIDATION)
@pytest.mark.parametrize("k", KS)
def test_an_epochs_iterator_does_not_outlive_it(k):
    """The workers of a DataLoader end with it; only the garbage collector, which rarely runs, would find a cycle."""
    loader, alive = Watched([(torch.rand(4, 48), torch.arange(4))] * 10), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            alive.append(sum(iterator() is not None for iterator in loader.iterators))

    gc.disable()
    try:
        trainer(Look(), max_epochs=4).fit(Small(k, inputs=48), loader)
    finally:
        gc.enable()
    assert len(loader.iterators) >= 4
    assert alive == [1] * 40


def test_by_command_every_row_is_the_same(tmp_path):
    path = write_npz(tmp_path / "images.npz", train=150)
    words = [
        *("--config", "lenet5", "--data", "NpzDataModule", "--data.path", path, "--data.batch_size", "12"),
        *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--trainer.gradient_clip_val", "0.1"),
        *("--data.val_size", "0.2", "--trainer.val_check_interval", "4"),
    ]
    runs = [
        *(fit(*words, "--model.steps_per_execution", str(k), run_dir=f"k{k}") for k in KS),
        fit(*words, "--config", "manual", run_dir="manual"),
    ]
    table = metrics(runs[0])
    assert {"train/loss", "lr", "grad/norm"} <= set(table[5])
    for run in runs[1:]:
        assert (run / "metrics.csv").read_bytes() == (runs[0] / "metrics.csv").read_bytes()
        assert_equal(torch.load(run / "best.pth", weights_only=True), torch.load("k1/best.pth", weights_only=True))


@pytest.mark.filterwarnings(NO_VALIDATION)
def test_each_number_by_value_too():
    tables = []
    for k in KS:
        rows = Rows()
        module = LitSupervised(nn.Linear(2, 1), nn.MSELoss(), steps_per_execution=k)
        torch.manual_seed(0)
        nn.init.ones_(module.net.weight)
        nn.init.ones_(module.net.bias)
        batches = DataLoader([(torch.full((2,), i / 7), torch.ones(1)) for i in range(30)], batch_size=3)
        trainer(ValueMonitor(), GradientMonitor(), logger=rows, log_every_n_steps=1).fit(module, batches)
        tables.append(rows.table())
    assert "param/weight[0,1]" in tables[0][2]
    assert tables[1] == tables[0]
    assert tables[2] == tables[0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lbfgs_and_pairs(accumulate):
    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, line_search_fn="strong_wolfe")  # it reads the loss

    def pair(parameters):
        return PairedOptimizer(parameters, FilterMuon, lambda p: torch.optim.SGD(p, lr=0.1))

    for optimizer in (lbfgs, pair, torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1)):
        states = []
        for k, automatic in ((1, True), *((k, False) for k in KS)):
            module = Small(k, automatic=automatic, optimizer=optimizer)
            fitted = trainer(accumulate_grad_batches=accumulate)
            fitted.fit(module, data())
            states.append(module.state_dict())
        assert fitted.global_step == 2 * -(-10 // accumulate)
        for state in states[1:]:
            assert_equal(state, states[0])


class Average(WeightAveraging):
    def __init__(self):
        super().__init__(avg_fn=lambda average, new, count: 0.9 * average + 0.1 * new)


def test_lightnings_moving_average_of_the_weights_works():
    states = []
    for k in KS:
        module, callback = Small(k), Average()
        trainer(callback).fit(module, data())
        assert callback._average_model.n_averaged == 20
        states.append(module.state_dict())
    assert_equal(states[1], states[0])
    assert_equal(states[2], states[0])


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_lightnings_modelcheckpoint_saves_at_its_steps(tmp_path):
    for k in KS:
        callback = ModelCheckpoint(tmp_path / str(k), every_n_train_steps=4, save_top_k=-1, filename="{step}")
        trainer(callback, enable_checkpointing=True).fit(Small(k), data())
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 5
    for k in KS[1:]:
        assert sorted(path.name for path in (tmp_path / str(k)).iterdir()) == names
        for name in names:
            one, other = (torch.load(tmp_path / f / name, weights_only=True)["state_dict"] for f in ("1", str(k)))
            assert_equal(other, one)


class Signal(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_obeyed_at_the_next_step(tmp_path):
    whole = Small(8)
    trainer(RandomState()).fit(whole, data())
    last = LastCheckpoint(str(tmp_path))
    stopped = trainer(RandomState(), Signal(4), last, Preemption(last), enable_checkpointing=True)
    with pytest.raises(Preempted) as left:
        stopped.fit(Small(8), data())
    assert left.value.code == 143
    assert stopped.global_step == 5
    module = Small(8)
    trainer(RandomState()).fit(module, data(), ckpt_path=last.path, weights_only=True)
    assert_equal(module.state_dict(), whole.state_dict())


class StopAt(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or batch_idx == 3


def test_a_stop_that_is_asked_for_within_a_group_comes_with_the_next_batch():
    module = counted(Small(8))
    fitted = trainer(StopAt())
    fitted.fit(module, data())
    assert fitted.global_step == 5
    assert module.handled == [4]


def test_the_number_of_steps_is_known_to_schedulers():
    class Cycled(Small):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    for k in KS:
        module = Cycled(k)
        trainer(accumulate_grad_batches=3).fit(module, data())
        assert module.steps == 8


class Asks(pl.Callback):
    """A callback of the user's, which plans ahead."""

    def setup(self, trainer, pl_module, stage):
        self.found = trainer.estimated_stepping_batches, trainer.accumulate_grad_batches, trainer.gradient_clip_val


def test_the_settings_are_known_to_callbacks_from_the_start():
    for k in KS:
        asks = Asks()
        fitted = trainer(asks, accumulate_grad_batches=4, gradient_clip_val=0.5)
        module = counted(Small(k))
        fitted.fit(module, data())
        assert asks.found == (6, 4, 0.5)
        assert fitted.global_step == 6
        assert len(module.handled) == {1: 20, 3: 2, 8: 2}[k]
        assert [type(callback).__name__ for callback in fitted.callbacks] == ["Asks", "TrainingHooks"]


def test_the_trainer_is_left_as_it_was():
    fitted = trainer()
    fitted.fit(Small(3), data())
    assert "process_dataloader" not in vars(fitted.strategy)
    fitted.fit_loop.max_epochs = 4
    plain = Small(1)
    fitted.fit(plain, data())
    assert not isinstance(fitted.train_dataloader, StepsInBetween)


def test_a_validation_after_a_fit_that_failed_early_makes_no_steps():
    """A DataModule's setup comes before those of callbacks: one that waits for it is left over."""

    class Fails(SyntheticCIFAR10):
        def setup(self, stage):
            if stage == "fit":
                raise ValueError("no images")
            super().setup(stage)

    class Looks(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.found = "process_dataloader" in vars(trainer.strategy)

    looks = Looks()
    fitted, module = trainer(looks), Small(3)
    with pytest.raises(ValueError, match="no images"):
        fitted.fit(module, Fails(20, 20, val_size=10))
    fitted.validate(module, Fails(20, 20, val_size=10))
    assert not looks.found


# refused


def refused(module, message, *callbacks, loader=None, **settings):
    fitted = trainer(*callbacks, **settings)
    with pytest.raises(UserError, match=message) as error:
        fitted.fit(module, loader if loader is not None else data())
    assert "\n" not in str(error.value)
    assert "process_dataloader" not in vars(fitted.strategy)


class Endless(IterableDataset):
    def __iter__(self):
        yield from Noisy()


@pytest.mark.filterwarnings(NO_VALIDATION)
def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="steps_per_execution is 0; it must be at least 1"):
        LitClassifier(nn.Linear(1, 10), steps_per_execution=0)
    scaler = torch.amp.GradScaler("cpu")
    refused(Small(3), "16-mixed scales each step", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    refused(Small(3), "StochasticWeightAveraging needs automatic", StochasticWeightAveraging(0.1))
    refused(Small(3), "DataLoader has no length", loader=DataLoader(Endless(), batch_size=4))
    loader = DataLoader(Noisy(), batch_size=4)
    refused(Small(3), "it takes one training loader", loader={"a": loader, "b": loader})
    refused(Small(3), "it takes one training loader", loader={"a": loader})


def test_logging_past_the_recorder_is_refused():
    class Logging(Small):
        def compute_loss(self, batch, batch_idx):
            loss = super().compute_loss(batch, batch_idx)
            self.log("train/mine", loss)
            return loss

    trainer().fit(Logging(1), data())
    refused(Logging(3), r"self.log has no place: record\(name, scalar\) logs each step")


def test_an_epoch_is_not_left_by_minus_one():
    class Leaving(Small):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    refused(Leaving(3), "cannot be left by returning -1")


def test_a_hook_that_is_never_called_is_named():
    class Zero(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            pass

    with pytest.warns(UserWarning, match="steps_per_execution is 3: on_before_zero_grad of Zero is not called"):
        trainer(Zero()).fit(Small(3), data())


def test_by_command_a_run_goes_on_with_another_k(tmp_path, capsys):
    words = ("--config", "quickstart", "--data.train_images", "500", "--model.steps_per_execution", "3")
    whole = fit(*words, "--trainer.max_epochs", "3", run_dir="whole")
    run = fit(*words, "--trainer.max_epochs", "1", run_dir="run")
    for epochs, k in (("2", "1"), ("3", "8")):
        words = ["--trainer.max_epochs", epochs, "--model.steps_per_execution", k]
        assert main(["fit", "--resume", str(run), *words]) == 0
        assert f"resuming with model.steps_per_execution {k} (was " in capsys.readouterr().out
    states = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (run, whole)]
    assert_equal(*states)
    assert metrics(run) == metrics(whole)


class OnlyCompiled(nn.Module):
    """A net that learns nothing where it is not compiled."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 10)

    def forward(self, x):
        return self.linear(x) * (1.0 if torch.compiler.is_compiling() else 0.0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("compile_net", [False, True, "reduce-overhead"])
def test_a_compiled_net_learns_what_the_net_does(compile_net, monkeypatch):
    compiled, modes = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *args, mode: modes.append(mode) or compiled(*args, mode=mode))
    torch.manual_seed(0)
    net, plain = OnlyCompiled(), nn.Linear(4, 10)
    plain.load_state_dict(net.linear.state_dict())
    before = copied(net)
    x, y = torch.randn(24, 4), torch.randint(10, (24,))
    module = LitClassifier(net, compile_net=compile_net)
    loader = ArrayLoader(x, y, EpochOrder(24, 8, shuffle=False))
    quiet_trainer().fit(module, loader, loader)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for part in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x[part * 8 : part * 8 + 8]), y[part * 8 : part * 8 + 8]).backward()
        optimizer.step()
    assert modes == {False: [], True: [None]}.get(compile_net, [compile_net])
    if not compile_net:
        assert_equal(copied(net), before)
        return
    assert list(net.state_dict()) == ["linear.weight", "linear.bias"]
    for name, value in plain.state_dict().items():
        # fused kernels round differently: some float32 steps of numbers near 1
        torch.testing.assert_close(net.linear.state_dict()[name], value, rtol=1e-5, atol=1e-6)


class MadeLate(LitClassifier):
    def __init__(self):
        super().__init__(nn.Identity(), compile_net=True)

    def configure_model(self):
        self.net = OnlyCompiled()
        self.before = copied(self.net)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_net_that_is_made_in_configure_model_is_compiled():
    module = MadeLate()
    loader = ArrayLoader(torch.randn(8, 4), torch.randint(10, (8,)), EpochOrder(8, 8, shuffle=False))
    quiet_trainer().fit(module, loader, loader)
    assert not torch.equal(module.net.linear.weight, module.before["linear.weight"])


def test_an_unknown_mode_of_compiling_is_refused():
    with pytest.raises(UserError, match="compile_net is 'fast'; it must be True, False or a mode: default, reduce"):
        LitClassifier(nn.Linear(4, 10), compile_net="fast")
