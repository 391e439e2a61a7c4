"""Contrastive divergence beside score matching and NCE: how near is the learned density?

A mixture of five classes in the plane, without conditions and of unequal weights, once with its
modes near each other and once far apart. One energy per objective, of one size, trained for the
same number of steps. The density at t = 0 is then added up on a grid, so that what is compared is
what was learned, and no sampler: the energy distance of exact draws to true points, the total
variation to the true density, and the masses of the modes (of the parts of the plane nearest to
each), ½ Σ |w − w_true|.

    python benchmarks/contrastive.py [--steps 1500] [--seeds 2] [--only CD-1,...] [--law near,far]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from lecture import energy_distance, show
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.denoisers import Energy
from pipeline.mcmc import MALA, GaussianMixture
from pipeline.networks import MLP
from pipeline.noise import Noise
from pipeline.objectives import (
    DSM,
    NCE,
    ConditionalNCE,
    ContrastiveDivergence,
    LogNormal,
    Objective,
    ScoreMatching,
)
from pipeline.schedules import VE

STDS, WEIGHTS = [0.08, 0.12, 0.16, 0.2, 0.24], [0.3, 0.25, 0.2, 0.15, 0.1]
BATCH, RADII = 128, {"near": 0.8, "far": 2.0}


def law(radius: float) -> GaussianMixture:
    angles = torch.arange(5) * (2 * torch.pi / 5)
    means = radius * torch.stack((angles.cos(), angles.sin()), dim=1)
    return GaussianMixture(means, STDS, WEIGHTS)


def objectives(std: float) -> dict[str, tuple[Objective, str]]:
    """Each with what a step costs, in evaluations of the network for each row of the batch."""

    def divergence(updates: int, restart: float) -> tuple[Objective, str]:
        how = ContrastiveDivergence(MALA(0.01), updates, restart)
        return how, f"{updates + 1} for the chain, 2 trained"

    levels = LogNormal([-1.2, 0.0], [1.2, 1.2])
    return {
        "DSM at all levels": (DSM(levels), "1, differentiated twice"),
        "score matching": (ScoreMatching(), "1, differentiated twice, 2 times over"),
        "NCE": (NCE(GaussianMixture([[0.0, 0.0]], [1.2 * std])), "2 trained"),
        "conditional NCE": (ConditionalNCE(0.3), "2 trained"),
        "CD-1": divergence(1, 1.0),
        "CD-10": divergence(10, 1.0),
        "PCD-1": divergence(1, 0.0),
        "PCD-10": divergence(10, 0.0),
        "PCD-10 and 5 % anew": divergence(10, 0.05),
    }


def train(mixture: GaussianMixture, objective: Objective, std: float, seed: int, steps: int):  # noqa: ANN201
    """The energy after so many steps, and the seconds of one."""
    torch.manual_seed(seed)
    energy = Energy(MLP(2, 0, 128), VE(0.05, 20.0), std, normalised=isinstance(objective, NCE))
    average = Energy(MLP(2, 0, 128), VE(0.05, 20.0), std, normalised=isinstance(objective, NCE))
    optimizer = torch.optim.AdamW(energy.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    start = time.process_time()
    for step in range(steps):
        noise = Noise("train", seed, step)
        x, _ = mixture.sample(noise, BATCH)
        loss = objective(energy, x, None, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(energy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            pairs = list(average.parameters()), list(energy.parameters())
            torch._foreach_lerp_(*pairs, max(0.01, 9 / (10 + step)))  # type: ignore[operator]
    return average.eval().requires_grad_(False), (time.process_time() - start) / steps


def judge(energy: Energy, mixture: GaussianMixture, seed: int) -> list[float]:
    """Energy distance, total variation, and the error of the weights of the modes."""
    side, n = 3.0 * mixture.means.abs().max().item(), 400
    line = (torch.arange(n) + 0.5) * (2 * side / n) - side
    x = torch.cartesian_prod(line, line)
    t = torch.zeros(())
    log_p = torch.cat([energy.log_prob(part, t) for part in x.split(50_000)])
    p, true = torch.softmax(log_p.double(), 0), torch.softmax(mixture.log_prob(x).double(), 0)
    noise = Noise("judge", seed)
    k = torch.searchsorted(p.cumsum(0), noise.uniform(2000).double()).clamp(max=len(p) - 1)
    width = line[1] - line[0]
    drawn = x[k] + width * torch.stack([noise.uniform(2000) - 0.5 for _ in range(2)], dim=1)
    mode = torch.cdist(x, mixture.means).argmin(dim=1)

    def weights(q: Tensor) -> Tensor:
        return torch.bincount(mode, q, minlength=5)

    distance = energy_distance(drawn, mixture.draw(noise, 2000))
    off = (weights(p) - weights(true)).abs().sum() / 2
    return [distance, (p - true).abs().sum().item() / 2, off.item()]


def main() -> None:
    how = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help="some of the objectives, with commas between")
    parser.add_argument("--law", default="near,far")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.law.split(","):
        mixture = law(RADII[name])
        std = mixture.draw(Noise("std"), 20_000).std().item()
        print(f"\n{name} modes\n")
        print(
            "| objective | evaluations a step | ms a step | distance × 1000 | variation | mass |"
        )
        print("|---|---|---|---|---|---|")
        for title, (objective, cost) in objectives(std).items():
            if args.only and title not in args.only.split(","):
                continue
            rows, taken = [], 0.0
            for seed in range(args.seeds):
                objective.load({})  # its chains begin anew
                energy, taken = train(mixture, objective, std, seed, args.steps)
                rows.append(judge(energy, mixture, seed))
            each = torch.tensor(rows).T
            distance = show(each[0]) if args.seeds > 1 else f"{1000 * each[0, 0]:.1f}"
            parts = [distance, *(f"{v.mean():.3f}" for v in each[1:])]
            print(f"| {title} | {cost} | {1000 * taken:.1f} | {' | '.join(parts)} |", flush=True)


if __name__ == "__main__":
    main()
