"""An optimizer of two kinds."""

import copy

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.noise import Noise
from pipeline.optimizers import MuonAdamW


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.SiLU(), nn.Linear(64, 96), nn.SiLU()).append(
        nn.Linear(96, 3)
    )


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], i: int) -> None:
    x = Noise("step", i).normal(torch.empty(16, 12))
    model.zero_grad()
    model(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_it_is_muon_on_hidden_matrices_and_adamw_elsewhere() -> None:
    ours, theirs = network(), network()
    hidden = theirs[2].weight  # (96, 64); the first has a side of 12 and the last one of 3
    rest = [p for p in theirs.parameters() if p is not hidden]
    one = MuonAdamW(ours.parameters(), lr=0.01, weight_decay=0.1)
    two = [
        torch.optim.Muon(
            [hidden], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, fused=True),
    ]
    for i in range(5):
        if i == 3:
            for group in [*one.param_groups, *two[0].param_groups, *two[1].param_groups]:
                group["lr"] = 0.003  # as a schedule does
        step(ours, [one], i)
        step(theirs, two, i)
        assert same(ours, theirs)


def test_a_loaded_one_goes_on() -> None:
    straight = network()
    optimizer = MuonAdamW(straight.parameters(), lr=0.01)
    for i in range(6):
        if i == 3:
            stopped, state = copy.deepcopy(straight), copy.deepcopy(optimizer.state_dict())
        step(straight, [optimizer], i)
    again = MuonAdamW(stopped.parameters(), lr=0.5)  # the loaded state says another
    again.load_state_dict(state)
    for i in range(3, 6):
        step(stopped, [again], i)
    assert same(straight, stopped)


def test_a_network_without_such_matrices_is_refused() -> None:
    with pytest.raises(UserError, match="no matrix whose sides are both at least 64"):
        MuonAdamW(nn.Linear(63, 64).parameters())
