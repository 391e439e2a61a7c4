"""The energy head: a density from the same networks, and what can be done with one."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from energies import normal_energy, one_hot
from tiny import ROOT
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pipeline.cli import main
from pipeline.condition import Condition, U
from pipeline.denoisers import EDM, Denoiser, Energy, Flow, ScoreDenoiser
from pipeline.errors import UserError
from pipeline.generator import Generator
from pipeline.guidance import ClassifierFree
from pipeline.mcmc import HMC, MALA, NUTS, GaussianMixture, Kernel, Metropolis
from pipeline.mcmc.targets import NoDensity
from pipeline.networks import MLP, Network, UNet
from pipeline.noise import Noise, PictureNoise
from pipeline.objectives import DSM, LogNormal, Objective, ScoreMatching, UniformTime
from pipeline.samplers import Heun
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule, expand_as_batch

SCHEDULES = [VP(), Cosine(), VE(), Rectified()]
TIMES = [0.0, 0.3, 1.0]
TIME = torch.tensor(0.3, dtype=torch.float64)


def named(value: object) -> str:
    return type(value).__name__


NULL = Condition(torch.zeros(1, 1, 3, dtype=torch.float64))
MEANS = torch.tensor([[0.4, -0.2], [-0.6, 0.1], [0.0, 0.5]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.2, -0.1], [-0.1, 0.2]]],
    dtype=torch.float64,
)


def random_energy(schedule: Schedule, u_dim: int = 3, **settings: bool) -> Energy:
    torch.manual_seed(0)
    network = MLP(2, u_dim, width=16, depth=1)
    nn.init.normal_(network.output.weight, std=0.1)
    return Energy(network, schedule, **settings).double()


def points(n: int = 12) -> tuple[Tensor, Condition]:
    x = Noise("points").normal(torch.zeros(n, 2, dtype=torch.float64))
    return x, one_hot(torch.arange(n) % 3, 3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", TIMES)
def test_normal_laws_of_each_class(schedule: Schedule, t: float) -> None:
    """log p with its constant, φ and D of a normal law, class by class."""
    time = torch.tensor(t, dtype=torch.float64)
    x, u = points()
    alpha, sigma = schedule(time)
    covariances = alpha**2 * COVARIANCES + sigma**2 * torch.eye(2)
    energy = normal_energy(schedule, time, alpha * MEANS, covariances)
    k = u.tokens[:, 0].argmax(dim=-1)
    law = MultivariateNormal(alpha * MEANS[k], covariances[k])
    x = alpha * MEANS[k] + sigma * x  # where the law is, or out of it at low noise
    phi = -torch.linalg.solve(covariances[k], x - alpha * MEANS[k])
    # float64: sums of numbers that reach (σ_d / s)² ~ 1e5 at t = 0 and σ_t² ~ 1e4 at t = 1
    assert torch.allclose(energy.log_prob(x, time, u), law.log_prob(x), rtol=1e-8, atol=1e-7)
    assert torch.allclose(energy.score(x, time, u), phi, rtol=1e-7, atol=1e-9)
    d = (x + sigma**2 * phi) / alpha
    assert torch.allclose(energy(x, time, u), d, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_score_is_the_slope_of_log_prob(schedule: Schedule) -> None:
    """By central differences, of a network and not only of a quadratic; t and u by example."""
    energy, (x, u) = random_energy(schedule), points()
    t = torch.linspace(0.2, 0.9, len(x), dtype=torch.float64)
    x = x * expand_as_batch(sum(schedule(t)), x)
    score, log_p = energy.score(x, t, u), energy.log_prob(x, t, u)
    for i in range(2):
        h = 1e-6 * schedule(t)[1][:, None] * torch.eye(2, dtype=torch.float64)[i]
        slope = energy.log_prob(x + h, t, u) - energy.log_prob(x - h, t, u)
        slope = slope / (2 * h[:, i])
        # h² of the third derivative, and rounding: eps |log p| / h relative to a slope of 1 / σ
        assert torch.allclose(score[:, i], slope, rtol=1e-6, atol=1e-5 / schedule(t)[1].min())
    together = energy.log_prob_and_score(x, t, u)
    assert torch.equal(together[0], log_p) and torch.equal(together[1], score)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", TIMES)
def test_it_is_edm_with_a_gradient_for_its_network(schedule: Schedule, t: float) -> None:
    energy, (x, u), time = random_energy(schedule), points(), torch.tensor(t).double()

    class Gradient(Network):
        def forward(self, z: Tensor, level: Tensor, u: U = None) -> Tensor:
            z = z.requires_grad_()
            h = (z * energy.network(z, level, u)).sum()
            return torch.autograd.grad(h, z)[0]

    x = sum(schedule(time)) * x
    d = EDM(Gradient(), schedule)(x, time, u)
    # D is near 1; x_t / α_t, of which it is the small difference, reaches 1e4: eps · 1e4
    assert torch.allclose(energy(x, time, u), d, rtol=1e-9, atol=1e-10)
    # and the other direction of the identity, at the digits that are left of α D − x_t over σ²
    back = Denoiser.score(energy, x, time, u)
    assert torch.allclose(energy.score(x, time, u), back, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_it_starts_as_a_normal_law(schedule: Schedule, t: float) -> None:
    """With the network's output zero: N(0, α² σ_d² + σ²), at every level."""
    time = torch.tensor(t, dtype=torch.float64)
    energy = Energy(MLP(2, 3, width=8, depth=1), schedule, 0.7, normalised=True).double()
    x, u = points()
    alpha, sigma = schedule(time)
    variance = 0.49 * alpha**2 + sigma**2
    law = MultivariateNormal(torch.zeros(2).double(), variance * torch.eye(2).double())
    assert torch.allclose(energy.log_prob(x, time, u), law.log_prob(x), rtol=1e-9, atol=1e-9)
    assert torch.allclose(energy.score(x, time, u), -x / variance, rtol=1e-9, atol=1e-9)


