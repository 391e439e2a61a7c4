"""What our kernels cost beside a bare loop, and what they reach beside other libraries.

Two Gaussians in 100 dimensions, 16 chains, one core, float32. On the first (any covariance), ULA
and MALA against a bare torch loop of the same mathematics, in alternating blocks, and against
torchebm's Langevin dynamics. On the second (standard deviations from 0.1 to 10, so a condition
number of 1e4), NUTS against pyro's and blackjax's, all adapting step size and diagonal mass in the
warm-up; on that of unit variance HMC, ten steps of 0.2, against blackjax's. Ours as it is, and
compiled. Effective sample sizes are the least over the coordinates, computed alike for all; the
gradients counted are those of every chain, of chains that wait for others too.

    pip install torchebm pyro-ppl blackjax
    python benchmarks/mcmc.py [--draws 1000] [--warmup 500] [--pyro-chains 2]

A library that is missing is skipped, and the table says so. pyro runs its chains one after the
other: a few are run, and the figure of 16 follows, its draws and its seconds growing alike.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for every library

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from aims import aim

from pipeline.mcmc import HMC, MALA, NUTS, ULA, Gaussian, Kernel, run
from pipeline.mcmc.diagnostics import Summary, summarise
from pipeline.noise import Noise

CHAINS, DIM = 16, 100
MU = {"ULA": 0.05, "MALA": 0.05}


def dense() -> Gaussian:
    """A Gaussian with a full covariance, eigenvalues from 0.5 to 2."""
    basis = torch.linalg.qr(Noise("basis").normal(torch.empty(DIM, DIM, dtype=torch.float64)))[0]
    covariance = basis * torch.logspace(-0.3, 0.3, DIM, dtype=torch.float64) @ basis.mT
    return Gaussian(torch.zeros(DIM), ((covariance + covariance.mT) / 2).float())


# One step against a bare loop --------------------------------------------------------------------


def bare_ula(target: Gaussian, x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    mean, precision, mu = target.mean, target.precision, MU["ULA"]
    path = []
    for _ in range(steps):
        score = (mean - x) @ precision
        x = x + mu * score + (2 * mu) ** 0.5 * torch.randn(x.shape, generator=generator)
        path.append(x)
    return torch.stack(path)


def bare_mala(target: Gaussian, x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    mean, precision, mu = target.mean, target.precision, MU["MALA"]

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        offset = mean - x
        score = offset @ precision
        return -0.5 * (offset * score).sum(dim=1), score

    path, acceptances = [], []
    log_prob, score = both(x)
    for _ in range(steps):
        n = torch.randn(x.shape, generator=generator)
        y = x + mu * score + (2 * mu) ** 0.5 * n
        log_prob_y, score_y = both(y)
        back = x - y - mu * score_y
        log_ratio = (
            log_prob_y - log_prob + 0.5 * (n * n).sum(dim=1) - (back * back).sum(dim=1) / (4 * mu)
        )
        acceptance = log_ratio.clamp(max=0).exp()
        accepted = torch.rand(len(x), generator=generator) < acceptance
        row = accepted[:, None]
        x, score = torch.where(row, y, x), torch.where(row, score_y, score)
        log_prob = torch.where(accepted, log_prob_y, log_prob)
        path.append(x)
        acceptances.append(acceptance)
    torch.stack(acceptances)
    return torch.stack(path)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def steps(blocks: int, length: int) -> Iterator[str]:
    """Microseconds of one step of 16 chains, ours and bare, medians of alternating blocks."""
    target, generator = dense(), torch.Generator().manual_seed(0)
    x = target.draw(Noise("start"), CHAINS)
    for kernel, bare in ((ULA(MU["ULA"]), bare_ula), (MALA(MU["MALA"]), bare_mala)):
        noise, name = Noise("steps"), type(kernel).__name__

        def ours(kernel: Kernel = kernel, noise: Noise = noise) -> None:
            run(target, kernel, x, length, 0, noise)

        pairs = [
            (seconds(ours), seconds(lambda bare=bare: bare(target, x, length, generator)))
            for _ in range(blocks + 1)
        ][1:]
        micro = [1e6 * statistics.median(times) / length for times in zip(*pairs, strict=True)]
        ratio = statistics.median(a / b for a, b in pairs)
        times = f"{micro[0]:.1f} µs / {micro[1]:.1f} µs"
        yield f"| {name}, ours / a bare loop | {times} | {ratio:.3f} |"
        if name == "ULA":
            yield torchebm_row(target, x, length, blocks, micro[0])


def torchebm_row(target: Gaussian, x: Tensor, length: int, blocks: int, ours: float) -> str:
    try:
        from torchebm.core import GaussianModel
        from torchebm.samplers import LangevinDynamics
    except ImportError as error:
        return f"| ULA, torchebm | skipped: {error} | |"
    with torch.inference_mode(False):
        model = GaussianModel(mean=target.mean.clone(), cov=target.covariance.clone())
        sampler, start = LangevinDynamics(model, step_size=MU["ULA"]), x.clone()
        times = [
            seconds(lambda: sampler.sample(start, n_steps=length, return_trajectory=True))
            for _ in range(blocks)
        ]
    micro = 1e6 * statistics.median(times) / length
    return f"| ULA, torchebm | {micro:.1f} µs | ours takes {ours / micro:.2f} of it |"


# NUTS against NUTS -------------------------------------------------------------------------------

STDS = torch.logspace(-1, 1, DIM)


@dataclass
class Result:
    """Draws with shape (draws, chains, D), what they cost, and what is worth a remark."""

    name: str
    x: Tensor
    seconds: float
    warmup_seconds: float
    gradients: int
    remark: str = ""

    @cached_property
    def summary(self) -> Summary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # R-hat has a column
            return summarise(self.x)

    @property
    def rate(self) -> float:
        """The least effective sample size a second."""
        return min(self.summary.ess_bulk.min(), self.summary.ess_tail.min()) / self.seconds

    def row(self, pyro_rate: float | None) -> str:
        bulk, tail = self.summary.ess_bulk.min(), self.summary.ess_tail.min()
        ratios = torch.from_numpy(self.summary.std) / STDS
        worst = ratios[(ratios.log().abs()).argmax()].item()
        beside = "" if pyro_rate is None else f"{self.rate / pyro_rate:.1f}"
        return (
            f"| {self.name} | {bulk:.0f} / {tail:.0f} | {self.rate:.0f} | {beside} | "
            f"{1000 * bulk / self.gradients:.0f} / {1000 * tail / self.gradients:.0f} | "
            f"{worst:.3f} | {self.summary.r_hat.max():.4f} | {self.seconds:.2f} + "
            f"{self.warmup_seconds:.2f} | {self.remark} |"
        )


def ours(draws: int, warmup: int, seed: int, compile: bool) -> Result:
    noise, clock = Noise("nuts", seed), []
    x = noise.normal(torch.empty(CHAINS, DIM))
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks in (warmup, warmup + 1):  # the first draw is not counted: it waits to be compiled
            clock.append(time.perf_counter())

    clock.append(time.perf_counter())
    target = Gaussian(torch.zeros(DIM), STDS**2)
    drawn = run(target, NUTS(), x, draws, warmup, noise, tick, compile)
    end = time.perf_counter()
    each = drawn.gradients / drawn.x[..., 0].numel()
    remark = f"step {drawn.kernel.step_size:.3f}, {each:.2f} gradients a draw"
    if compile:
        remark += f", compiling took {clock[2] - clock[1]:.1f} s more"
    name = "ours, compiled" if compile else "ours"
    return Result(name, drawn.x, end - clock[2], clock[1] - clock[0], drawn.gradients, remark)


def pyro(draws: int, warmup: int, seed: int, chains: int) -> Result:
    import pyro as library
    from pyro.infer import MCMC
    from pyro.infer import NUTS as Theirs

    variance = STDS**2
    counts = [0]

    def potential(parameters: dict[str, Tensor]) -> Tensor:
        counts[0] += 1
        return 0.5 * (parameters["x"] ** 2 / variance).sum()

    library.set_rng_seed(seed)
    marks: list[tuple[float, int]] = []

    def hook(kernel: object, samples: object, stage: str, i: int) -> None:
        if stage != "Warmup" and i == 0:
            marks.append((time.perf_counter(), counts[0]))

    xs, spent, warm, gradients = [], 0.0, 0.0, 0
    for _ in range(chains):
        start = time.perf_counter()
        marks.clear()
        mcmc = MCMC(
            Theirs(potential_fn=potential),
            num_samples=draws,
            warmup_steps=warmup,
            initial_params={"x": torch.randn(DIM)},
            hook_fn=hook,
            disable_progbar=True,
        )
        mcmc.run()
        end = time.perf_counter()
        # the first draw is done when the hook is called: its share is counted as warm-up
        warm += marks[0][0] - start
        spent += end - marks[0][0]
        gradients += counts[0] - marks[0][1]
        xs.append(mcmc.get_samples()["x"])
    return Result(
        f"pyro, {chains} of the chains, one by one",
        torch.stack(xs, dim=1),
        spent,
        warm,
        gradients,
        f"{gradients / (chains * draws):.2f} gradients a draw",
    )


def blackjax(draws: int, warmup: int, seed: int) -> tuple[Result, Result]:
    import blackjax as library
    import jax
    import jax.numpy as jnp
    import numpy as np

    variance = jnp.asarray((STDS**2).numpy())

    def log_density(x: "jax.Array") -> "jax.Array":
        return -0.5 * (x**2 / variance).sum()

    adaptation = library.window_adaptation(library.nuts, log_density)
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (CHAINS, DIM))

    def warm(key: "jax.Array", x: "jax.Array") -> tuple[object, object]:
        return adaptation.run(key, x, num_steps=warmup)[0]

    def sample(key: "jax.Array", state: object, parameters: dict) -> tuple[object, object]:
        step = library.nuts(log_density, **parameters).step

        def one(state: object, key: "jax.Array") -> tuple[object, object]:
            state, info = step(key, state)
            return state, (state.position, info.num_integration_steps)

        return jax.lax.scan(one, state, jax.random.split(key, draws))[1]

    start = time.perf_counter()
    warm_up = jax.jit(jax.vmap(warm)).lower(jax.random.split(keys[1], CHAINS), x).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    state, parameters = jax.block_until_ready(warm_up(jax.random.split(keys[1], CHAINS), x))
    warm_seconds = time.perf_counter() - start
    start = time.perf_counter()
    split = jax.random.split(keys[2], CHAINS)
    program = jax.jit(jax.vmap(sample)).lower(split, state, parameters).compile()
    compiling += time.perf_counter() - start
    start = time.perf_counter()
    path, counts = jax.block_until_ready(program(split, state, parameters))
    spent = time.perf_counter() - start
    drawn = torch.from_numpy(np.array(path)).transpose(0, 1)
    counts = np.asarray(counts)  # (chains, draws)
    own, computed = int(counts.sum()), int(CHAINS * counts.max(axis=0).sum())
    remark = f"compiling took {compiling:.1f} s more"
    return (
        Result("blackjax, its own count of gradients", drawn, spent, warm_seconds, own, remark),
        Result("blackjax, waiting chains counted", drawn, spent, warm_seconds, computed, remark),
    )


# HMC against HMC ---------------------------------------------------------------------------------

STEP, LEAPS = 0.2, 10


def hmc(name: str, draw: Callable[[int], Tensor], draws: int) -> str:
    """A row: `draw` gives (draws, chains, D), and is compiled by its first call."""
    draw(0)
    times, x = [], torch.empty(0)
    for seed in range(1, 6):
        start = time.perf_counter()
        x = draw(seed)
        times.append(time.perf_counter() - start)
    spent = statistics.median(times)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = summarise(x)
    least = min(found.ess_bulk.min(), found.ess_tail.min())
    rate = CHAINS * LEAPS * draws / spent
    return f"| {name} | {1e6 * spent / draws:.1f} µs | {rate / 1e6:.2f} M | {least / spent:.0f} |"


def our_hmc(draws: int, compile: bool) -> Callable[[int], Tensor]:
    kernel, target = HMC(STEP, LEAPS), Gaussian(torch.zeros(DIM), torch.ones(DIM))
    step = kernel.stepper(target, compile)

    @torch.inference_mode()
    def draw(seed: int) -> Tensor:
        noise = Noise("hmc", seed)
        state, path = kernel.init(target, target.draw(noise, CHAINS)), []
        for _ in range(draws):
            state, _ = step(state, noise)
            path.append(state.x)
        return torch.stack(path)

    return draw


def blackjax_hmc(draws: int) -> Callable[[int], Tensor]:
    import blackjax as library
    import jax
    import numpy as np

    def log_density(x: "jax.Array") -> "jax.Array":
        return -0.5 * (x**2).sum()

    mass = jax.numpy.ones(DIM)
    kernel = library.hmc(
        log_density, step_size=STEP, inverse_mass_matrix=mass, num_integration_steps=LEAPS
    )

    @jax.jit
    @jax.vmap
    def sample(key: "jax.Array", x: "jax.Array") -> "jax.Array":
        def one(state: object, key: "jax.Array") -> tuple[object, object]:
            state, _ = kernel.step(key, state)
            return state, state.position

        return jax.lax.scan(one, kernel.init(x), jax.random.split(key, draws))[1]

    def draw(seed: int) -> Tensor:
        first, second = jax.random.split(jax.random.key(seed))
        x = jax.random.normal(second, (CHAINS, DIM))
        path = jax.block_until_ready(sample(jax.random.split(first, CHAINS), x))
        return torch.from_numpy(np.array(path)).transpose(0, 1)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--pyro-chains", type=int, default=2)
    parser.add_argument("--pyro-draws", type=int, default=250)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| a step of 16 chains | time | ratio |\n|---|---|---|")
    for row in steps(args.blocks, args.length):
        print(row, flush=True)
    peers: list[Result] = []
    missing = []
    rate = None
    try:
        peers.append(pyro(args.pyro_draws, args.warmup, args.seed, args.pyro_chains))
        rate = peers[0].rate
    except ImportError as error:
        missing.append(str(error))
    try:
        peers += blackjax(args.draws, args.warmup, args.seed)
    except ImportError as error:
        missing.append(str(error))
    print(
        "\n| NUTS | least ESS, bulk / tail | a second | times pyro's | per 1,000 gradients | "
        "worst sd / true | worst R-hat | seconds, draws + warm-up | |\n" + "|---" * 9 + "|"
    )
    own = [ours(args.draws, args.warmup, args.seed, compile) for compile in (False, True)]
    for result in [*own, *peers]:
        print(result.row(rate), flush=True)
    if len(peers) > 1:
        print()
        aim("ESS a second, compiled, over blackjax's", own[1].rate / peers[1].rate, 1, least=True)
    print("\n| HMC | a trajectory of 16 chains | gradients a second | least ESS a second |")
    print("|---|---|---|---|")
    print(hmc("ours", our_hmc(args.draws, False), args.draws), flush=True)
    print(hmc("ours, compiled", our_hmc(args.draws, True), args.draws), flush=True)
    try:
        print(hmc("blackjax, step fixed", blackjax_hmc(args.draws), args.draws))
    except ImportError:
        pass
    for reason in missing:
        print(f"| skipped: {reason} |" + " |" * 8)


if __name__ == "__main__":
    main()
