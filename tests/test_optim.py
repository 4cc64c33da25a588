"""LeanSGD beside torch.optim.SGD, and FilterMuon beside its definition."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lit_basics import FilterMuon, LeanSGD, LeNet5, PairedOptimizer, UserError


def steps(optimizer_class, sparse=False, late=True, **arguments):
    """Train two groups for six steps and return all that came of it.

    ``late`` is whether one parameter has no gradient in the first two.
    """
    torch.manual_seed(0)
    net = nn.Embedding(20, 3, sparse=True) if sparse else LeNet5()
    params = list(net.parameters())
    groups = params if sparse else [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]
    optimizer = optimizer_class(groups, lr=0.1, **arguments)
    for step in range(6):
        optimizer.zero_grad()
        inputs = torch.randint(20, (8,)) if sparse else torch.randn(4, 3, 32, 32)
        net(inputs).square().mean().backward()
        if step < 2 and late and not sparse:
            params[-1].grad = None
        optimizer.step()
    return params, optimizer


ARGUMENTS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "maximize": True},
]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: "-".join(arguments) or "plain")
def test_lean_sgd_equals_torchs(arguments, fused):
    arguments = {**arguments, "fused": fused, "late": not fused}  # torch's own takes no late momentum where it is fused
    (ours, lean), (theirs, sgd) = steps(LeanSGD, **arguments), steps(torch.optim.SGD, **arguments)
    assert all(map(torch.equal, ours, theirs))
    assert lean.state_dict().keys() == sgd.state_dict().keys()
    states = lean.state_dict()["state"], sgd.state_dict()["state"]
    assert bool(states[0]) == ("momentum" in arguments)
    for index, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][index]["momentum_buffer"])


FLOATS = [torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("dtype", "fused"), [*((d, f) for d in FLOATS for f in (None, True)), (torch.complex64, None)])
def test_lean_sgd_equals_torchs_in_every_dtype(dtype, fused):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 99).to(dtype)) for _ in range(2))
    both = ((LeanSGD, ours), (torch.optim.SGD, theirs))
    optimizers = [kind([p], lr=0.1, momentum=0.9, fused=fused) for kind, p in both]
    for _ in range(5):
        ours.grad = torch.randn(99).to(dtype)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_fused_takes_kinds_and_late_gradients_together_and_rounds_otherwise():
    """As if each parameter had an optimizer of its own."""
    torch.manual_seed(0)
    start = [torch.randn(99), torch.randn(99, dtype=torch.float64), torch.randn(99), torch.randn(5, 99)]
    together, alone, unfused = ([nn.Parameter(value.clone()) for value in start] for _ in range(3))
    arguments = {"lr": 0.1, "momentum": 0.9, "fused": True}
    optimizers = [LeanSGD(together, **arguments), *(LeanSGD([p], **arguments) for p in alone)]
    optimizers.append(LeanSGD(unfused, lr=0.1, momentum=0.9))
    for step in range(6):
        for index, parameters in enumerate(zip(together, alone, unfused, strict=True)):
            gradient = None if step < 2 and index == 2 else torch.randn_like(parameters[0])
            for parameter in parameters:
                parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, together, alone))
    assert not all(map(torch.equal, together, unfused))


@pytest.mark.parametrize("what", ["momentum", "gradient", "first gradient"])
def test_fused_sees_layouts(what):
    """Torch's kernel takes memory as it lies: each weight would get another's momentum, or gradient."""
    torch.manual_seed(0)
    filters, gradients = torch.randn(4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    parameters, optimizers = [nn.Parameter(filters.clone()) for _ in range(2)], []
    for parameter, fused in zip(parameters, (True, False), strict=True):
        optimizer = LeanSGD([parameter], lr=0.1, momentum=0.9, fused=fused)
        for step, gradient in enumerate(gradients):
            if what == "momentum" and step == 1:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
                gradient = gradient.to(memory_format=torch.channels_last)
            if what == ("gradient" if step else "first gradient"):
                gradient = gradient.to(memory_format=torch.channels_last)
            with torch.no_grad():
                parameter.grad = gradient.clone()
            optimizer.step()
        optimizers.append(optimizer)
    torch.testing.assert_close(*parameters, rtol=0, atol=1e-6)  # fused rounds otherwise


def test_fused_takes_a_state_without_a_momentum():
    """As older versions of torch saved it."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LeanSGD([parameter], lr=0.5, momentum=0.9, fused=True)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"momentum_buffer": None}}})
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter, torch.full((3,), 0.5))


def test_fused_takes_sparse_gradients_as_they_are():
    """Which torch's own refuses."""
    (fused,), _ = steps(LeanSGD, sparse=True, fused=True)
    (unfused,), _ = steps(LeanSGD, sparse=True)
    assert torch.equal(fused, unfused)


