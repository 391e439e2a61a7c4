"""Averages of any length afterwards."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from test_cli import PROMPT, draw, pixels, sentence
from test_module import module
from tiny import CALLBACKS, fit, read
from torch import Tensor

from pipeline.averaging import combination, exponent, keep, overlap, reconstruct
from pipeline.callbacks import EMA, PowerEMA
from pipeline.errors import UserError


def profile(t: float, g: float) -> Any:
    return lambda tau: (g + 1) / t * (tau / t) ** g


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_standard_deviation_of_the_profile(length: float) -> None:
    p, g = profile(1.0, exponent(length)), exponent(length)
    mean = quad(lambda x: x * p(x), 0, 1)[0]
    variance = quad(lambda x: (x - mean) ** 2 * p(x), 0, 1)[0]
    assert variance**0.5 == pytest.approx(length, rel=1e-6)
    assert mean == pytest.approx((g + 1) / (g + 2), rel=1e-6)


def test_published_exponents() -> None:
    """Karras et al.: σ_rel of 0.05 and 0.10 are γ = 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, float("nan")])
def test_a_length_beyond_equal_weights_is_none(length: float) -> None:
    with pytest.raises(ValueError, match="length = .* must lie in"):
        exponent(length)


@pytest.mark.parametrize("t", [(300.0, 1000.0), (1000.0, 1000.0), (1e5, 2e5)])
def test_overlap_is_the_integral(t: tuple[float, float]) -> None:
    a, b = (t[0], 6.94), (t[1], 16.97)
    p, q = profile(*a), profile(*b)
    expected = quad(lambda x: p(x) * q(x), 0, min(t), epsabs=0)[0]
    assert overlap(a, b) == pytest.approx(expected, rel=1e-6)
    assert overlap(b, a) == pytest.approx(overlap(a, b), rel=1e-12)


def averaged(path: Tensor, length: float, t: int) -> Tensor:
    """The average of a path θ(1), θ(2), … (T, D) at step t, by its recursion."""
    g, mean = exponent(length), path[0]
    for k in range(1, t + 1):
        mean = torch.lerp(path[k - 1], mean, (1 - 1 / k) ** (g + 1))
    return mean


