"""The lecture's ladder: from one noisy score to diffusion, at one cost.

Two laws, a mixture of five classes in the plane and small real images of ten (handwritten digits,
8×8, of scikit-learn), each learned by one kind of network per objective with one budget of steps,
from several seeds; then every way to draw from what was learned, with the same number of
evaluations of the network. What has a step size is tuned on the network of the first seed, with
noise of its own. The distance to the truth is the energy distance between drawn and held-out
points of one class, averaged over classes,

    2 E|X − Y| − E|X − X'| − E|Y − Y'|,

unbiased, 0 for one law. Each seed's network draws once: the error bar is the standard error over
seeds, of training and drawing both.

    python benchmarks/lecture.py [--steps 1200] [--evaluations 200] [--seeds 3] [--out docs]

It prints the tables and writes them into OUT/lecture.md, between its marks, with the figures
beside it.
"""

import argparse
import copy
import functools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.condition import Condition
from pipeline.denoisers import EDM, Denoiser, Energy, Preconditioned, ScoreDenoiser
from pipeline.mcmc import MALA, ULA, HalfDenoising, Kernel
from pipeline.mcmc.targets import GaussianMixture
from pipeline.networks import MLP
from pipeline.noise import Noise
from pipeline.objectives import DSM, NCE, LogNormal, Objective, OneLevelDSM
from pipeline.samplers import (
    DDIM,
    AnnealedLangevin,
    Heun,
    Langevin,
    PredictorCorrector,
    Sampler,
)
from pipeline.schedules import VE

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

SHOWN = (
    "Langevin at",
    "half",
    "annealed Langevin, then",
    "Heun",
)  # the rungs of the figure begin with this
# the step sizes tried, in units of the squared noise ratio: at a very small one the law is wide
SIZES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
WIDE = (0.2, 0.8, 3.0, 12.0, 50.0, 200.0, 800.0)


@dataclass
class Data:
    """A law to learn: points to train on and points held out, with their classes."""

    name: str
    x: Tensor  # (N, D)
    k: Tensor  # (N,)
    truth: list[Tensor]  # of each class, held out
    std: float
    moderate: float  # a moderate noise ratio, and a very small one
    small: float
    width: int

    def u(self, k: Tensor) -> Condition:
        return Condition(torch.eye(len(self.truth))[k][:, None])  # (B, 1, K)


@functools.cache
def mixture() -> Data:
    angles = torch.arange(5) * (2 * math.pi / 5)
    means = 0.8 * torch.stack((angles.cos(), angles.sin()), dim=1)
    law = GaussianMixture(means, [0.08, 0.12, 0.16, 0.2, 0.24])
    (x, k), (held, k_held) = law.sample(Noise("train"), 20000), law.sample(Noise("held"), 5000)
    truth = [held[k_held == c][:300] for c in range(5)]
    return Data("mixture", x, k, truth, std=0.6, moderate=0.2, small=0.01, width=128)


