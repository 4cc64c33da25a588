"""ResumableDataLoader: a resumed run sees the samples and the draws that were due, whoever fetches them."""

import itertools
import pickle
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import assert_equal, epoch_indices, on_ranks, quiet_trainer, ranks
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lit_basics import EpochOrder, LitClassifier, RandomState, ResumableDataLoader, UserError
from lit_basics.callbacks.random_state import generator_states

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:predict returned None"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),  # said of every sampler but torch's sequential one
]

SIZE, BATCH = 22, 4
BATCHES, EPOCHS = 6, 2  # the last batch of an epoch has two samples


class Noisy(Dataset):
    """Samples (index, inputs, class); each inputs holds a draw of every generator."""

    def __init__(self, size=SIZE):
        self.inputs = torch.randn(size, 5, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        draws = [random.gauss(0, 1), np.random.normal(), torch.randn(()).item()]
        return index, torch.cat([self.inputs[index], torch.tensor(draws)]), index % 3


def collate_at_random(samples):
    """Mix each sample with the one after it, as mixup in a ``collate_fn`` does."""
    index, inputs, target = torch.utils.data.default_collate(samples)
    share = torch.rand(()) * random.random() * np.random.random()
    return index, torch.lerp(inputs, inputs.roll(1, 0), share), target


class ForTraining(Dataset):
    """Noisy without the indices."""

    def __init__(self):
        self.noisy = Noisy()

    def __len__(self):
        return len(self.noisy)

    def __getitem__(self, index):
        return self.noisy[index][1:]


def listed(batches):
    return [[part.tolist() for part in batch] for batch in batches]


def batches_of(epochs=1, size=SIZE, **settings):
    loader = ResumableDataLoader(Noisy(size), BATCH, **{"shuffle": True, "seed": 3, **settings})
    return [listed(loader) for _ in range(epochs)]


# ---- order and draws


def test_what_is_set_on_the_loaders_dataset_is_set_on_the_dataset():
    """Set on the wrapper the dataset would not see it, as the file that a worker_init_fn opens."""
    dataset = Noisy()
    loader = ResumableDataLoader(dataset, batch_size=4)
    loader.dataset.transform = "another"
    assert dataset.transform == loader.dataset.transform == "another"
    copy = pickle.loads(pickle.dumps(loader.dataset))
    assert copy.transform == copy.dataset.transform == "another"


def seed_the_dataset(worker):
    torch.utils.data.get_worker_info().dataset.seed = worker


def test_a_seed_of_the_datasets_own_is_not_the_loaders():
    """As an attribute of the wrapper it would be set there, and the draws depend on the worker."""
    two = batches_of(num_workers=2)
    assert batches_of(num_workers=2, worker_init_fn=seed_the_dataset) == two
    dataset = Noisy()
    for name in ("seed", "batch_size", "collate_fn"):
        setattr(ResumableDataLoader(dataset, batch_size=4).dataset, name, "own")
        assert getattr(dataset, name) == "own"


def test_the_order_is_that_of_an_epoch_order():
    order = EpochOrder(SIZE, BATCH, shuffle=True, seed=3)
    for number, epoch in enumerate(batches_of(epochs=3)):
        assert [batch[0] for batch in epoch] == [index.tolist() for _, index in order]
        assert [index for batch in epoch for index in batch[0]] == epoch_indices(3, number, SIZE).tolist()


def test_it_is_a_dataloader_and_shows_the_dataset():
    dataset = Noisy()
    loader = ResumableDataLoader(dataset, BATCH)
    assert isinstance(loader, DataLoader)
    assert len(loader) == len(list(loader)) == BATCHES
    assert loader.dataset.dataset is dataset
    assert len(loader.dataset) == SIZE
    assert loader.dataset.inputs is dataset.inputs
    assert len(ResumableDataLoader(dataset, BATCH, shuffle=True, drop_last=True)) == BATCHES - 1


@pytest.mark.parametrize("collate_fn", [None, collate_at_random], ids=["collate", "mixup"])
def test_draws_are_the_same_for_all_numbers_of_workers(collate_fn):
    # without the seeding of each sample, 2 workers draw otherwise, in collate_fn too
    one = batches_of(epochs=2, collate_fn=collate_fn)
    assert one[0][0][1] != one[1][0][1]
    assert batches_of(epochs=2, collate_fn=collate_fn, num_workers=2) == one
    # the epoch comes with the batch: a dataset that keeps it would stay in epoch 0 in workers that stay
    assert batches_of(epochs=2, collate_fn=collate_fn, num_workers=2, persistent_workers=True) == one


def test_a_sample_draws_by_seed_and_epoch_and_index():
    def draws(**settings):
        return [
            {index: tuple(inputs[5:]) for batch in epoch for index, inputs in zip(*batch[:2], strict=True)}
            for epoch in batches_of(epochs=2, **settings)
        ]

    first, second = draws()
    assert draws(shuffle=False) == [first, second]  # whatever the order
    assert len(set(first.values()) | set(second.values())) == 2 * SIZE
    assert not set(first.values()) & set(draws(seed=4)[0].values())
    columns = list(zip(*first.values(), strict=True))
    assert abs(np.corrcoef(columns) - np.eye(3)).max() < 0.7  # the three generators are not one


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_generators_of_the_process_are_untouched(num_workers):
    random.gauss(0, 1), np.random.normal(), torch.randn(1)  # each holds back a second value
    before = generator_states()
    batches_of(num_workers=num_workers)
    after = generator_states()
    assert_states_equal(before, after)


def assert_states_equal(states, others):
    assert states["python"] == others["python"]
    for mine, theirs in zip(states["numpy"], others["numpy"], strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert torch.equal(states["torch"], others["torch"])


def test_the_generators_are_put_back_when_a_sample_fails():
    class Broken(Noisy):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise OSError(f"sample {index} is damaged")

    before = generator_states()
    with pytest.raises(OSError, match="sample 0 is damaged"):
        next(iter(ResumableDataLoader(Broken(), BATCH)))
    assert_states_equal(before, generator_states())


def test_a_subset_of_a_subset_draws_like_any_other():
    # a nested Subset fetches a whole batch by __getitems__, within which no sample could be seeded
    class Batched(Noisy):
        def __getitems__(self, indices):
            raise AssertionError("not sample by sample")

    subset = Subset(Subset(Batched(), range(20)), range(10, 20))
    loaders = [ResumableDataLoader(subset, size, seed=3) for size in (2, 5)]
    rows = [[row for batch in loader for row in batch[1].tolist()] for loader in loaders]
    assert rows[0] == rows[1]


# ---- position


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_resumes_after_any_batch(settings):
    # prefetched batches would be lost if the position were that of the sampler: 4 of them with 2 workers
    whole = batches_of(epochs=3)
    loader = ResumableDataLoader(Noisy(), BATCH, shuffle=True, seed=3, **settings)
    states = [(0, 0, loader.state_dict())]
    for epoch in range(2):
        for batch, _ in enumerate(loader, 1):
            states.append((epoch, batch, loader.state_dict()))
    assert [(epoch, state["position"]) for epoch, _, state in states] == [(e, b) for e, b, _ in states]
    resumed = ResumableDataLoader(Noisy(), BATCH, shuffle=True, seed=3, **settings)
    for epoch, batch, state in states if not settings else states[3::3]:
        resumed.load_state_dict(state)
        assert listed(resumed) == whole[epoch][batch:]
        assert listed(resumed) == whole[epoch + 1]


def test_saved_on_the_last_batch_the_next_epoch_is_not_skipped():
    whole = batches_of(epochs=3)
    loader = ResumableDataLoader(Noisy(), BATCH, shuffle=True, seed=3)
    for _ in itertools.islice(loader, BATCHES):
        pass
    for through_lightning in (False, True):
        resumed = ResumableDataLoader(Noisy(), BATCH, shuffle=True, seed=3)
        resumed.load_state_dict(loader.state_dict())
        if through_lightning:
            resumed.sampler.set_epoch(1)
        else:
            assert listed(resumed) == []
        assert listed(resumed) == whole[1]


def test_evaluation_resumes_too():
    whole = batches_of(shuffle=False)[0]
    loader = ResumableDataLoader(Noisy(), BATCH, seed=3)
    begun = iter(loader)
    seen = listed(itertools.islice(begun, 2))
    resumed = ResumableDataLoader(Noisy(), BATCH, seed=3)
    resumed.load_state_dict(loader.state_dict())
    assert seen + listed(resumed) == whole


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": 20}, "the checkpoint's data had size 22, here it is 20: cannot resume"),
        ({"batch_size": 2}, "batch_size 4, here it is 2"),
        ({"seed": 4}, "seed 3, here it is 4"),
    ],
)
def test_another_order_is_not_resumed(other, message):
    began = ResumableDataLoader(Noisy(), BATCH, seed=3)
    next(iter(began))
    state = began.state_dict()
    settings = {"size": SIZE, "batch_size": BATCH, "seed": 3, **other}
    loader = ResumableDataLoader(Noisy(settings.pop("size")), **settings)
    with pytest.raises(UserError, match=message):
        loader.load_state_dict(state)
    with pytest.raises(UserError, match="the checkpoint's data had size None"):
        loader.load_state_dict({"_num_yielded": 3})  # another loader's


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Endless(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (Stream(), {}, "Stream has no indices, so it cannot be resumed: give it __getitem__ and __len__"),
        (iter([1]), {}, "list_iterator has no indices"),
        (Endless(), {}, "Endless has no length, so its samples have no order: give it __len__"),
        (Noisy(), {"sampler": torch.utils.data.RandomSampler(Noisy())}, "takes no sampler: shuffle and seed"),
        (Noisy(), {"sampler": range(3)}, "to leave out samples, give a torch.utils.data.Subset"),
        (Noisy(), {"batch_sampler": [[0]]}, "takes no batch_sampler: batch_size, shuffle and seed"),
        (Noisy(), {"generator": torch.Generator()}, "takes no generator: every random draw comes from seed"),
        (Noisy(), {"batch_size": None}, "batch_size is None; ResumableDataLoader makes batches"),
        (Noisy(), {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (Noisy(), {"seed": -1}, "seed is -1; it must be 0 or more"),
        (Noisy(), {"seed": 2**64}, "seed is 18446744073709551616; it must be less than 2"),
        (Noisy(), {"in_order": False}, "in_order is False; a loader that resumes must give its batches in order"),
        (Noisy(3), {"batch_size": 4, "shuffle": True, "drop_last": True}, "3 samples do not fill one batch"),
        (Noisy(0), {"shuffle": True}, "0 samples cannot be shared by 1 processes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused(dataset, settings, message):
    with pytest.raises(UserError, match=message):
        ResumableDataLoader(dataset, **settings)


def test_arguments_of_a_dataloader_pass_through():
    loader = ResumableDataLoader(TensorDataset(torch.arange(4)), 2, num_workers=1, prefetch_factor=3, timeout=30)
    assert (loader.num_workers, loader.prefetch_factor, loader.timeout) == (1, 3, 30)
    loader = ResumableDataLoader(TensorDataset(torch.arange(4)), 2, collate_fn=len)
    assert list(loader) == [2, 2]
    with pytest.raises(TypeError, match="shufle"):
        ResumableDataLoader(Noisy(), shufle=True)


# ---- in Lightning


class Plain(pl.LightningModule):
    """A module of a user's own, without anything of lit_basics."""

    def __init__(self, net, manual=False, accumulate=1):
        super().__init__()
        self.net, self.accumulate = net, accumulate
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss / self.accumulate)
            if (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SaveEverySteps(Checkpoint):
    """Saves after every optimizer step, the last of an epoch too if there is no validation, and every epoch.

    Where a validation follows a save at once, Lightning leaves it out on resuming: no save there. In the middle of an
    accumulation only lit_basics' modules keep the gradients: ``every_batch``.
    """

    def __init__(self, folder, every_batch):
        self.folder, self.every_batch, self.steps = folder, every_batch, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        stepped, self.steps = trainer.global_step > self.steps, trainer.global_step
        validates = trainer.val_dataloaders is not None
        if validates and (trainer.is_last_batch or not (batch_idx + 1) % trainer.val_check_batch):
            return
        if stepped or self.every_batch:
            trainer.save_checkpoint(self.folder / f"batch{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch}.ckpt")


FACTORS = {
    "module": ["plain", "LitClassifier"],
    "shuffle": [True, False],
    "dropout": [True, False],
    "batch_norm": [True, False],
    "workers": [0, 2],
    "accumulate": [1, 3],
    "manual": [False, True],
    "validate": [True, False],
}


def train(case, checkpoint=None, save_to=None, loader=None, callbacks=None, persistent=False):
    torch.manual_seed(0 if checkpoint is None else 99)
    random.seed(1 if checkpoint is None else 98)
    np.random.seed(2 if checkpoint is None else 97)
    layers = [nn.Linear(8, 6), nn.BatchNorm1d(6) if case["batch_norm"] else nn.Tanh()]
    net = nn.Sequential(*layers, nn.Dropout(0.5 if case["dropout"] else 0.0), nn.Linear(6, 3))
    ours, manual = case["module"] == "LitClassifier", case["manual"]
    if ours:
        sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
        model = LitClassifier(net, optimizer=sgd, automatic_optimization=not manual)
    else:
        model = Plain(net, manual, case["accumulate"])
    trainer = quiet_trainer(
        *([RandomState()] if callbacks is None else callbacks),
        *([SaveEverySteps(save_to, every_batch=ours)] if save_to else []),
        max_epochs=EPOCHS,
        accumulate_grad_batches=case["accumulate"] if ours or not manual else 1,
        val_check_interval=2 if case["validate"] else None,
        limit_val_batches=1.0 if case["validate"] else 0,
        num_sanity_val_steps=1,
        enable_checkpointing=save_to is not None,
    )
    settings = {"num_workers": case["workers"], "persistent_workers": persistent}
    if loader is None:
        train_loader = ResumableDataLoader(ForTraining(), BATCH, shuffle=case["shuffle"], seed=5, **settings)
    else:
        train_loader = loader()
    val_loader = ResumableDataLoader(ForTraining(), 11, seed=6, **settings) if case["validate"] else None
    trainer.fit(model, train_loader, val_loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    states = generator_states()
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "momentum": {str(k): v["momentum_buffer"] for k, v in trainer.optimizers[0].state_dict()["state"].items()},
        "random": {"torch": states["torch"], "numpy": states["numpy"][1]},
        "rest": (
            trainer.global_step,
            trainer.current_epoch,
            states["python"],
            states["numpy"][2:],
            {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val")},
        ),
    }


def resume_everywhere(case, folder, **more):
    """Return the names of the checkpoints from which a run ends otherwise than the whole run, and those tried."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = train(case, save_to=folder, **more)
    failed, tried = [], []
    for checkpoint in sorted(folder.glob("*.ckpt")):
        if checkpoint.stem == f"epoch{EPOCHS - 1}":
            continue
        tried.append(checkpoint.stem)
        resumed = train(case, checkpoint=checkpoint, **more)
        try:
            for part in ("weights", "momentum", "random"):
                assert_equal(resumed[part], whole[part])
            assert resumed["rest"] == whole["rest"]
        except AssertionError:
            failed.append(checkpoint.stem)
    return failed, tried


def case_of(**chosen):
    return {name: chosen.get(name, values[0]) for name, values in FACTORS.items()}


QUICK = {
    "plain": case_of(),
    "plain, manual, accumulating": case_of(accumulate=3, manual=True, validate=False),
    "LitClassifier, manual, accumulating": case_of(module="LitClassifier", accumulate=3, manual=True),
    "LitClassifier, unshuffled": case_of(module="LitClassifier", shuffle=False, validate=False, batch_norm=False),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_run_resumes_exactly_from_every_step(name, tmp_path):
    failed, tried = resume_everywhere(QUICK[name], tmp_path)
    assert not failed
    assert len(tried) >= 5


def test_a_run_with_workers_resumes_exactly(tmp_path):
    # a main process whose generators the start of workers draws from (no generator= of the loader's own) fails here
    case = case_of(workers=2, validate=False)
    whole = train(case, save_to=tmp_path, persistent=True)
    for checkpoint in (tmp_path / "batch3.ckpt", tmp_path / "batch8.ckpt"):
        resumed = train(case, checkpoint=checkpoint, persistent=True)
        for part in ("weights", "momentum", "random"):
            assert_equal(resumed[part], whole[part])
        assert resumed["rest"] == whole["rest"]
    for same in (train(case_of(validate=False)), train(case)):
        assert_equal(same["weights"], whole["weights"])


def test_without_the_loader_or_the_random_state_it_would_not(tmp_path):
    case = case_of(validate=False)
    with pytest.warns(Warning, match="your dataloader is not resumable"):
        failed, _ = resume_everywhere(
            case, tmp_path / "loader", loader=lambda: DataLoader(ForTraining(), BATCH, shuffle=True)
        )
    within_epochs = {f"batch{number}" for number in range(1, EPOCHS * BATCHES) if number % BATCHES}
    assert within_epochs <= set(failed)
    failed, tried = resume_everywhere(case, tmp_path / "state", callbacks=[])
    assert failed == tried


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0 workers", "2 workers", "2 persistent workers"])
@pytest.mark.parametrize("module", FACTORS["module"])
def test_the_whole_matrix_resumes_exactly_from_every_step(module, workers, tmp_path):
    names = [name for name in FACTORS if name not in ("module", "workers")]
    cases = [
        {"module": module, "workers": int(workers[0]), **dict(zip(names, values, strict=True))}
        for values in itertools.product(*(FACTORS[name] for name in names))
    ]
    persistent = "persistent" in workers
    if persistent:
        cases = cases[::5]
    resumes = 0
    for number, case in enumerate(cases):
        failed, tried = resume_everywhere(case, tmp_path / str(number), persistent=persistent)
        assert not failed, case
        resumes += len(tried)
    print(f"{module}, {workers}: {len(cases)} cases, {resumes} resumes")


STAGES = ("train", "drawn", "val", "test", "predict")


class Counts(pl.LightningModule):
    """Keeps the indices that each stage sees; of training and validation the inputs with their draws too."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), {stage: [] for stage in STAGES}

    def training_step(self, batch, batch_idx):
        self.seen["train"] += batch[0].tolist()
        self.seen["drawn"] += batch[1].tolist()
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen["val"] += [tuple(row) for row in batch[1].tolist()]

    def test_step(self, batch, batch_idx):
        self.seen["test"] += batch[0].tolist()

    def predict_step(self, batch, batch_idx):
        self.seen["predict"] += batch[0].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loaders(pl.LightningDataModule):
    """Makes its loaders in the hooks, where Lightning watches it do so."""

    def __init__(self, size=SIZE, val_batch=BATCH, **settings):
        super().__init__()
        self.size, self.val_batch, self.settings = size, val_batch, settings

    def train_dataloader(self):
        return ResumableDataLoader(Noisy(self.size), BATCH, shuffle=True, seed=5, **self.settings)

    def val_dataloader(self):
        return ResumableDataLoader(Noisy(self.size), self.val_batch, seed=5, **self.settings)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "instances"])
def test_every_stage_of_lightning_sees_each_sample_once(hooks):
    data, model, trainer = Loaders(), Counts(), quiet_trainer(max_epochs=2)
    evaluation = [data] if hooks else [data.val_dataloader()]
    trainer.fit(model, *([data] if hooks else [data.train_dataloader(), data.val_dataloader()]))
    trainer.validate(model, *evaluation, verbose=False)
    trainer.test(model, *evaluation, verbose=False)
    trainer.predict(model, *evaluation, return_predictions=False)
    expected = epoch_indices(5, 0, SIZE).tolist() + epoch_indices(5, 1, SIZE).tolist()
    assert model.seen["train"] == expected
    assert len(model.seen["val"]) == len(set(model.seen["val"][:-SIZE])) + SIZE == 3 * SIZE
    assert model.seen["test"] == model.seen["predict"] == list(range(SIZE))


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "instances"])
def test_lightning_overfits_and_predicts_with_a_loader_made_anew(hooks):
    # it is made by the arguments of a DataLoader: batch_size=None, sampler=…; refusing them ends in a traceback
    data, model = Loaders(), Counts()
    fitting = quiet_trainer(overfit_batches=2, max_epochs=2, limit_val_batches=0)
    fitting.fit(model, data if hooks else data.train_dataloader())
    assert model.seen["train"] == 2 * list(range(2 * BATCH))
    quiet_trainer().predict(model, data.train_dataloader(), return_predictions=False)
    assert model.seen["predict"] == list(range(SIZE))


# ---- two processes


def seen_by(count):
    """Return the indices and draws that this rank sees, for two sizes of the data."""
    results = []
    for size, workers, late in ((23, 2, True), (22, 0, False)):
        data = Loaders(size, val_batch=6, num_workers=workers)
        model, trainer = Counts(), on_ranks(count, max_epochs=2)
        # late: the loaders are made before the process group, as in trainer.fit(model, loader)
        trainer.fit(model, *([data.train_dataloader(), data.val_dataloader()] if late else [data]))
        trainer.test(model, data.val_dataloader(), verbose=False)
        trainer.predict(model, data.val_dataloader(), return_predictions=False)
        results.append(model.seen)
    return results


def test_two_ranks_see_each_sample_once_and_draw_the_same():
    # without the DistributedSampler's type Lightning lays its own over the batches and ends in a traceback; with the
    # rank taken when the loader is made, both ranks of the late case see all samples
    for size, alone, first, second in zip((23, 22), seen_by(1), *ranks(lambda: seen_by(2)), strict=True):
        for stage in ("test", "predict"):
            assert sorted(first[stage] + second[stage]) == alone[stage] == list(range(size))
        assert len(first["train"]) == len(second["train"]) == size // 2 * 2
        share = size // 2
        for epoch in range(2):
            here = slice(epoch * share, (epoch + 1) * share)
            assert len(set(first["train"][here] + second["train"][here])) == 2 * share
            order = epoch_indices(5, epoch, size).tolist()
            halves = [order[at : at + 2] for at in range(0, share // 2 * 4, 4)]
            assert [index for half in halves for index in half] == first["train"][here][: 2 * len(halves)]
        drawn = {tuple(row) for row in first["drawn"] + second["drawn"]}
        assert drawn <= {tuple(row) for row in alone["drawn"]}
        assert len(drawn) == 4 * share
        assert sorted(map(tuple, first["val"] + second["val"])) == sorted(alone["val"])
        assert len(alone["val"]) == 2 * size