def test_another_length_follows_from_the_kept_ones(tmp_path: Path) -> None:
    """Of a random walk, as rough as a path can be: nearer than any kept one, the more so the
    oftener they are kept.
    """
    walk = torch.from_numpy(np.random.default_rng(0).normal(size=(400, 50))).cumsum(0) / 20
    lengths, errors = (0.06, 0.075, 0.15, 0.2), []
    for spacing in (50, 25):
        folder = tmp_path / str(spacing)
        for t in range(spacing, 401, spacing):
            kept = {f"{length:g}": {"w": averaged(walk, length, t)} for length in (0.05, 0.1)}
            keep(folder, t, kept)
        own = {float(name): w for name, w in kept.items()}
        for length in lengths:
            truth = averaged(walk, length, 400)
            found = reconstruct(folder, 400, length, own)["w"].double()
            nearest = min((kept[name]["w"] - truth).norm() for name in kept)
            errors.append(((found - truth).norm() / nearest).item())
    between = {length: {"w": averaged(walk, length, 310)} for length in (0.05, 0.1)}
    found = reconstruct(folder, 310, 0.075, between)["w"].double()
    truth = averaged(
        walk, 0.075, 310
    )  # at a step that none was kept at, and after which some were
    assert (found - truth).norm() < 0.05 * (between[0.1]["w"] - truth).norm()
    with pytest.raises(
        UserError, match="--ema 0.005 cannot be made of what .* 0.05 and 0.1 at 16"
    ):
        reconstruct(folder, 400, 0.005, own)
    (folder / "averages" / "notes.safetensors").write_bytes(b"")  # is none of them
    reconstruct(folder, 400, 0.075, own)
    (folder / "averages" / "00000025.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="00000025.safetensors cannot be read"):
        reconstruct(folder, 400, 0.075, own)
    seldom, often = errors[: len(lengths)], errors[len(lengths) :]
    assert max(seldom) < 0.5 and max(often) < 0.02
    assert all(b < a for a, b in zip(seldom, often, strict=True))


def test_a_kept_average_is_itself() -> None:
    kept = [(t, length) for t in (100.0, 200.0) for length in (0.05, 0.1)]
    weights, missed = combination(kept, (200.0, 0.05))
    assert np.allclose(weights, [0, 0, 1, 0], atol=1e-6) and missed < 1e-6
    # of the span from the last kept step on, nothing is known: it is missed, and not left out
    assert combination(kept, (300.0, 0.05))[1] > 0.9


@pytest.mark.parametrize("every", [1, 4])
def test_the_callback_is_the_recursion(every: int, tmp_path: Path) -> None:
    made, ema = module(), PowerEMA([0.1, 0.05], every, times=2)
    trainer: Any = SimpleNamespace(
        global_step=0,
        estimated_stepping_batches=16,
        is_global_zero=True,
        fast_dev_run=False,
        default_root_dir=str(tmp_path),
    )
    ema.on_train_start(trainer, made)
    name, weight = next(iter(made.named_parameters()))
    path = []
    for k in range(1, 17):
        weight.data.copy_(torch.full_like(weight, float(np.sin(k))))
        path.append(weight.detach().double().flatten()[:1].clone())
        trainer.global_step = k
        ema.on_train_batch_end(trainer, made)
    for length in (0.1, 0.05):
        mean, g = path[0], exponent(length)
        for k in range(every, 17, every):
            mean = torch.lerp(path[k - 1], mean, (1 - every / k) ** (g + 1))
        found = ema.averages[f"{length:g}"][name].flatten()[:1].double()
        assert torch.allclose(found, mean, atol=1e-6)  # float32
    assert [f.stem for f in sorted((tmp_path / "averages").iterdir())] == ["00000008", "00000016"]
    kept = reconstruct(tmp_path, 16, 0.05, {float(k): w for k, w in ema.averages.items()})
    assert torch.allclose(kept[name], ema.averages["0.05"][name], atol=1e-5)


def test_bad_lengths() -> None:
    for bad in ({"lengths": [0.1]}, {"lengths": [0.1, 0.1]}, {"times": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="lengths|every"):
            PowerEMA(**bad)  # type: ignore[arg-type]
    endless: Any = SimpleNamespace(estimated_stepping_batches=float("inf"))
    with pytest.raises(UserError, match="this run has no end"):
        PowerEMA().on_train_start(endless, module())
    both: Any = SimpleNamespace(callbacks=[EMA(), PowerEMA()])
    with pytest.raises(UserError, match="Two callbacks average the weights"):
        both.callbacks[0].setup(both, module(), "fit")


def test_any_length_is_drawn_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    power = {
        "class_path": "pipeline.callbacks.PowerEMA",
        "init_args": {"lengths": [0.1, 0.05], "times": 6},
    }
    own = [one if "EMA" not in one["class_path"] else power for one in CALLBACKS]
    run = fit(tmp_path / "run", callbacks=own)
    assert list(read(run)["averages"]) == ["0.1", "0.05"]
    drawn = {}
    for name in ("0.1", "0.05", "0.15", "trained"):
        manifest = draw(run, tmp_path / name, PROMPT, "--number", "1", "--ema", name)
        assert manifest["ema"] == name
        drawn[name] = pixels(tmp_path / name, 0)
    assert len(set(drawn.values())) == 4
    draw(run, tmp_path / "default", PROMPT, "--number", "1")
    assert pixels(tmp_path / "default", 0) == drawn["0.1"]
    generate = ["generate", PROMPT, "--checkpoint", str(run)]
    assert "no average 'long'; it has trained, 0.1, 0.05" in sentence(
        [*generate, "--ema", "long"], capsys
    )
    for name in ("0.4", "nan", "1e-200"):
        assert f"no average {name!r}; it has trained, 0.1, 0.05." in sentence(
            [*generate, "--ema", name], capsys
        )
    assert "--ema 0.001 cannot be made" in sentence([*generate, "--ema", "0.001"], capsys)
    out = tmp_path / "r.json"
    args = ["--checkpoint", str(run), "--number", "6", "--ema", "0.15", "--out", str(out)]
    assert sentence(["evaluate", *args, "--steps", "0"], capsys)  # before anything is drawn
    assert not out.exists()
    assert json.loads((tmp_path / "default" / "manifest.json").read_text())["ema"] is None
