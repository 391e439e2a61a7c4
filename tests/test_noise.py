"""Noise: reproducible, shared between devices by rows, and of the stated laws."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pipeline.noise import Noise, PictureNoise, mix, permuted

# A law is rejected below this p-value; the draws are seeded, so a test that passes keeps passing.
P = 1e-3


def test_mix_is_pinned() -> None:
    """The noise of every saved picture and run depends on these values."""
    assert mix("picture", 0) == 7878305072035605263
    assert mix(1, 2, "train") == 2898830188112684726


def test_mix_tells_keys_apart() -> None:
    keys = [(0,), (1,), ("0",), (0, 0), ("",), (), (12, 3), (1, 23), ("ab", "c"), ("a", "bc")]
    seeds = {mix(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_keys_are_unrelated() -> None:
    x = torch.zeros(4000, dtype=torch.float64)
    a, b = Noise("train", 1).normal(x), Noise("train", 2).normal(x)
    assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 4 / 4000**0.5  # 4 standard errors


def test_same_key_same_numbers() -> None:
    x = torch.zeros(6, 3)
    for draw in (lambda n: n.normal(x), lambda n: n.uniform(6), lambda n: n.spread(6)):
        assert torch.equal(draw(Noise("a", 1)), draw(Noise("a", 1)))
        assert not torch.equal(draw(Noise("a", 1)), draw(Noise("a", 2)))
        noise = Noise("a", 1)
        assert not torch.equal(draw(noise), draw(noise))  # the stream moves on


def test_like_decides_shape_and_type() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, 3, 4, 4, dtype=dtype)
        for drawn in (Noise(0).normal(x), PictureNoise([1, 2]).normal(x)):
            assert drawn.shape == x.shape and drawn.dtype == dtype


def draws(noise: Noise, n: int) -> list[Tensor]:
    x = torch.zeros(n, 2, 3)
    return [noise.normal(x), noise.uniform(n), noise.spread(n), noise.normal(x)]


@pytest.mark.parametrize(
    "parts", [(6, 4), (32, 32), (16, 16, 16), (1,) * 70, (5, 64, 31), (1000, 500)]
)
def test_rows_of_several_devices_are_the_rows_of_one(parts: tuple[int, ...]) -> None:
    total, start, found = sum(parts), 0, []
    for n in parts:
        found.append(draws(Noise("key", rows=(start, total)), n))
        start += n
    for shares, whole in zip(
        zip(*found, strict=True), draws(Noise("key", rows=(0, total)), total), strict=True
    ):
        assert torch.equal(torch.cat(shares), whole)
        assert len(whole.flatten(1).unique(dim=0)) == total if whole.ndim > 1 else True


def test_what_a_device_draws_does_not_grow_with_the_world() -> None:
    """1,024 devices of 16 rows: their rows together are those of one, and each draws one block."""
    world, n, drawn = 1024, 16, []
    whole = Noise("key", rows=(0, world * n)).normal(torch.empty(world * n, 4))

    def count(size: tuple[int, ...], **more: Any) -> Tensor:
        drawn.append(size[0])
        return torch.rand(size, **more)

    for rank in range(world):
        noise = Noise("key", rows=(rank * n, world * n))
        assert torch.equal(noise.normal(torch.empty(n, 4)), whole[rank * n :][:n])
        noise._draw(count, n)
    assert drawn == [32] * world


def test_each_row_has_numbers_of_its_own() -> None:
    x = Noise("law", rows=(0, 20_000)).normal(torch.zeros(20_000, 2, dtype=torch.float64))
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > P
    assert abs(torch.corrcoef(x.T)[0, 1]) < 4 / 20_000**0.5  # 4 standard errors
    blocks = x[:, 0].reshape(-1, 32)
    # neighbouring blocks have generators of their own
    assert abs(
        torch.corrcoef(torch.stack((blocks[:-1].flatten(), blocks[1:].flatten())))[0, 1]
    ) < (4 / 20_000**0.5)


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 1024, 1025, 1277, 5453, 100_003])
def test_a_permutation_is_one(n: int) -> None:
    found = permuted(np.arange(n), n, "key", n)
    assert (np.bincount(found, minlength=n) == 1).all()
    assert (permuted(np.arange(n)[::-1], n, "key", n) == found[::-1]).all()  # one by one too


@pytest.mark.parametrize("n", [5, 1024, 1025, 2000])
def test_each_place_of_a_permutation_is_uniform(n: int) -> None:
    """And so is the step from one place to the next: no row follows another more often."""
    zero, one = np.array([permuted(np.array([0, 1]), n, "law", k) for k in range(4000)]).T
    step = (one - zero) % n - 1  # never 0
    for found, m in ((zero, n), (one, n), (step, n - 1)):
        cells = np.arange(m) * min(m, 20) // m
        expected = np.bincount(cells) * len(found) / m
        assert stats.chisquare(np.bincount(cells[found]), expected).pvalue > P


def test_a_permutation_of_a_billion_is_no_table() -> None:
    n = 10**9
    tracemalloc.start()
    found = permuted(np.arange(n - 512, n), n, "key")
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 512 and 0 <= found.min() and found.max() < n
    assert used < 1e6  # 512 numbers, and a few of their kind
    assert stats.kstest(found / n, "uniform").pvalue > P


def test_normal_and_uniform_have_their_laws() -> None:
    noise = Noise("law")
    x = noise.normal(torch.zeros(20_000, dtype=torch.float64))
    assert stats.kstest(x.numpy(), "norm").pvalue > P
    q = noise.uniform(20_000)
    assert stats.kstest(q.numpy(), "uniform").pvalue > P
    assert q.min() >= 0 and q.max() < 1
    each = PictureNoise(range(10))
    pictures = torch.cat([each.uniform(10) for _ in range(500)])
    assert stats.kstest(pictures.numpy(), "uniform").pvalue > P
    assert PictureNoise(range(2)).normal(torch.zeros(2, 9000)).std().item() == pytest.approx(
        1,
        abs=4 / 36_000**0.5,  # 4 standard errors of a standard deviation, 1/√(2n)
    )


@pytest.mark.parametrize("n", [1, 7, 64])
def test_spread_has_one_number_in_each_cell(n: int) -> None:
    noise = Noise("cells", n)
    for _ in range(20):
        q = noise.spread(n)
        assert sorted((q * n).floor().int().tolist()) == list(range(n))
        # one offset for all: the numbers are evenly apart, to float32's rounding
        assert (q.sort().values.diff() - 1 / n).abs().max() < 1e-6 if n > 1 else True


def test_each_number_of_a_spread_is_uniform() -> None:
    noise = Noise("marginal")
    draws = torch.stack([noise.spread(4) for _ in range(4000)])
    for i in range(4):
        assert stats.kstest(draws[:, i].numpy(), "uniform").pvalue > P
    # the order is random: pairs of rows are as likely to be in either order
    share = (draws[:, 0] < draws[:, 1]).double().mean().item()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)  # 4 standard errors


def test_spread_stays_below_one() -> None:
    """In float32 the last of 2¹⁶ cells rounds up to 1 where the offset is above 1 − 2⁻⁹."""
    key = next(i for i in range(10_000) if Noise("large", i).uniform(1) > 1 - 2**-10)
    assert 0.999 < Noise("large", key).spread(1 << 16).max() < 1


def test_a_spread_average_has_less_variance() -> None:
    noise = Noise("variance")
    spread = torch.stack([(noise.spread(16) ** 2).mean() for _ in range(500)]).var()
    independent = torch.stack([(noise.uniform(16) ** 2).mean() for _ in range(500)]).var()
    # for a smooth f the even grid's variance is ~1/n of the independent one's: 1/16, 1/8 with room
    assert spread < independent / 8


def test_a_picture_has_its_noise_in_any_company() -> None:
    def draw(*seeds: int) -> list[Tensor]:
        noise, x = PictureNoise(seeds), torch.zeros(len(seeds), 3, 4, 4)
        n = len(x)
        return [noise.normal(x), noise.uniform(n), noise.spread(n), noise.normal(x)]

    alone = draw(7)
    for seeds in ((7, 1, 2), (1, 7), (3, 2, 1, 0, 7), (7, 7)):
        for a, b in zip(alone, draw(*seeds), strict=True):
            assert torch.equal(a[0], b[seeds.index(7)])
    a, *_, b = draw(7, 8)
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], b[0])


def test_the_noise_of_pictures_is_a_noise() -> None:
    """Whatever draws takes either; a picture alone has one cell, so spread is uniform."""
    assert isinstance(PictureNoise([1, 2]), Noise)
    assert torch.equal(PictureNoise([1, 2]).spread(2), PictureNoise([1, 2]).uniform(2))


def test_as_many_seeds_as_rows() -> None:
    with pytest.raises(ValueError, match="3 rows .* 2 seeds"):
        PictureNoise([1, 2]).normal(torch.zeros(3, 2))
    for draw in (PictureNoise([1, 2]).uniform, PictureNoise([1, 2]).spread):
        with pytest.raises(ValueError, match="3 rows .* 2 seeds"):
            draw(3)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    x = torch.zeros(3, 2)
    noise = Noise(0)
    noise.normal(x), noise.uniform(3), noise.spread(3), PictureNoise([1, 2, 3]).normal(x)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = Noise(0).normal(x)
    torch.manual_seed(5)
    assert torch.equal(Noise(0).normal(x), drawn)
    torch.set_rng_state(before)
