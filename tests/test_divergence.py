"""Contrastive divergence: no force at the law, a pull towards it elsewhere, chains that go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from energies import normal_energy, one_hot
from test_module import stop_at
from tiny import CALLBACKS, ROOT, equal, read
from torch import Tensor

from pipeline.cli import main
from pipeline.condition import Condition
from pipeline.denoisers import EDM, Energy
from pipeline.errors import UserError
from pipeline.mcmc import HMC, MALA, ULA
from pipeline.networks import MLP
from pipeline.noise import Noise
from pipeline.objectives import ContrastiveDivergence
from pipeline.schedules import VE, Rectified, Schedule

ZERO = torch.zeros((), dtype=torch.float64)
MEANS = torch.tensor([[-0.5], [0.4]], dtype=torch.float64)
STDS = torch.tensor([[0.3], [0.6]], dtype=torch.float64)


def energy_of(schedule: Schedule, wider: float = 1.0) -> Energy:
    """The energy of the two classes of clean x, or of wider ones."""
    alpha = schedule(ZERO)[0]
    return normal_energy(schedule, ZERO, alpha * MEANS, (alpha * wider * STDS)[..., None] ** 2)


def data(n: int, key: object = 0) -> tuple[Tensor, Condition]:
    k = torch.arange(n) % 2
    return MEANS[k] + STDS[k] * Noise("x", str(key)).normal(MEANS[k]), one_hot(k, 2)


def slope(energy: Energy, objective: ContrastiveDivergence, batches: int = 40) -> Tensor:
    """The mean gradient of the network's weights over its standard error."""
    found = []
    for i in range(batches):
        loss = objective(energy, *data(256, i), Noise("chain", i)).mean()
        weights = list(energy.network.parameters())
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    g = torch.stack(found)
    return g.mean(dim=0) / (g.std(dim=0) / batches**0.5)


@pytest.mark.parametrize("schedule", [VE(0.1, 10.0), Rectified(0.05)], ids=["VE", "Rectified"])
@pytest.mark.parametrize("kernel", [MALA(0.05), HMC(0.2, 3)], ids=["MALA", "HMC"])
def test_at_the_law_nothing_pulls(kernel: MALA | HMC, schedule: Schedule) -> None:
    """Chains of an exact kernel that begin at the law stay in it; from another they leave."""
    objective = ContrastiveDivergence(kernel, updates=3)
    assert slope(energy_of(schedule), objective).abs().max() < 4.5  # standard errors, of 4 weights
    assert slope(energy_of(schedule, 1.3), objective).abs().max() > 8