def test_the_normaliser_depends_on_condition_and_level_only() -> None:
    plain = random_energy(VP())
    energy = random_energy(VP(), normalised=True)
    energy.network.load_state_dict(plain.network.state_dict())
    assert energy.normaliser is not None
    nn.init.normal_(energy.normaliser[-1].weight)  # type: ignore[arg-type]
    x, u = points()
    z = {}
    for t in (0.2, 0.6):
        time = torch.tensor(t).double()
        gap = plain.log_prob(x, time, u) - energy.log_prob(x, time, u)
        z[t] = torch.stack([gap[k::3] for k in range(3)])  # (class, point)
        assert torch.allclose(z[t], z[t][:, :1].expand_as(z[t]), atol=1e-9)  # rounding
        assert torch.equal(plain.score(x, time, u), energy.score(x, time, u))
    assert (z[0.2][:, 0].diff().abs() > 1e-3).all() and (z[0.2] - z[0.6]).abs().min() > 1e-3
    # padding does not change it
    assert torch.equal(energy.log_prob(x, TIME, u.padded(2)), energy.log_prob(x, TIME, u))


def test_it_leaves_inference_mode_by_itself() -> None:
    energy = random_energy(VP())
    x, u = points()
    expected = energy.score(x, TIME, u)
    assert expected.requires_grad  # it can be trained
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            made = [v.clone() for v in (x, TIME, u)]  # all of it may have been made inside
            target = energy.at(made[1], made[2])
            log_p, score = target.log_prob_and_score(made[0])
            assert torch.equal(target.score(made[0]), expected)
            assert torch.equal(energy(*made), energy(x, TIME, u))
            assert torch.equal(target.log_prob(made[0]), log_p)
        assert torch.equal(score, expected)
        assert not score.requires_grad and not log_p.requires_grad


def test_one_pass_forward() -> None:
    energy, (x, u), calls = random_energy(VP()), points(), []
    energy.network.register_forward_hook(lambda *_: calls.append(1))
    energy.at(TIME, u).log_prob_and_score(x)
    assert len(calls) == 1
    guided = ClassifierFree(3.0)(energy, NULL)
    guided.at(TIME, u).log_prob_and_score(x)
    assert len(calls) == 2


def test_every_weight_is_trained() -> None:
    """Attention with masked tokens, modulation and skips included, in the type of training."""
    torch.manual_seed(0)
    settings = {"widths": (16, 16), "attention": (1,), "attend": (0, 1), "concat": 2, "patch": 1}
    network = UNet(1, 4, blocks=1, coordinates=True, **settings)  # type: ignore[arg-type]
    for p in network.parameters():  # those that begin at zero would hide others
        nn.init.normal_(p, std=0.1)
    noise = Noise("unet")
    x, tokens = noise.normal(torch.zeros(3, 1, 4, 4)), noise.normal(torch.zeros(3, 3, 4))
    tokens[1, 1:], tokens[2] = 0, 0  # padded, and null
    energy = Energy(network, Rectified())
    loss = DSM(UniformTime())(energy, x, Condition(tokens), noise).mean()
    loss.backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("make", [EDM, Flow])
def test_a_score_head_says_that_it_has_no_density(make: type[EDM] | type[Flow]) -> None:
    x, u = points()
    denoiser = make(MLP(2, 3, width=8, depth=1).double(), VP())
    for target in (denoiser.at(TIME, u), ClassifierFree(2.0)(denoiser, NULL).at(TIME, u)):
        with pytest.raises(NoDensity, match="score and no density; use pipeline.denoisers.Energy"):
            target.log_prob(x)
        with pytest.raises(UserError, match="MALA accepts or rejects .* energy head"):
            MALA(0.1).init(target, x)


