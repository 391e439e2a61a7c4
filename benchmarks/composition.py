"""Products of laws: how far from the exact one does each way draw?

The laws are mixtures whose score is known at every noise level, so that nothing is learned and
what is left is the way of drawing. A posterior of a mixture given some coordinates with noise is a
mixture; products, quotients and sums of classes are added up on a grid. The distance is the energy
distance between as many draws and exact ones (two exact sets of 500: within about 4 of 0).

DPS and ΠGDM, which are no part of the package, are written out here. The size of DPS's step is the
best of four.

    python benchmarks/composition.py [--number 500]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from lecture import energy_distance
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.composition import Composed, MomentMatching
from pipeline.condition import Condition, U
from pipeline.denoisers import Denoiser, ScoreDenoiser
from pipeline.mcmc import HMC, MALA, GaussianMixture, Measurement, Posterior, run
from pipeline.noise import Noise
from pipeline.samplers import DDIM, AnnealedLangevin, Heun, PredictorCorrector
from pipeline.schedules import VE

SCHEDULE = VE(0.01, 20.0)


class Rival(Denoiser):
    """DPS (Chung et al., 2023), algorithm 1, its step in proportion to the noise ratio; ΠGDM (Song
    et al., 2023), equation (7), with r² = s² σ_d² / (s² + σ_d²).
    """

    def __init__(self, law: Denoiser, y: Measurement, std: float, zeta: float = 0.0) -> None:
        super().__init__(law.schedule)
        self.law, self.y, self.std, self.zeta = law, y, std, zeta

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x, s = x_t.clone().requires_grad_(), self.schedule.ratio(t.clone())
            d = self.law(x, t.clone(), u)
            r = self.y.residual(d.detach())
            if self.zeta:
                r = self.zeta / s * r / r.norm(dim=1, keepdim=True).clamp(min=1e-9)
            else:
                r = r / (self.y.noise**2 + s**2 * self.std**2 / (s**2 + self.std**2))
            (slope,) = torch.autograd.grad(d, x, self.y.back(r, 1))
        return d.detach() + s**2 * slope  # of variance exploding, α = 1


def exact(law: GaussianMixture, y: Tensor, noise: float, n: int) -> Tensor:
    """Draws of the mixture that the posterior is."""
    known, s = ~y.isnan(), law.stds[:, None] ** 2
    total, r = s + noise**2, y.nan_to_num(0) - law.means
    log_w = law.weights.log() - (r**2 / total + total.log())[:, known].sum(dim=1) / 2
    means = torch.where(known, law.means + s / total * r, law.means)
    stds = torch.where(known, s * noise**2 / total, s).sqrt()
    edges = torch.softmax(log_w, 0).cumsum(0)[:-1].contiguous()
    k = torch.bucketize(Noise("exact").uniform(n).double(), edges, right=True)
    return means[k] + stds[k] * Noise("truth").normal(means[k])


def posteriors(n: int) -> None:
    means = torch.tensor(
        [[-0.7, -0.3, 0.4], [0.6, -0.4, -0.2], [0.1, 0.8, 0.0], [0.5, 0.5, -0.8]]
    ).double()
    four = GaussianMixture(means, [0.15, 0.25, 0.1, 0.3], [0.4, 0.3, 0.2, 0.1])
    laws = {"one Gaussian": GaussianMixture(means[:1], [0.5]), "four": four}
    nan = torch.nan
    cases = [([0.2, nan, nan], 0.1), ([0.2, 0.1, nan], 0.3)]
    print("| law | y, noise | DPS | ΠGDM | moment matching, 1 iteration | 3 | MALA |")
    print("|---|---|---|---|---|---|---|")
    for name, law in laws.items():
        for known, noise in cases:
            y = torch.tensor(known).double()
            truth, denoiser = exact(law, y, noise, n), ScoreDenoiser(law, SCHEDULE)
            measured, std = Measurement(y, noise), law.draw(Noise("std"), 5000).std().item()
            sizes = (1.0, 2.0, 4.0, 8.0)
            rivals = [[Rival(denoiser, measured, std, zeta) for zeta in sizes]]
            rivals += [[Rival(denoiser, measured, std)]]
            rivals += [[MomentMatching(y, noise, k)(denoiser, None)] for k in (1, 3)]
            found = []
            for ways in rivals:
                like = torch.empty(n, 3).double()
                drawn = [DDIM(50, eta=1.0)(way, like, None, Noise("draw")) for way in ways]
                found.append(min(energy_distance(x, truth) for x in drawn if x.isfinite().all()))
            start = law.draw(Noise("start"), n)
            chains = run(Posterior(law, y, noise), MALA(0.1), start, 1, 200, Noise("chains")).x[-1]
            found.append(energy_distance(chains, truth))
            cells = " | ".join(f"{1000 * one:.1f}" for one in found)
            print(f"| {name} | {known}, {noise} | {cells} |", flush=True)


def on_grid(log_prob: Callable[[Tensor], Tensor], n: int, side: int = 500) -> Tensor:
    """Draws of a density of the plane, up to the width of a cell."""
    line = torch.linspace(-3, 3, side).double()
    x = torch.cartesian_prod(line, line)
    p = torch.softmax(torch.cat([log_prob(part) for part in x.split(100_000)]), dim=0)
    noise = Noise("grid")
    k = torch.searchsorted(p.cumsum(0), noise.uniform(n).double()).clamp(max=len(p) - 1)
    cell = torch.stack([noise.uniform(n).double() - 0.5 for _ in range(2)], dim=1)
    return x[k] + (line[1] - line[0]) * cell


def compositions(n: int) -> None:
    means = torch.tensor([[-0.5, 0.0], [0.5, 0.2], [0.0, 0.0]]).double()
    law = GaussianMixture(means, [0.3, 0.4, 1.0], [0.3, 0.3, 0.4])
    tokens = torch.eye(3).double()[:, None]
    null, first = torch.zeros(1, 1, 3).double(), Condition(tokens[:1])
    cases = {
        "first AND second": (Composed(also=["2"]), tokens[1:2]),
        "first AND second AND third": (Composed(also=["2", "3"]), tokens[1:]),
        "first AND NOT third": (Composed(without=["3"]), tokens[2:]),
        "first OR second": (Composed(either=["2"]), tokens[1:2]),
    }
    ways = {
        "DDPM, 200": DDIM(200, eta=1.0),
        "Heun, 199": Heun(100),
        "predictor–corrector, MALA, 196": PredictorCorrector(MALA(0.3), 1, 66),
        "annealed MALA, 400": AnnealedLangevin(MALA(0.5), 9, 40, denoise=False),
        "annealed HMC, 440": AnnealedLangevin(HMC(0.5, 5, 0.5), 2, 40, denoise=False),
    }
    print(f"\n| law | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for name, (guidance, others) in cases.items():
        denoiser = guidance(ScoreDenoiser(law, SCHEDULE), Condition(torch.cat((null, others))))
        law_of_all = denoiser.at(torch.zeros(()).double(), first.expand(100_000))
        truth = on_grid(law_of_all.log_prob, n)
        like = torch.empty(n, 2).double()
        drawn = [way(denoiser, like, first.expand(n), Noise("draw")) for way in ways.values()]
        cells = " | ".join(f"{1000 * energy_distance(x, truth):.1f}" for x in drawn)
        print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--part", default="posterior,composition")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.part.split(","):
        {"posterior": posteriors, "composition": compositions}[part](args.number)


if __name__ == "__main__":
    main()
