"""What a sampler costs beyond the network that it calls, beside other libraries' samplers.

A network that gives back its input costs nothing, and one of a matrix product about a millisecond.
Each way of drawing calls it equally often on the same x, bare (D is the network) and with EDM's
scales around it. What is told is microseconds of the processor for an evaluation, and for the
second network the time of all over that of the calls alone; medians of interleaved rounds, and
quartiles. A loop written by hand is the least there is. Libraries that are not installed are left
out: `pip install diffusers azula k-diffusion` (the last with --no-deps does).

    python benchmarks/sampling.py [--evaluations 64] [--rounds 30]
"""

import argparse
import importlib.util
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from aims import aim

from pipeline.condition import U
from pipeline.denoisers import EDM, Denoiser
from pipeline.noise import Noise
from pipeline.samplers import DDIM, DPMSolver, Heun, UniPC
from pipeline.schedules import VE

LOW, HIGH, DATA = 0.01, 50.0, 1.0  # noise ratios; the deviation of data that azula knows
Way = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """x, and where `size` is not 0 what two matrix products of that side cost."""

    u_dim = 0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.randn(size, size) if size else None
        self.calls = 0

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        self.calls += 1
        if self.weight is not None:
            self.weight @ self.weight
        return x


class Bare(Denoiser):
    def __init__(self, network: Net) -> None:
        super().__init__(VE(LOW, HIGH))
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self.network(x_t)


def scales(s: float) -> tuple[float, float, float]:
    total = s**2 + DATA**2
    return total**-0.5, DATA**2 / total, s * DATA * total**-0.5


def by_hand(net: Net, edm: bool, n: int) -> Way:
    """Euler's method, of as few operations as there can be."""
    ratios = torch.logspace(math.log10(HIGH), math.log10(LOW), n).tolist()

    def draw(x: Tensor) -> Tensor:
        for s, r in zip(ratios, [*ratios[1:], 0.0], strict=True):
            if edm:
                c_in, c_skip, c_out = scales(s)
                level = x.new_full((len(x),), math.log(s))
                d = torch.add(c_skip * x, net(c_in * x, level), alpha=c_out)
            else:
                d = net(x)
            x = torch.lerp(d, x, r / s)
        return x

    return draw