@functools.cache
def digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "The digits come with scikit-learn: `make setup`, or install it."
        ) from None
    pictures, labels = load_digits(return_X_y=True)
    x, k = torch.tensor(pictures / 8 - 1, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held = order[:1000], order[1000:]
    truth = [x[held][k[held] == c] for c in range(10)]
    return Data("digits", x[train], k[train], truth, std=0.75, moderate=0.4, small=0.02, width=256)


def networks(data: Data) -> dict[str, tuple[Callable[[], Preconditioned], Objective]]:
    """One network per objective: all of one size, and the energies of one class."""
    schedule = VE(0.999 * data.small, 20.0)

    def network() -> MLP:
        return MLP(data.x.shape[1], len(data.truth), data.width)

    def score() -> Preconditioned:
        return EDM(network(), schedule, data.std)

    def energy() -> Preconditioned:
        return Energy(network(), schedule, data.std, normalised=True)

    mean, std = data.x.mean(dim=0), data.x.std().item()
    contrast = GaussianMixture(mean[None], [1.2 * std])
    levels = LogNormal([math.log(data.std) - 1.2, math.log(data.std)], [1.2, 1.2])
    return {
        "moderate": (score, OneLevelDSM(data.moderate)),
        "small": (score, OneLevelDSM(data.small)),
        "levels": (score, DSM(levels)),
        "energy": (energy, DSM(levels)),
        "nce": (energy, NCE(contrast, draws=1)),
    }


def train(law: Callable[[], Data], name: str, seed: int, steps: int) -> Denoiser:
    """The averaged denoiser of a law after a number of steps on batches of 128."""
    data = law()
    make, objective = networks(data)[name]
    torch.manual_seed(seed)
    denoiser = make()
    average = copy.deepcopy(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    for step in range(steps):
        noise = Noise("train", seed, step)
        rows = (noise.uniform(128) * len(data.x)).long()
        loss = objective(denoiser, data.x[rows], data.u(data.k[rows]), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            pairs = list(average.parameters()), list(denoiser.parameters())
            torch._foreach_lerp_(*pairs, max(0.01, 9 / (10 + step)))  # type: ignore[operator]
    return average.eval().requires_grad_(False)


@dataclass
class Rung:
    """A way to draw: a sampler over one of the networks, of one step size where it has one."""

    name: str
    network: str
    make: Callable[[float], Sampler]
    sizes: tuple[float, ...] = SIZES


def ladder(data: Data, n: int) -> list[Rung]:
    """The rungs, each of n evaluations of the network or as near below as its steps allow."""
    m, s, std = data.moderate, data.small, data.std

    def langevin(kernel: Callable[[float], Kernel], ratio: float) -> Callable[[float], Sampler]:
        return lambda mu: Langevin(kernel(mu), [ratio], n, start=std)

    return [
        Rung(f"Langevin at noise {m}", "moderate", langevin(ULA, m)),
        Rung(f"Langevin at noise {s}", "small", langevin(ULA, s), WIDE),
        Rung(
            f"half-denoising at {m}",
            "moderate",
            lambda _: Langevin(HalfDenoising(1.0), [m], n, start=std),
            sizes=(),
        ),
        Rung(
            f"extrapolated from {m}, {m / 2}",
            "levels",
            lambda mu: Langevin(ULA(mu), [m, m / 2], n // 2, start=std),
        ),
        Rung(
            f"extrapolated from {m}, {m / 2}, {m / 4}",
            "levels",
            lambda mu: Langevin(ULA(mu), [m, m / 2, m / 4], n // 3, start=std),
        ),
        Rung(
            "annealed Langevin",
            "levels",
            lambda mu: AnnealedLangevin(ULA(mu), 10, n // 10, denoise=False),
        ),
        Rung(
            "annealed Langevin, then D",
            "levels",
            lambda mu: AnnealedLangevin(ULA(mu), 10, n // 10 - 1, denoise=True),
        ),
        Rung(
            "predictor–corrector, ULA",
            "levels",
            lambda mu: PredictorCorrector(ULA(mu), 1, n // 2),
        ),
        Rung("DDPM", "levels", lambda _: DDIM(n, eta=1.0), sizes=()),
        Rung("Heun", "levels", lambda _: Heun(n // 2), sizes=()),
        Rung(f"energy by NCE, ULA at {s}", "nce", langevin(ULA, s), WIDE),
        Rung(f"energy by NCE, MALA at {s}", "nce", langevin(MALA, s), WIDE),
        Rung(f"energy by DSM, ULA at {s}", "energy", langevin(ULA, s), WIDE),
        Rung(f"energy by DSM, MALA at {s}", "energy", langevin(MALA, s), WIDE),
        Rung(
            "energy by DSM, annealed ULA",
            "energy",
            lambda mu: AnnealedLangevin(ULA(mu), 10, n // 10, denoise=False),
        ),
        Rung(
            "energy by DSM, annealed MALA",
            "energy",
            lambda mu: AnnealedLangevin(MALA(mu), 10, n // 11, denoise=False),
        ),
        Rung(
            "energy by DSM, predictor–corrector, MALA",
            "energy",
            lambda mu: PredictorCorrector(MALA(mu), 1, n // 3),
        ),
    ]


def energy_distance(a: Tensor, b: Tensor) -> float:
    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


def distance(x: Tensor, k: Tensor, truth: list[Tensor]) -> float:
    """The energy distance to the truth, averaged over classes."""
    parts = [energy_distance(x[k == c], exact) for c, exact in enumerate(truth)]
    return sum(parts) / len(parts)


def draw(
    sampler: Sampler, denoiser: Denoiser, data: Data, each: int, key: str, number: int
) -> tuple[Tensor, Tensor, float | None]:
    """`each` points of every class, their classes, and the mean acceptance."""
    k = torch.arange(len(data.truth)).repeat_interleave(each)
    accepted: list[Tensor] = []

    def note(state: object) -> None:
        acceptance = getattr(state, "acceptance", None)
        if acceptance is not None:
            accepted.append(acceptance.mean())

    like = torch.empty(len(k), data.x.shape[1])
    x = sampler(denoiser, like, data.u(k), Noise(key, number), note)
    return x, k, torch.stack(accepted).mean().item() if accepted else None


@dataclass
class Climbed:
    """What came of a rung: its line of the table, its draws, the step size that was chosen."""

    line: str
    x: Tensor
    size: float


def climb(law: Callable[[], Data], rung: int, n: int, learned: list[Denoiser]) -> Climbed:
    """Draw by one rung with the network of each seed."""
    data = law()
    way, size = ladder(data, n)[rung], 0.0
    each = min(len(t) for t in data.truth)
    if way.sizes:
        tried = {}
        for mu in way.sizes:
            x, k, _ = draw(way.make(mu), learned[0], data, max(each // 3, 20), "tune", 0)
            tried[mu] = distance(x, k, data.truth) if x.isfinite().all() else math.inf
        size = min(tried, key=lambda mu: tried[mu])
    sampler = way.make(size)
    found = [draw(sampler, one, data, each, "draw", i) for i, one in enumerate(learned)]
    distances = torch.tensor([distance(x, k, data.truth) for x, k, _ in found])
    rate, step = found[0][2], str(size) if way.sizes else ""
    line = (
        f"| {way.name} | {sampler.evaluations} | {step} | {show(distances)} "
        f"| {'' if rate is None else f'{rate:.2f}'} |"
    )
    return Climbed(line, found[0][0], size)


def floor(data: Data, seeds: int) -> str:
    """The line of the table for true points."""
    halves = [
        [t[Noise("half", i).normal(t[:, 0]).argsort()].chunk(2) for t in data.truth]
        for i in range(seeds)
    ]
    found = torch.tensor([[energy_distance(a, b) for a, b in half] for half in halves])
    return f"| true points, one half against the other | | | {show(found.mean(dim=1))} | |"


def show(values: Tensor) -> str:
    """Mean and standard error, in thousandths."""
    mean, error = 1000 * values.mean(), 1000 * values.std() / len(values) ** 0.5
    return f"{mean:.2f} ± {error:.2f}"


def known() -> list[str]:
    """Stationary variances on N(0, 1), whose score is known: the two biases apart."""
    law = ScoreDenoiser(GaussianMixture([[0.0]], [1.0]), VE(5e-4, 10.0))
    n, steps, mu = 40000, 200, 0.5
    like = torch.empty(n, 1, dtype=torch.float64)
    near = 1e-3  # the noise ratio that stands for none
    ways = {
        "clean score": (Langevin(ULA(mu * (0.5 / near) ** 2), [near], steps, 1.0), 1.0667),
        "Langevin, noisy score at 0.5": (Langevin(ULA(mu), [0.5], steps, 1.0), 1.3158),
        "half-denoising": (Langevin(HalfDenoising(1.0), [0.5], steps, 1.0), 1.0658),
        "extrapolated from 0.5 and 1": (Langevin(ULA(mu), [0.5, 1.0], steps, 1.0), 1.1773),
    }
    lines = ["| way | variance by theory | drawn |", "|---|---|---|"]
    for name, (sampler, exact) in ways.items():
        variance = sampler(law, like, None, Noise("known", name)).var().item()
        lines.append(f"| {name} | {exact:.4f} | {variance:.4f} ± {exact * (2 / n) ** 0.5:.4f} |")
    return lines


def starts(data: Data, models: dict[str, Denoiser], rungs: list[tuple[Rung, float]]) -> Figure:
    """The lecture's figure: a row is a starting point, a column an iteration."""
    columns, k = 9, torch.tensor([0, 3, 5, 8])
    size = (columns, 5.0 * len(rungs))
    figure, axes = plt.subplots(len(rungs) * len(k), columns, figsize=size)
    for r, (rung, step) in enumerate(rungs):
        sampler, denoiser = rung.make(step), models[rung.network]
        seen = watch(sampler, denoiser, data, k)
        if isinstance(sampler, Langevin):
            shown = [min(at, len(seen) - 1) for at in (0, 1, 2, 5, 10, 20, 50, 100, len(seen))]
        else:
            shown = torch.linspace(0, len(seen) - 1, columns).round().int().tolist()
        for c, at in enumerate(shown):
            for i in range(len(k)):
                axis = axes[r * len(k) + i, c]
                axis.imshow(seen[at][i].reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
                axis.set_axis_off()
                if i == 0:
                    name = f"{rung.name}\n" if c == 0 else ""
                    axis.set_title(f"{name}{at}", fontsize=8, loc="left")
    figure.subplots_adjust(hspace=0.45)
    return figure


def watch(sampler: Sampler, denoiser: Denoiser, data: Data, k: Tensor) -> list[Tensor]:
    """Where a draw stands at first and after each step, noise shrunk to the scale of the data."""
    like = torch.empty(len(k), data.x.shape[1])
    seen = [data.std * Noise("starts").normal(like)]
    sampler(denoiser, like, data.u(k), Noise("starts"), lambda state: seen.append(state.x))
    if not isinstance(sampler, Langevin):
        after = denoiser.schedule.ratio(sampler.grid(denoiser.schedule))[1:].tolist()
        for i, ratio in enumerate(after, start=1):  # the last is drawn, and is left as it is
            seen[i] = seen[i] * data.std / math.hypot(data.std, ratio)
    return seen


def clouds(data: Data, drawn: dict[str, Tensor]) -> Figure:
    """What each rung drew in the plane, over the truth."""
    columns = 5
    rows = -(-(len(drawn) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.4 * rows))
    truth = torch.cat([t[:300] for t in data.truth])
    for axis, (name, x) in zip(axes.flat, {"the law": truth, **drawn}.items(), strict=False):
        axis.scatter(*x.T, s=1, alpha=0.4, color="black" if name == "the law" else "tab:blue")
        axis.set_title(name.replace(", predictor", ",\npredictor"), fontsize=7)
    for axis in axes.flat:
        axis.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[], aspect="equal")
    return figure


def write(file: Path, name: str, lines: list[str]) -> None:
    """Put a table between its two marks in a page."""
    text, mark = file.read_text("utf-8"), f"<!-- {name} -->"
    before, _, rest = text.partition(mark)
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise SystemExit(f"{file} has no marks {mark} and <!-- end --> to write between.")
    file.write_text("\n".join([before + mark, *lines, "", end + after]), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="of training, for each network")
    parser.add_argument("--evaluations", type=int, default=200, help="of the network, for a draw")
    parser.add_argument("--seeds", type=int, default=3, help="networks learned, each to draw once")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where lecture.md is")
    args = parser.parse_args()
    start, page = time.perf_counter(), args.out / "lecture.md"
    write(page, "known", known())
    laws, names, seeds = (mixture, digits), list(networks(mixture())), range(args.seeds)
    # a core for each network: they are too small to share one among threads
    with ProcessPoolExecutor(
        os.cpu_count(),
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        waiting = {
            (law, name, seed): pool.submit(train, law, name, seed, args.steps)
            for law in laws[::-1]  # the longer first
            for name in names
            for seed in seeds
        }
        with tqdm(total=len(waiting), desc="Networks", mininterval=5) as bar:
            for one in waiting.values():
                one.add_done_callback(lambda _: bar.update())
            models = {key: one.result() for key, one in waiting.items()}
        climbing = {
            law: [
                pool.submit(
                    climb, law, i, args.evaluations, [models[law, rung.network, k] for k in seeds]
                )
                for i, rung in enumerate(ladder(law(), args.evaluations))
            ]
            for law in laws
        }
        with tqdm(total=sum(map(len, climbing.values())), desc="Rungs", mininterval=5) as bar:
            for one in (one for some in climbing.values() for one in some):
                one.add_done_callback(lambda _: bar.update())
            climbed = {law: [one.result() for one in some] for law, some in climbing.items()}
    for law, found in climbed.items():
        data, rungs = law(), ladder(law(), args.evaluations)
        lines = ["| way | evaluations | step size | distance × 1000 | acceptance |"]
        lines += ["|---|---|---|---|---|", floor(data, args.seeds)]
        write(page, data.name, lines + [one.line for one in found])
        if law is mixture:
            figure = clouds(data, {r.name: one.x for r, one in zip(rungs, found, strict=True)})
        else:
            shown = [
                (rung, one.size)
                for rung, one in zip(rungs, found, strict=True)
                if rung.name.startswith(SHOWN)
            ]
            figure = starts(data, {name: models[law, name, 0] for name in names}, shown)
        figure.savefig(args.out / f"lecture_{data.name}.png", dpi=100, bbox_inches="tight")
    print(f"{time.perf_counter() - start:.0f} s; written to {page}")


if __name__ == "__main__":
    main()
