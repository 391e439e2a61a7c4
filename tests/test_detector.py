"""The detector reads true pictures and nothing else."""

import time

import numpy as np
import pytest
import torch

from pipeline.codec import Pixels
from pipeline.data.shapes import Attributes, Relations, Shapes
from pipeline.evaluation.adherence import chance, right
from pipeline.evaluation.shapes import VALUES, columns, grain, read


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, list[Attributes]]:
    """2,160 fresh drawings: every combination, seen and unseen, nine times."""
    data = Shapes(None)
    plan = (data.combinations("train") + data.combinations("unseen")) * 9
    return data.render(plan, np.random.default_rng(1234)), plan


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    reach = np.arange(-12, 13)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    kernel = torch.tensor(kernel / kernel.sum(), dtype=torch.float32)
    y = torch.as_tensor(x).float().flatten(0, 1)[:, None]
    y = torch.nn.functional.pad(y, (12, 12, 12, 12), mode="replicate")
    y = torch.conv2d(torch.conv2d(y, kernel[None, None, None]), kernel[None, None, :, None])
    return y.reshape(x.shape).numpy().astype(np.uint8)


def accuracy(pictures: np.ndarray, wanted: list[Attributes]) -> dict[str, float]:
    return right(columns(read(pictures)), columns(wanted))


def readable(pictures: np.ndarray) -> float:
    return float(np.mean([one is not None for one in read(pictures)]))


def test_true_pictures_are_read(drawn: tuple[np.ndarray, list[Attributes]]) -> None:
    x, plan = drawn
    assert accuracy(x, plan)["all"] >= 0.99
    pixels = Pixels(3, 32, 32)
    assert read(pixels.decode(pixels.encode(torch.from_numpy(x[:50])))) == plan[:50]


def test_small_flaws_are_forgiven(drawn: tuple[np.ndarray, list[Attributes]]) -> None:
    x, plan = drawn[0][:480], drawn[1][:480]
    noise = np.random.default_rng(0).uniform(-20, 20, x.shape)
    assert accuracy((x + noise).clip(0, 255).astype(np.uint8), plan)["all"] >= 0.99
    cast = np.random.default_rng(0).uniform(-20, 20, (len(x), 3, 1, 1))
    assert accuracy((x + cast).clip(0, 255).astype(np.uint8), plan)["all"] >= 0.99
    assert accuracy(blur(x, 0.5), plan)["all"] >= 0.99


def test_what_is_no_picture_is_not_read(drawn: tuple[np.ndarray, list[Attributes]]) -> None:
    x, generator = drawn[0][:300].astype(float), np.random.default_rng(0)
    uniform, normal = generator.uniform(0, 256, x.shape), generator.normal(128, 128, x.shape)
    half = x.copy()
    half[..., 16:] = uniform[..., 16:]
    flat = np.broadcast_to(generator.uniform(0, 256, (len(x), 3, 1, 1)), x.shape)
    wrong = {
        "uniform": uniform,
        "normal": normal,
        "mixture": 0.5 * x + 0.5 * uniform,
        "half": half,
        "flat": flat,
        "white": np.full(x.shape, 255),
        "smooth": blur(normal, 3.0),
    }
    found = {name: readable(y.clip(0, 255).astype(np.uint8)) for name, y in wrong.items()}
    assert not any(found.values()), found
    assert readable(blur(x, 2.0)) < 0.02 and readable(blur(x, 3.0)) == 0
    relations = Relations(None)
    assert readable(relations.render(relations.combinations("val")[:200], generator)) == 0
    assert readable(Pixels(3, 32, 32).decode(torch.full((3, 3, 32, 32), np.nan)).numpy()) == 0


def test_grain_is_the_noise_of_the_ground(drawn: tuple[np.ndarray, list[Attributes]]) -> None:
    x = drawn[0][:240].astype(np.float64)
    assert grain(drawn[0][:240], drawn[1][:240]) == 0
    noise = np.random.default_rng(0).normal(size=x.shape)
    for sigma in (4.0, 8.0):
        noisy = (x + sigma * noise).round().clip(0, 255).astype(np.uint8)
        # half of it is cut off at white; rounding adds half of 1/12 to half of σ², 3e-3 of it at
        # most, and 1e5 pixels leave 5e-3
        assert grain(noisy, read(noisy)) == pytest.approx(sigma / 2**0.5, rel=1e-2)
    grey = x.clip(0, 240).astype(np.uint8)  # far too dark a ground
    assert grain(grey, read(grey)) == pytest.approx(15)
    assert grain(np.zeros((3, 3, 32, 32), np.uint8), [None] * 3) is None


def test_wrong_prompts_are_wrong(drawn: tuple[np.ndarray, list[Attributes]]) -> None:
    x, plan = drawn
    order = np.random.default_rng(0).permutation(len(plan))
    asked = [plan[i] for i in order]
    found, by_chance = accuracy(x, asked), chance(columns(asked), VALUES)
    for name in ("colour", "shape", "size", "position", "mean", "all"):
        # five standard deviations of a binomial of 2,160
        assert abs(found[name] - by_chance[name]) < 5 * np.sqrt(0.25 / len(plan))


def test_chance() -> None:
    whole = chance(columns([Attributes("red", "circle", "small", "centre")]), VALUES)
    assert whole["all"] == pytest.approx(1 / 240)
    assert whole["mean"] == pytest.approx((1 / 6 + 1 / 4 + 1 / 2 + 1 / 5) / 4)
    some = [Attributes("red", "circle"), Attributes("red", "circle", "small")]
    part = chance(columns(some), VALUES)
    assert part["all"] == pytest.approx((1 / 24 + 1 / 48) / 2) and "position" not in part


def test_what_was_not_asked_is_free(drawn: tuple[np.ndarray, list[Attributes]]) -> None:
    x, plan = drawn[0][:20], drawn[1][:20]
    found = accuracy(x, [Attributes(one.colour, one.shape) for one in plan])
    assert found["all"] == 1 and "size" not in found


def test_reading_is_quick(drawn: tuple[np.ndarray, list[Attributes]]) -> None:
    start = time.perf_counter()
    read(drawn[0][:256])
    assert time.perf_counter() - start < 2


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\).*\(N, 3, 32, 32\)"):
        read(np.zeros((2, 3, 16, 16), np.uint8))
    assert read(np.zeros((0, 3, 32, 32), np.uint8)) == []
