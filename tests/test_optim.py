"""LeanSGD beside torch.optim.SGD."""

import pytest
import torch
from torch import nn

from lit_basics import LeanSGD, LeNet5


def steps(optimizer_class, sparse=False, **arguments):
    """Train two groups for six steps, one parameter without a gradient in the first two; return all that came of it."""
    torch.manual_seed(0)
    net = nn.Embedding(20, 3, sparse=True) if sparse else LeNet5()
    params = list(net.parameters())
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}] if len(params) > 1 else params
    optimizer = optimizer_class(groups, lr=0.1, **arguments)
    for step in range(6):
        optimizer.zero_grad()
        inputs = torch.randint(20, (8,)) if sparse else torch.randn(4, 3, 32, 32)
        net(inputs).square().mean().backward()
        if step < 2:
            params[-1].grad = None if len(params) > 1 else params[-1].grad
        optimizer.step()
    return params, optimizer


ARGUMENTS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "maximize": True},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: "-".join(arguments) or "plain")
def test_lean_sgd_equals_torchs(arguments):
    (ours, lean), (theirs, sgd) = steps(LeanSGD, **arguments), steps(torch.optim.SGD, **arguments)
    assert all(map(torch.equal, ours, theirs))
    assert lean.state_dict().keys() == sgd.state_dict().keys()
    states = lean.state_dict()["state"], sgd.state_dict()["state"]
    assert bool(states[0]) == ("momentum" in arguments)
    for index, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][index]["momentum_buffer"])


def test_lean_sgd_takes_sparse_gradients():
    for arguments in ({}, {"momentum": 0.9}):
        (ours,), _ = steps(LeanSGD, sparse=True, **arguments)
        (theirs,), _ = steps(torch.optim.SGD, sparse=True, **arguments)
        assert torch.equal(ours, theirs)


def test_lean_sgd_frees_or_clears_gradients():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = LeanSGD([parameter])
    parameter.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(parameter.grad, torch.zeros(2))
    optimizer.zero_grad()
    assert parameter.grad is None


def test_lean_sgd_evaluates_a_closure_once_with_gradients():
    parameter = nn.Parameter(torch.tensor(3.0))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = parameter**2
        loss.backward()
        return loss

    optimizer = LeanSGD([parameter], lr=0.5)
    assert optimizer.step(closure).item() == 9.0
    assert (calls, parameter.item()) == ([True], 0.0)