KERNELS = [Metropolis(0.6), MALA(0.08), HMC(0.15, 4), NUTS(0.3)]


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("kernel", KERNELS, ids=named)
def test_kernels_run_on_it(kernel: Kernel, scale: float) -> None:
    """The last states of many chains have the moments of the law, or of p_∅^(1 − w) p_u^w."""
    chains, dim = 1500, 2
    means, covariances = MEANS.clone(), COVARIANCES.clone()
    means[2], covariances[2] = 0, 0.6 * torch.eye(dim)  # the null condition's, and wider
    schedule = VP()
    energy = normal_energy(schedule, TIME, means, covariances)
    null = one_hot(torch.tensor([2]), 3)
    u = one_hot(torch.zeros(chains, dtype=torch.long), 3)
    target = ClassifierFree(scale)(energy, null).at(TIME, u)
    precision = scale * covariances[0].inverse() + (1 - scale) * covariances[2].inverse()
    law = MultivariateNormal(
        torch.linalg.solve(precision, scale * covariances[0].inverse() @ means[0]),
        precision_matrix=precision,
    )
    noise = Noise("kernels", named(kernel))
    steps = {"Metropolis": 60, "MALA": 60, "HMC": 20, "NUTS": 12}[named(kernel)]
    with torch.inference_mode():
        state = kernel.init(target, noise.normal(torch.zeros(chains, dim, dtype=torch.float64)))
        for _ in range(steps):
            state, info = kernel.step(target, state, noise)
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(law.covariance_matrix), (state.x - law.mean).T, upper=False
    ).T
    # independent and standard normal: 4 standard errors of the mean and of the products
    assert (z.mean(dim=0).abs() < 4 / chains**0.5).all()
    products = z.T @ z / chains - torch.eye(dim)
    assert (products.abs() < 4 * math.sqrt(2 / chains)).all()


@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
def test_guided_log_prob(w: float) -> None:
    """(1 − w) log p_∅ + w log p_u, and its slope, of a network and of a known mixture."""
    x, u = points()
    mixture = GaussianMixture(MEANS, [0.3, 0.4, 0.5])
    for denoiser in (random_energy(VP()), ScoreDenoiser(mixture, VP())):
        guided = ClassifierFree(w)(denoiser, NULL).at(TIME, u)
        plain, free = denoiser.at(TIME, u), denoiser.at(TIME, NULL.expand(len(x)))
        expected = (1 - w) * free.log_prob(x) + w * plain.log_prob(x)
        assert torch.allclose(guided.log_prob(x), expected, rtol=1e-12, atol=1e-12)
        expected = (1 - w) * free.score(x) + w * plain.score(x)
        assert torch.allclose(guided.score(x), expected, rtol=1e-10, atol=1e-10)
        both = guided.log_prob_and_score(x)
        assert torch.equal(both[0], guided.log_prob(x)) and torch.equal(both[1], guided.score(x))


def test_a_diffusion_sampler_draws_from_it() -> None:
    """Picture noise, inference mode and weights that take no gradient: what `generate` has."""
    schedule = Rectified(1e-2)
    energy = random_energy(schedule).requires_grad_(False).eval()
    u, like = points()[1], torch.empty(12, 2, dtype=torch.float64)
    x = Heun(12)(energy, like, u, PictureNoise(range(12)))

    class Same(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                x_t = x_t.clone().requires_grad_()
                log_p = energy.log_prob(x_t, t.clone(), None if u is None else u.clone())
                alpha_t, sigma_t = schedule(t.clone())
                d = (x_t + sigma_t**2 * torch.autograd.grad(log_p.sum(), x_t)[0]) / alpha_t
            return d.detach()

    assert torch.equal(x, Heun(12)(Same(schedule), like, u, PictureNoise(range(12))))


def train(
    denoiser: Energy | EDM, objective: Objective, mixture: GaussianMixture, steps: int
) -> None:
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        noise = Noise("train", i)
        x, k = mixture.sample(noise, 512)
        loss = objective(denoiser, x.float(), Condition(torch.eye(3)[k][:, None]), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def test_it_learns_the_laws_of_all_levels(mixture: GaussianMixture) -> None:
    torch.manual_seed(0)
    schedule = Rectified(1e-3)
    energy = Energy(MLP(2, 3, width=64, depth=2), schedule, 0.7)
    train(energy, DSM(LogNormal((-0.8,), (1.2,))), mixture, 500)
    exact, errors, spreads = ScoreDenoiser(mixture, schedule), [], []
    for ratio in (0.1, 0.5, 2.0):
        t = schedule.time(torch.tensor(ratio))
        for k in range(3):
            noise = Noise("test", k)
            x = mixture.means[k] + mixture.stds[k] * noise.normal(torch.zeros(500, 2))
            alpha, sigma = schedule(t)
            x_t = (alpha * x + sigma * noise.normal(x)).float()
            u = Condition(torch.eye(3)[k].expand(500, 1, 3))
            with torch.no_grad():
                phi, learned = exact.score(x_t, t, u), energy.score(x_t, t, u)
                gap = energy.log_prob(x_t, t, u) - exact.log_prob(x_t, t, u)
            errors.append(((learned - phi).square().sum() / phi.square().sum()).item())
            spreads.append(gap.std().item())  # up to a constant
    # measured 0.007 and 0.07 at worst, of a score and of log-densities that vary by 1
    assert max(errors) < 0.03 and max(spreads) < 0.2


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from pipeline.condition import Condition
from pipeline.denoisers import EDM, Energy
from pipeline.errors import UserError
from pipeline.networks import MLP
from pipeline.noise import Noise
from pipeline.objectives import DSM, ScoreMatching, UniformTime
from pipeline.schedules import VP

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]),
                        world_size=2)
