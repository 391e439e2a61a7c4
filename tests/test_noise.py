"""Noise: reproducible, shared between devices by rows, and of the stated laws."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from pipeline.noise import Noise, PictureNoise, mix

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


def test_rows_of_two_devices_are_the_rows_of_one() -> None:
    def draws(noise: Noise, n: int) -> list[Tensor]:
        x = torch.zeros(n, 2, 3)
        return [noise.normal(x), noise.uniform(n), noise.spread(n), noise.normal(x)]

    whole = draws(Noise("key"), 10)
    first = draws(Noise("key", rows=(0, 10)), 6)
    second = draws(Noise("key", rows=(6, 10)), 4)
    for a, b, both in zip(first, second, whole, strict=True):
        assert torch.equal(torch.cat((a, b)), both)


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