@pytest.mark.parametrize("restart", [1.0, 0.0, 0.1])
def test_it_learns_each_class(restart: float) -> None:
    """From a law 1.5 times as wide to the law, as precisely as so many points let it."""
    energy = energy_of(VE(0.1, 10.0), 1.5)
    objective = ContrastiveDivergence(MALA(0.05), 5, restart)
    optimizer = torch.optim.Adam(energy.network.parameters(), lr=3e-2)
    for i in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * (1 - i / 150)
        loss = objective(energy, *data(256, i), Noise("learn", i)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
    for k, variance in enumerate(STDS[:, 0] ** 2):
        phi = energy.score(x, ZERO, one_hot(torch.tensor([k, k]), 2)).detach()
        # 1 / variance, which was 0.44 of that; 128 points a class, averaged by a falling rate
        assert (-phi.diff(dim=0)).item() == pytest.approx(1 / variance.item(), rel=0.15)


def test_value_example_by_example() -> None:
    """One step of ULA from the data, written out, with no gradient through it."""
    schedule = Rectified(0.05)
    energy, (x, u), alpha = energy_of(schedule, 1.3), data(6), Rectified(0.05)(ZERO)[0]
    noise, mu = Noise("one"), 0.02
    phi = alpha * energy.score(alpha * x, ZERO, u).detach()
    y = x + mu * phi + (2 * mu) ** 0.5 * noise.normal(x)
    expected = energy.log_prob(alpha * y, ZERO, u) - energy.log_prob(alpha * x, ZERO, u)
    loss = ContrastiveDivergence(ULA(mu))(energy, x, u, Noise("one"))
    assert torch.allclose(loss, expected, rtol=1e-9)
    weights = list(energy.network.parameters())
    for a, b in zip(
        *(torch.autograd.grad(v.sum(), weights) for v in (loss, expected)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9)


def test_chains_go_on() -> None:
    """From where they were, with the condition they began with; all anew at restart = 1."""
    energy, objective = energy_of(VE(0.1, 10.0)), ContrastiveDivergence(MALA(0.05), restart=0.0)
    x, u = data(8)
    objective(energy, x, u, Noise(0))
    before = objective.held["x"]
    other = one_hot(1 - torch.arange(8) % 2, 2)
    objective(energy, x + 100, other, Noise(1))
    held = objective.held
    assert (held["x"] - before).abs().max() < 3 and equal(held["tokens"], u.tokens)
    with torch.no_grad():  # a validation moves nothing
        loss = objective(energy, x[:3], u[:3], Noise(2))
    assert objective.held is held and loss.shape == (3,)
    thrown = ContrastiveDivergence(MALA(0.05))
    thrown(energy, x, u, Noise(0))
    assert thrown.state() == {}


def test_two_devices_have_the_chains_of_one() -> None:
    energy, (x, u) = energy_of(VE(0.1, 10.0)), data(8)

    def made(state: dict[str, Any]) -> ContrastiveDivergence:
        objective = ContrastiveDivergence(MALA(0.05), 2, restart=0.3)
        objective.load(state)
        return objective

    first = made({})
    first(energy, x, u, Noise("first", rows=(0, 8)))
    whole, other = made(first.state()), data(8, "other")
    loss = whole(energy, *other, Noise("key", rows=(0, 8)))
    parts = [made(first.state()) for _ in range(2)]
    losses = [
        part(energy, other[0][i : i + 4], other[1][i : i + 4], Noise("key", rows=(i, 8)))
        for part, i in zip(parts, (0, 4), strict=True)
    ]
    assert torch.allclose(torch.cat(losses), loss, rtol=1e-9)
    chains = torch.cat([part.state()["x"] for part in parts])
    assert torch.allclose(chains, whole.state()["x"], rtol=1e-9)
    anew = Noise("key", rows=(0, 8)).uniform(8) < 0.3
    assert anew.any() and not anew.all()


def test_a_resumed_run_has_the_same_chains(tmp_path: Path) -> None:
    conf = ROOT / "conf"
    small = ["--model.denoiser.network.width", "16", "--data.batch_size", "32"]
    small += ["--data.rows", "256", "--data.val_rows", "32", "--trainer.val_check_interval", "3"]
    small += ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    cd = ["--model.objective", str(conf / "objective/contrastive_divergence.yaml")]

    def run(name: str, callbacks: list[dict[str, Any]], *args: str) -> int:
        (tmp_path / "own.yaml").write_text(
            yaml.safe_dump({"trainer": {"max_steps": 5, "callbacks": callbacks}})
        )
        files = [
            "-c",
            str(conf / "experiment/mixture_energy.yaml"),
            "-c",
            str(tmp_path / "own.yaml"),
        ]
        return main(["fit", *files, "--run", str(tmp_path / name), *small, *cd, *args])

    callbacks = [one for one in CALLBACKS if "SampleSheet" not in one["class_path"]]
    assert run("whole", callbacks) == 0
    stops = stop_at(2)[-1:]
    assert run("stopped", callbacks + stops) != 0
    before = read(tmp_path / "stopped")
    assert before["global_step"] == 3 and before["objective"]["x"].shape == (32, 2)
    assert before["objective"]["tokens"].shape == (32, 1, 4)
    last = str(tmp_path / "stopped" / "last.ckpt")
    assert run("stopped", callbacks, "--ckpt_path", last) == 0
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "stopped")
    for key in ("state_dict", "optimizer_states", "objective"):
        assert equal(whole[key], resumed[key])
    assert not equal(before["objective"]["x"], resumed["objective"]["x"])


def test_what_is_needed_is_one_sentence() -> None:
    network = MLP(2, 2, width=8, depth=1)
    with pytest.raises(UserError, match="score only"):
        ContrastiveDivergence(MALA(0.1))(
            EDM(network, VE()), torch.zeros(2, 2), one_hot(torch.tensor([0, 1]), 2), Noise(0)
        )
    for settings in ({"updates": 0}, {"restart": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} = "):
            ContrastiveDivergence(ULA(0.1), **settings)
