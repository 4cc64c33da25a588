"""System D: Muon takes matrices only, so the recipe pairs it with SGD."""

import copy

import pytest
import torch
from helpers import assert_same_steps, copied, epoch_indices, train
from torch import nn

from lit_basics import LeNet5, PairedOptimizer, SyntheticCIFAR10, UserError


@pytest.mark.parametrize("overlay", [[], ["--config", "manual"]], ids=["automatic", "manual"])
def test_recipe_equals_the_loop_with_two_optimizers(overlay):
    small = ["--data.train_images", "300", "--data.val_size", "0", "--trainer.max_epochs", "2"]
    _, weights, _ = train("--config", "muon", *overlay, *small)
    net = LeNet5()
    net.load_state_dict(weights.before)
    data = SyntheticCIFAR10(300, val_size=0)
    data.setup("fit")
    arrays = data.load()
    x, y = data.normalize(arrays.x_train), arrays.y_train
    muon = torch.optim.Muon([p for p in net.parameters() if p.ndim == 2], lr=0.01, weight_decay=0.0)
    sgd = torch.optim.SGD([p for p in net.parameters() if p.ndim != 2], lr=0.03, momentum=0.9)
    after = []
    for epoch in range(2):
        for index in epoch_indices(0, epoch, 300).split(64):
            net.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            muon.step()
            sgd.step()
            after.append(copied(net))
    assert_same_steps(weights.after, after, 10)


def paired(net):
    return PairedOptimizer(
        net.parameters(),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
    )


def test_state_and_schedulers_reach_both_members():
    net = nn.Linear(2, 2)
    optimizer = paired(net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.0025]
    other_net = nn.Linear(2, 2)
    other_net.load_state_dict(net.state_dict())
    other = paired(other_net)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, both in ((net, optimizer), (other_net, other)):
        both.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        both.step()
    assert torch.equal(net.weight, other_net.weight)
    assert torch.equal(net.bias, other_net.bias)


def test_one_kind_of_parameters_is_refused():
    with pytest.raises(UserError, match="of 1 parameters 1 are 2-D"):
        paired(nn.Linear(2, 2, bias=False))