torch.manual_seed(0)
network = MLP(2, 3, width=16, depth=1)
torch.nn.init.normal_(network.output.weight, std=0.1)
x, t = torch.randn(8, 2), torch.tensor(0.3)
u = Condition(torch.eye(3)[torch.arange(8) % 3][:, None])
with torch.no_grad():
    whole = Energy(network, VP()).score(x, t, u)
fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
with torch.no_grad():
    torch.testing.assert_close(Energy(network, VP()).score(x, t, u), whole)
for denoiser, objective in ((Energy(network, VP()), DSM(UniformTime())),
                            (EDM(network, VP()), ScoreMatching())):
    try:
        objective(denoiser, x, u, Noise(0)).mean().backward()
        raise SystemExit("nothing was said")
    except UserError as error:
        print(error)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_weights_are_one_sentence(tmp_path: Path) -> None:
    """Two processes under FSDP2: drawing works, and training says why it does not."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "store")]
    pipe: Callable[[str], subprocess.Popen[str]] = lambda rank: subprocess.Popen(  # noqa: E731
        [*command, rank], env=environment, text=True, stdout=-1, stderr=-1
    )
    for process in [pipe("0"), pipe("1")]:
        said, failed = process.communicate(timeout=300)
        assert process.returncode == 0, failed
        assert said.count("sharded by FSDP2") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixture_energy", "mixture_nce"])
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    """The second backward pass and the normaliser under DDP."""
    weights = []
    for devices in ("1", "2"):
        run = tmp_path / devices
        command = [sys.executable, "-m", "pipeline", "fit", "--run", str(run)]
        command += ["-c", str(ROOT / f"conf/experiment/{name}.yaml"), *SMALL]
        command += ["--trainer.devices", devices, "--trainer.strategy", "ddp"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(run / "last.ckpt", weights_only=True)["state_dict"])
    for key, weight in weights[0].items():
        # sums of gradients in another order, after 6 steps of Adam: its step is near the learning
        # rate whatever the size of the gradient
        torch.testing.assert_close(weights[1][key], weight, rtol=1e-3, atol=2e-4)


SMALL = ["--data.rows", "512", "--data.val_rows", "64", "--data.batch_size", "64"]
SMALL += ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
SMALL += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]


def test_fit_then_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, its checkpoint and its averaged weights through the doors, validation included."""
    monkeypatch.delenv("PIPELINE_RUN", raising=False)
    run, out = tmp_path / "run", tmp_path / "out"
    file = str(ROOT / "conf/experiment/mixture_energy.yaml")
    assert main(["fit", "-c", file, "--run", str(run), *SMALL]) == 0
    assert main(["generate", "north-east", "--checkpoint", str(run), "--out", str(out)]) == 0
    assert (out / "samples.csv").is_file()
    generator = Generator.from_checkpoint(run / "last.ckpt")
    assert isinstance(generator.denoiser, Energy)
    u = generator.embed(["north-east", "south-west"])
    target = generator.denoiser.at(torch.tensor(0.2), u)
    state = MALA(0.01).init(target, torch.zeros(2, 2))
    state, info = MALA(0.01).step(target, state, Noise(0))
    assert state.x.isfinite().all() and state.log_prob.isfinite().all()


def test_validation_of_a_derivative_in_inference_mode(mixture: GaussianMixture) -> None:
    energy, (x, u) = random_energy(VP()), points()
    loss = ScoreMatching()(energy, x, u, Noise(0))
    with torch.inference_mode():
        inside, _ = ScoreMatching().validate(energy, x.clone(), u.clone(), Noise(0))
    assert torch.allclose(inside, loss, rtol=1e-12)