def test_fused_updates_once_where_a_grad_scaler_has_unscaled():
    """``torch.optim.SGD`` unscales within its kernel, by what the scaler hands it; this one has it done before."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LeanSGD([parameter], lr=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(parameter, torch.full((3,), 0.5))


def called_hooks(optimizer_class):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([parameter], lr=0.1)
    called = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: called.append("before")),
        optimizer.register_step_post_hook(lambda *_: called.append("after")),
        register_optimizer_step_pre_hook(lambda *_: called.append("before all")),
        register_optimizer_step_post_hook(lambda *_: called.append("after all")),
    ]
    for handle in handles:
        optimizer.step()
        handle.remove()
    optimizer.step()
    return called


def test_hooks_of_a_step_are_called_as_torch_calls_them():
    class Sub(LeanSGD):
        def step(self, closure=None):
            return super().step(closure)

    wanted = called_hooks(torch.optim.SGD)
    assert called_hooks(LeanSGD) == wanted
    assert called_hooks(Sub) == wanted
    assert len(wanted) == 4 + 3 + 2 + 1


def test_the_profiler_sees_the_step_where_one_runs():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LeanSGD([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert [event.count for event in profile.key_averages() if event.key == "Optimizer.step#LeanSGD.step"] == [1]
    assert torch.equal(parameter, torch.full((3,), 0.9))


@pytest.mark.parametrize(("first", "second"), [(LeanSGD, torch.optim.SGD), (torch.optim.SGD, LeanSGD)])
def test_either_goes_on_from_the_others_state(first, second):
    parameters = []
    for optimizer_class in (first, second):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.ones(3))
        optimizer = first([parameter], lr=0.1, momentum=0.9)
        for step in range(4):
            if step == 2:
                state = optimizer.state_dict()
                optimizer = optimizer_class([parameter])
                optimizer.load_state_dict(state)
            parameter.grad = torch.randn(3)
            optimizer.step()
        parameters.append(parameter)
    assert torch.equal(*parameters)


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


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 3, 3, 3)], ids=["wide", "tall"])
def test_filter_muon_moves_along_the_nearest_orthogonal_matrix(shape):
    """Its iterations bring singular values near 1, not to it; the singular vectors are those of the gradient."""
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    optimizer = FilterMuon([filters, matrix], lr=0.5, momentum=0.8)
    momentum = torch.zeros_like(matrix)
    for _ in range(3):
        before, gradient = matrix.detach().clone(), torch.randn_like(matrix)
        filters.grad, matrix.grad = gradient.view_as(filters), gradient
        optimizer.step()
        assert torch.equal(filters.flatten(1), matrix)
        momentum = 0.8 * momentum + gradient
        u, _, v = torch.linalg.svd(gradient + 0.8 * momentum, full_matrices=False)
        moved = u.T @ (before - matrix.detach()) @ v.T / 0.5
        assert (moved.diagonal() - 1).abs().max() < 0.35  # as of three steps of the quintic
        assert (moved - moved.diagonal().diag()).abs().max() < 1e-9


def test_filter_muon_refuses_a_bias():
    with pytest.raises(UserError, match=r"not \(2,\): PairedOptimizer has the rest"):
        FilterMuon(nn.Linear(2, 2).parameters())


def test_filter_muon_refuses_sparse_gradients():
    with pytest.raises(RuntimeError, match="FilterMuon does not support sparse gradients"):
        steps(FilterMuon, sparse=True)


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"momentum": -0.1}])
def test_filter_muon_refuses_negative_numbers(arguments):
    with pytest.raises(UserError, match="negative"):
        FilterMuon([nn.Parameter(torch.ones(2, 2))], **arguments)


def test_filters_go_with_the_matrices_if_asked():
    shapes = {}
    for filters in (False, True):
        optimizer = PairedOptimizer(LeNet5().parameters(), LeanSGD, torch.optim.SGD, filters)
        shapes[filters] = [[p.ndim for p in group["params"]] for group in optimizer.param_groups]
    assert shapes == {False: [[2, 2, 2], [4, 1, 4, 1, 1, 1, 1]], True: [[4, 4, 2, 2, 2], [1, 1, 1, 1, 1]]}
    with pytest.raises(UserError, match="of 1 parameters 1 are 2-D or more"):
        PairedOptimizer([nn.Parameter(torch.ones(2, 2, 2, 2))], LeanSGD, LeanSGD, filters=True)


def test_a_copied_pair_goes_on_as_the_original_would():
    nets = []
    for copied in (False, True):
        torch.manual_seed(0)
        net = LeNet5()
        optimizer = PairedOptimizer(net.parameters(), FilterMuon, lambda params: LeanSGD(params, momentum=0.9), True)
        for step in range(4):
            if copied and step == 2:
                net, optimizer = copy.deepcopy((net, optimizer))
            optimizer.zero_grad()
            net(torch.ones(2, 3, 32, 32)).square().mean().backward()
            optimizer.step()
        nets.append(net)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


def test_a_pair_takes_no_group_that_it_would_not_step():
    optimizer = PairedOptimizer(LeNet5().parameters(), LeanSGD, torch.optim.SGD, filters=True)
    with pytest.raises(UserError, match="PairedOptimizer takes no group after it was made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