def ours(net: Net, edm: bool, n: int) -> dict[str, Way]:
    denoiser = EDM(net, VE(LOW, HIGH), DATA) if edm else Bare(net)  # type: ignore[arg-type]
    samplers = {"DDIM": DDIM(n), "Heun": Heun(n // 2), "DPM-Solver++": DPMSolver(n)}
    samplers["UniPC"] = UniPC(n)

    def draw(sampler: Any) -> Way:
        return lambda x: sampler(denoiser, x, None, Noise("sampling"))

    return {f"ours: {name}": draw(sampler) for name, sampler in samplers.items()}


def of_diffusers(net: Net, edm: bool, n: int) -> dict[str, Way]:
    import diffusers as peer

    about = {"sigma_min": LOW, "sigma_max": HIGH, "sigma_data": DATA}
    kinds = {"Euler": peer.EDMEulerScheduler, "DPM-Solver++": peer.EDMDPMSolverMultistepScheduler}

    def draw(scheduler: Any) -> Way:
        def drawn(x: Tensor) -> Tensor:
            scheduler.set_timesteps(n)
            for t in scheduler.timesteps:
                x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            return x

        return drawn

    # its EDM schedulers scale input and output by themselves; bare there is none of its own
    return {f"diffusers: {k}": draw(of(**about)) for k, of in kinds.items()} if edm else {}


def of_azula(net: Net, edm: bool, n: int) -> dict[str, Way]:
    from azula.denoise import Denoiser as Peer
    from azula.denoise import DiracPosterior, KarrasDenoiser
    from azula.noise import VESchedule
    from azula.sample import DDIMSampler, HeunSampler

    class Plain(Peer):
        schedule = VESchedule(LOW, HIGH)

        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            return DiracPosterior(mean=net(x_t))

    net.register_parameter("kind", nn.Parameter(torch.zeros(())))  # it asks for the type of one
    denoiser = KarrasDenoiser(net, VESchedule(LOW, HIGH)) if edm else Plain()
    kinds = {"DDIM": DDIMSampler(denoiser, steps=n, silent=True)}
    kinds["Heun"] = HeunSampler(denoiser, steps=n // 2, silent=True)
    return {f"azula: {name}": sampler for name, sampler in kinds.items()}


def k_diffusion_alone() -> None:
    """Its package without what it imports for pictures, torchvision among it: of its utilities the
    samplers need one.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        raise ImportError("no k_diffusion")
    package, helpers = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(found.submodule_search_locations or [])
    helpers.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]  # type: ignore
    package.utils = helpers  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": helpers}


def of_k_diffusion(net: Net, edm: bool, n: int) -> dict[str, Way]:
    if "k_diffusion" not in sys.modules:
        k_diffusion_alone()
    from k_diffusion import sampling as peer
    from k_diffusion.layers import Denoiser as Peer

    model = Peer(net, DATA) if edm else (lambda x, sigma: net(x, sigma))
    kinds: dict[str, Any] = {"Euler": peer.sample_euler, "Heun": peer.sample_heun}
    kinds["DPM-Solver++"] = peer.sample_dpmpp_2m
    steps = {"Heun": n // 2}

    def draw(name: str) -> Way:
        sigmas = peer.get_sigmas_karras(steps.get(name, n), LOW, HIGH)
        return lambda x: kinds[name](model, x, sigmas, disable=True)

    return {f"k-diffusion: {name}": draw(name) for name in kinds}


def ways(net: Net, edm: bool, n: int) -> dict[str, Way]:
    found = {"by hand: Euler": by_hand(net, edm, n)} | ours(net, edm, n)
    for peer in (of_diffusers, of_azula, of_k_diffusion):
        try:
            found |= peer(net, edm, n)
        except ImportError as error:
            print(f"left out: {peer.__name__[3:]} ({error})", file=sys.stderr)
    return found


def quartiles(values: list[float]) -> str:
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    digits = 0 if middle > 5 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def agree(every: dict[str, Way], x: Tensor) -> None:
    """The network is linear: each way makes x smaller by nearly the same factor, or is no peer."""
    found = {name: (draw(x.clone()).norm() / x.norm()).item() for name, draw in every.items()}
    middle = sorted(found.values())[len(found) // 2]
    if far := {name: k for name, k in found.items() if abs(math.log(k / middle)) > 0.2}:
        raise SystemExit(f"{far} are far from {middle:.3g}, the middle of all")


def measured(net: Net, edm: bool, n: int, rounds: int, x: Tensor) -> dict[str, list[list[float]]]:
    """For each way what an evaluation costs in each round: beyond the calls, and over them."""
    found: dict[str, list[list[float]]] = {}
    every = ways(net, edm, n)
    agree(every, x)
    for number in range(rounds + 1):
        for name, draw in every.items():
            net.calls, start = 0, time.process_time()
            draw(x.clone())
            taken, calls = time.process_time() - start, net.calls
            start = time.process_time()
            for _ in range(calls):
                net(x)
            alone = time.process_time() - start
            if number:  # the first warms up
                each = [1e6 * (taken - alone) / calls, taken / alone]
                found.setdefault(name, []).append(each)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=384, help="of the product, a millisecond's")
    parser.add_argument("--rows", type=int, default=4, help="of 3 × 32 × 32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, rows = torch.randn(args.rows, 3, 32, 32) * HIGH, dict[str, list[str]]()
    worst = dict[str, list[float]]()  # with EDM's scales: beyond the calls, over the calls
    for size, edm in ((0, False), (0, True), (args.size, False), (args.size, True)):
        found = measured(Net(size), edm, args.evaluations, args.rounds, x)
        for name in found:
            beyond, over = zip(*found[name], strict=True)
            values = list(over if size else beyond)
            rows.setdefault(name, ["–"] * 4)[2 * bool(size) + edm] = quartiles(values)
            if edm:
                worst.setdefault(name, []).append(statistics.median(values))
    net, start = Net(args.size), time.process_time()
    for _ in range(100):
        net(x)
    print(f"a call takes {10 * (time.process_time() - start):.2f} ms; medians and quartiles\n")
    print("| sampler | µs beyond the calls, bare | EDM's scales | over the calls, bare | EDM's |")
    print("|---|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    for name in ("DDIM", "Heun", "DPM-Solver++"):
        beyond, over = worst[f"ours: {name}"]
        aim(f"{name}, µs beyond the calls,", beyond, 60)
        aim(f"{name}, time over the calls,", over, 1.10)


if __name__ == "__main__":
    main()
