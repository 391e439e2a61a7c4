"""Products of laws: how far from the exact one does each way draw?

The laws are mixtures whose score is known at every noise level, so that nothing is learned and
what is left is the way of drawing. A posterior of a mixture given some coordinates with noise is a
mixture; products, quotients and sums of classes are added up on a grid. The distance is the energy
distance between as many draws and exact ones (two exact sets of 500: within about 4 of 0).

DPS and ΠGDM, which are no part of the package, are written out here. The size of DPS's step is the
best of four.

With a model of conf/experiment/composition.yaml, trained on captions that say one of two objects:
how often do both stand where two such prompts together say, for pairs it never saw together? The
objects are read back from the pixels.

    python benchmarks/composition.py [--number 500]
    python benchmarks/composition.py --checkpoint runs/composition/TIME --number 64
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from lecture import energy_distance
from torch import Tensor
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.checkpoint import Checkpoint
from pipeline.composition import Composed, MomentMatching
from pipeline.condition import Condition, U
from pipeline.data import Relations
from pipeline.data.shapes import OPPOSITE, Pair
from pipeline.denoisers import Denoiser, Energy, ScoreDenoiser
from pipeline.evaluation.shapes import read
from pipeline.generator import Generator
from pipeline.mcmc import HMC, MALA, ULA, GaussianMixture, Measurement, Posterior, run
from pipeline.noise import Noise
from pipeline.png import contact_sheet
from pipeline.samplers import DDIM, AnnealedLangevin, Heun, PredictorCorrector, Sampler
from pipeline.schedules import VE

SCHEDULE = VE(0.01, 20.0)
SIDE, PART = 500, 50_000  # points on a side of the grid, and how many are computed at once


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


def on_grid(log_prob: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """Draws of a density of the plane, up to the width of a cell."""
    line = torch.linspace(-3, 3, SIDE).double()
    x = torch.cartesian_prod(line, line)
    p = torch.softmax(torch.cat([log_prob(part) for part in x.split(PART)]), dim=0)
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
        law_of_all = denoiser.at(torch.zeros(()).double(), first.expand(PART))
        truth = on_grid(law_of_all.log_prob, n)
        like = torch.empty(n, 2).double()
        drawn = [way(denoiser, like, first.expand(n), Noise("draw")) for way in ways.values()]
        cells = " | ".join(f"{1000 * energy_distance(x, truth):.1f}" for x in drawn)
        print(f"| {name} | {cells} |", flush=True)


def sides(picture: Tensor, relation: str) -> list[Tensor]:
    """The halves where the first object and the second are to be, each amid white (3, 32, 32)."""
    along = 2 if relation in ("left of", "right of") else 1
    halves = [half.contiguous() for half in picture.chunk(2, dim=along)]
    edges = (8, 8) if along == 2 else (0, 0, 8, 8)
    white = [pad(half, edges, value=255) for half in halves]
    return white if relation in ("left of", "above") else white[::-1]


def right(pictures: Tensor, pairs: Sequence[Pair]) -> str:
    """How often the first object is where and what it should be, the second, and both."""
    both = zip(pictures, pairs, strict=True)
    found = read(torch.stack([half for x, pair in both for half in sides(x, pair.relation)]))
    told = [one and one[:2] for one in found]
    good = [
        [told[2 * i] == p.first[:2], told[2 * i + 1] == p.second[:2]] for i, p in enumerate(pairs)
    ]
    each = torch.tensor(good).float()
    return " | ".join(f"{share:.2f}" for share in (*each.mean(dim=0), each.prod(dim=1).mean()))


def objects(checkpoint: str, n: int, out: str, draws: int = 4) -> None:
    """Pictures of n pairs that were never seen, from two prompts that say an object each."""
    generator = Generator.from_checkpoint(checkpoint)
    data, order = Checkpoint(checkpoint).data(Relations), np.random.default_rng(0)
    unseen = data.combinations("unseen")
    pairs = [unseen[k] for k in order.permutation(len(unseen))[:n]]
    exact = isinstance(generator.denoiser, Energy)
    ways: dict[str, Sampler] = {"Heun, 35": Heun(18, 5.0)}
    ways["DDPM, 100"] = DDIM(100, eta=1.0, rho=5.0)
    ways["predictor–corrector, Langevin, 150"] = PredictorCorrector(ULA(0.05), 2, 50)
    if exact:
        ways["predictor–corrector, MALA, 200"] = PredictorCorrector(MALA(0.05), 3, 50)
    print("| prompts | drawn by | first | second | both |\n|---|---|---|---|---|")
    true = torch.from_numpy(data.render(pairs, order))
    print(f"| | true pictures | {right(true, pairs)} |")
    shown = [(pair.caption, [true[i]]) for i, pair in enumerate(pairs[:8])]
    asked = {
        "the first alone": lambda p: (p._replace(second=None).caption, None),
        "both in one sentence": lambda p: (p.caption, None),
        "first AND second": lambda p: (
            p._replace(second=None).caption,
            Composed(also=[Pair(p.second, OPPOSITE[p.relation], None).caption]),
        ),
    }
    for name, prompts in asked.items():
        for way, generator.sampler in ways.items():
            rows = []
            for k, pair in enumerate(pairs):
                prompt, generator.guidance = prompts(pair)
                seeds = range(k * draws, (k + 1) * draws)
                rows += generator([prompt] * draws, seeds, micro_batch=draws)
            found = right(torch.cat(rows), [pair for pair in pairs for _ in range(draws)])
            print(f"| {name} | {way} | {found} |", flush=True)
            for i, (_, cells) in enumerate(shown):
                cells.append(torch.cat(rows)[i * draws])
            if name != "first AND second":
                break
    drawn = [f"AND, {way.split(', ')[-2]}" for way in ways]
    captions = ["", "the first alone", "in one sentence", *drawn]
    every = [cell for _, cells in shown for cell in cells]
    named = [s for said, _ in shown for s in (said, *captions[1:])]
    contact_sheet(torch.stack(every), named, columns=len(captions), side=64).save(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--part", default="posterior,composition")
    parser.add_argument("--checkpoint", help="a checkpoint or a run's folder: pairs of objects")
    parser.add_argument("--out", default="composition.png", help="a sheet of these")
    args = parser.parse_args()
    if args.checkpoint:
        return objects(args.checkpoint, args.number, args.out)
    torch.set_num_threads(1)
    for part in args.part.split(","):
        {"posterior": posteriors, "composition": compositions}[part](args.number)


if __name__ == "__main__":
    main()
