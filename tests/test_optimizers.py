"""An optimizer of two kinds."""

import copy

import pytest
import torch
from torch import nn

from pipeline import optimizers
from pipeline.errors import UserError
from pipeline.noise import Noise
from pipeline.optimizers import MuonAdamW, orthogonal


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
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch's own Muon came with 2.9")
    two = [
        torch.optim.Muon(
            [hidden], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, fused=True),
    ]
    start = hidden.detach().clone()
    for i in range(5):
        if i == 3:
            for group in [*one.param_groups, *two[0].param_groups, *two[1].param_groups]:
                group["lr"] = 0.003  # as a schedule does
        for k, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.grad = q.grad = Noise(i, k).normal(torch.empty(p.shape))
        for optimizer in (one, *two):
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if p.shape == hidden.shape:
                # theirs is in bfloat16: its roundings in five rounds make 4 % of a move
                assert (p - q).norm() < 0.06 * (q - start).norm()
            else:
                assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (3, 96, 32), (2, 64, 48)])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    m = Noise("m").normal(torch.empty(shape, dtype=torch.float64))
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    found = orthogonal(m).double()
    s = torch.linalg.svdvals(found)
    # the quintic has its least and greatest fixed values near 0.68 and 1.14
    assert s.max() < 1.2 and s.min() > 0.66
    # and it turns nothing: U^T X V is diagonal but for the roundings
    turned = u.mT @ found @ v.mT
    off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3
    assert (orthogonal(torch.zeros(32, 32)) == 0).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_a_gradient_of_low_rank_stays_bounded(rank: int) -> None:
    """Where G is 0 its noise grows twelvefold a round: in bfloat16, of autocast, past 1e3."""
    a, b = Noise("a").normal(torch.empty(128, rank)), Noise("b").normal(torch.empty(rank, 512))
    with torch.autocast("cpu", torch.bfloat16):
        s = torch.linalg.svdvals(orthogonal(torch.einsum("ir,rj->ij", a.double(), b.double())))
    assert s[:rank].min() > 0.6 and s[0] < 1.2
    assert s[rank:].max() < 1e-3  # roundings of 2⁻²⁴ times 3.44⁵


def test_the_setting_of_tf32_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, seen, polynomial = torch.backends.cuda.matmul, [], optimizers.polynomial

    new = hasattr(matmul, "fp32_precision")  # from torch 2.9 on
    name, low, full = ("fp32_precision", "tf32", "ieee") if new else ("allow_tf32", True, False)

    def look(gram: torch.Tensor) -> torch.Tensor:
        seen.append(getattr(matmul, name))
        return polynomial(gram)

    monkeypatch.setattr(optimizers, "polynomial", look)
    before = getattr(matmul, name)
    try:
        setattr(matmul, name, low)
        orthogonal(torch.eye(32))
        assert set(seen) == {full} and getattr(matmul, name) == low
    finally:
        setattr(matmul, name, before)


def test_small_singular_values_go_where_the_quintic_sends_them() -> None:
    """Five rounds on the numbers themselves say what the matrix should get."""
    m = Noise("m").normal(torch.empty(64, 256, dtype=torch.float64))
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    s = torch.logspace(0, -4, 64, dtype=torch.float64)
    found = u.mT @ orthogonal((u * s) @ v).double() @ v.mT
    wanted = s / s.norm()
    for _ in range(5):
        wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
    # float32 leaves 2e-7 of the largest in G, and each round takes it times up to 12
    assert (found - torch.diag(wanted)).abs().max() < 2e-3


def test_a_convolution_is_a_matrix() -> None:
    """Of (out, in · 3 · 3) numbers; one with few channels on a side is AdamW's."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.Conv2d(a, b, 3, bias=False) for a, b in ((64, 32), (64, 32), (3, 64))
    )
    twin = nn.Linear(64 * 9, 32, bias=False)
    weights = [layer.weight for layer in layers]
    for p in (*weights, twin.weight):
        p.grad = Noise("g", p.ndim).normal(torch.empty(p.shape))
    twin.weight.data = weights[0].data.reshape(32, -1).clone()
    twin.weight.grad = weights[0].grad.reshape(32, -1).clone()
    first, small = twin.weight.detach().clone(), weights[2].detach().clone()
    one, two = MuonAdamW(layers.parameters(), lr=0.01), MuonAdamW(twin.parameters(), lr=0.01)
    assert [len(group["params"]) for group in one.param_groups] == [2, 1]
    for _ in range(2):
        one.step()
        two.step()
    # alone or with another of its shape: the roundings alone differ
    change = twin.weight - first
    assert (weights[0].reshape(32, -1) - twin.weight).norm() < 1e-3 * change.norm()
    moved = (weights[2] - small).abs()
    assert moved.max() < 0.0201 and moved.min() > 0.0199  # AdamW's two first moves, of lr each


def test_gradients_are_scaled_and_bad_ones_move_nothing() -> None:
    """As with torch's fused optimizers: clipping divides, and what is not finite is no step."""
    one, two = network(), network()
    ours, plain = MuonAdamW(one.parameters(), lr=0.01), MuonAdamW(two.parameters(), lr=0.01)
    for i in range(6):
        scale = 2.0 ** (i % 3)
        for k, (p, q) in enumerate(zip(one.parameters(), two.parameters(), strict=True)):
            p.grad = Noise(i, k).normal(torch.empty(p.shape))
            q.grad = p.grad / scale
        ours.grad_scale, ours.found_inf = torch.tensor(scale), torch.tensor(float(i == 3))
        if i == 3:
            before = copy.deepcopy((one.state_dict(), ours.state_dict()["state"]))
            for p in one.parameters():
                p.grad.view(-1)[0] = float("nan")
        ours.step()
        if i != 3:
            plain.step()
            continue
        for p, q in zip(before[0].values(), one.state_dict().values(), strict=True):
            assert torch.equal(p, q)
        for a, b in zip(before[1].values(), ours.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)  # the rate is rounded to float32 there


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
    with pytest.raises(UserError, match="no matrix or convolution with 32 channels"):
        MuonAdamW(nn.Linear(31, 64).parameters())
