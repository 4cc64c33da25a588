"""Every sample once an epoch, at any world size, and the same order after a resume."""

import itertools

import pytest
import torch

from lit_basics import EpochOrder, UserError


def epoch(order):
    return [index.tolist() for _, index in order]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [64, 65, 67])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_ranks_share_each_global_batch(size, world_size, drop_last):
    whole = EpochOrder(size, 8, shuffle=True, seed=3, drop_last=drop_last)
    ranks = [
        EpochOrder(size, 8, shuffle=True, seed=3, drop_last=drop_last, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    batches = epoch(whole)
    shares = [epoch(rank) for rank in ranks]
    assert len({len(share) for share in shares}) == 1
    for number, share in enumerate(zip(*shares, strict=True)):
        together = [i for part in share for i in part]
        assert len({len(part) for part in share}) == 1
        assert together == batches[number][: len(together)]
    seen = [i for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == (size // 8 * 8 if drop_last else size)


@pytest.mark.parametrize("size", [64, 65, 67])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_sample_once(size, world_size):
    ranks = [EpochOrder(size, 6, shuffle=False, rank=r, world_size=world_size) for r in range(world_size)]
    seen = sorted(i for rank in ranks for batch in epoch(rank) for i in batch)
    assert seen == list(range(size))
    assert all(len(rank) == len(epoch(rank)) for rank in ranks)


def test_evaluating_ranks_come_to_as_many_batches():
    """DistributedDataParallel sends buffers at each batch: a rank that has one more waits for the others for ever."""
    for size, world_size, local in itertools.product(range(4, 60), (2, 3, 4), (2, 3, 5)):
        ranks = [
            EpochOrder(size, world_size * local, shuffle=False, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        batches = [epoch(rank) for rank in ranks]
        assert len({len(own) for own in batches}) == 1
        assert all(1 <= len(batch) <= local for own in batches for batch in own)
        assert sorted(i for own in batches for batch in own for i in batch) == list(range(size))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 100, "world_size": 3}, "batch_size is 100; it must be divisible by the number of processes, 3"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 4, "seed": -1}, "seed is -1; it must be 0 or more"),
    ],
)
def test_what_cannot_be_an_order_is_refused(settings, message):
    """Without the first a sample of each batch is never trained on."""
    with pytest.raises(UserError, match=message):
        EpochOrder(500, **settings, shuffle=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_to_evaluate_is_no_batches(rank):
    assert list(EpochOrder(0, 4, shuffle=False, rank=rank, world_size=2)) == []


def test_order_is_a_function_of_seed_and_epoch():
    order = EpochOrder(50, 7, shuffle=True, seed=1)
    epochs = []
    for number in range(3):
        order.set_epoch(number)
        epochs.append(epoch(order))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for _ in range(2):
        order.set_epoch(1)
        assert epoch(order) == epochs[1]
    assert epoch(EpochOrder(50, 7, shuffle=True, seed=2)) != epochs[0]


def test_without_set_epoch_each_iteration_begins_the_next_epoch():
    order, other = (EpochOrder(50, 7, shuffle=True) for _ in range(2))
    for number in range(3):
        other.set_epoch(number)
        assert epoch(order) == epoch(other)


@pytest.mark.parametrize("stop", range(17))
def test_resumes_after_any_batch(stop):
    whole = EpochOrder(50, 7, shuffle=True)
    batches = epoch(whole) + epoch(whole)
    order = EpochOrder(50, 7, shuffle=True)
    iterator = iter(order)
    seen = [next(iterator)[1].tolist() for _ in range(min(stop, 8))]
    if stop > 8:
        iterator = iter(order)
        seen += [next(iterator)[1].tolist() for _ in range(stop - 8)]
    resumed = EpochOrder(50, 7, shuffle=True)
    resumed.load_state_dict(order.state_dict())
    seen += epoch(resumed)
    seen += epoch(resumed)
    assert seen[: len(batches)] == batches


def test_an_epoch_that_was_cut_short_is_not_continued():
    order = EpochOrder(50, 7, shuffle=True)
    next(iter(order))
    state = order.state_dict()
    resumed = EpochOrder(50, 7, shuffle=True)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # Lightning went on to the next epoch, by limit_train_batches
    fresh = EpochOrder(50, 7, shuffle=True)
    fresh.set_epoch(1)
    assert epoch(resumed) == epoch(fresh)


def test_indices_are_int64():
    for _, index in EpochOrder(5, 2, shuffle=True):
        assert index.dtype == torch.int64


def test_a_look_within_a_named_epoch_moves_nothing():
    """Where a look is not taken back, the state is the look's, and the next iteration is of the epoch after."""
    order, plain = (EpochOrder(50, 7, shuffle=True) for _ in range(2))
    plain.set_epoch(3)
    whole = [index.tolist() for _, index in plain]
    order.set_epoch(3)
    next(iter(order))
    training = iter(order)
    seen = [next(training)[1].tolist() for _ in range(2)]
    due = order.state_dict()
    assert (due["epoch"], due["position"]) == (3, 2)
    next(iter(order))
    assert len(list(order)) == 8  # a whole pass
    assert order.state_dict() == due
    assert seen + [index.tolist() for _, index in training] == whole


def test_a_look_before_a_resumed_epoch_moves_nothing():
    """Where a look uses the loaded state up, the epoch begins anew."""
    order, plain = (EpochOrder(50, 7, shuffle=True) for _ in range(2))
    plain.set_epoch(2)
    whole = [index.tolist() for _, index in plain]
    order.set_epoch(2)
    training = iter(order)
    for _ in range(3):
        next(training)
    resumed = EpochOrder(50, 7, shuffle=True)
    resumed.load_state_dict(order.state_dict())
    assert len(list(resumed)) == 5  # as in a module's on_train_start
    resumed.load_state_dict(order.state_dict())
    for _ in range(2):
        next(iter(resumed))
    resumed.set_epoch(2)
    next(iter(resumed))  # as in on_train_epoch_start
    training = iter(resumed)
    rest = [next(training)[1].tolist()]
    assert [index.tolist() for _, index in resumed] == whole, "a pass within the epoch is of the whole"
    assert rest + [index.tolist() for _, index in training] == whole[3:]
    resumed.set_epoch(2)  # another fit
    assert [index.tolist() for _, index in resumed] == whole


def test_a_whole_pass_before_a_resumed_epoch_does_not_use_the_state_up():
    order = EpochOrder(50, 7, shuffle=True)
    order.set_epoch(2)
    whole = [index.tolist() for _, index in order]
    order.set_epoch(2)
    training = iter(order)
    next(training)
    resumed = EpochOrder(50, 7, shuffle=True)
    resumed.load_state_dict(order.state_dict())
    assert len(list(resumed)) == 7
    resumed.set_epoch(2)
    assert [index.tolist() for _, index in resumed] == whole[1:]


def test_a_plain_loops_state_after_an_epoch_begins_the_next():
    """Without it the first iteration after the resume is empty."""
    order, plain = (EpochOrder(50, 7, shuffle=True) for _ in range(2))
    epochs = [[index.tolist() for _, index in plain] for _ in range(3)]
    kept = iter(order)
    next(kept)  # a look whose iterator is kept
    assert [index.tolist() for _, index in order] == epochs[1]
    resumed = EpochOrder(50, 7, shuffle=True)
    resumed.load_state_dict(order.state_dict())
    assert [index.tolist() for _, index in resumed] == epochs[2]
