"""How near a few evaluations come to the solution: samplers of the probability-flow equation.

From the same noise every one of them goes to the same picture as its steps grow. The distance to
that picture, a root mean square over pixels in units of x (2 from black to white), is a sharp
measure: no other randomness is in it. The picture is `UniPC` of order 3 with many steps; how far
`Heun` with as many evaluations is from it is printed too. `Adaptive` stands at the evaluations
that its tolerances took. With `--frechet NUMBER` what each draws is also scored by `evaluate`.

    python benchmarks/samplers.py --checkpoint RUN
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.checkpoint import Checkpoint
from pipeline.cli import main as command
from pipeline.data import DataModule
from pipeline.generator import Generator
from pipeline.guidance import ClassifierFree
from pipeline.samplers import DDIM, Adaptive, DPMSolver, Heun, Sampler, UniPC


def methods(rho: float) -> dict[str, Any]:
    """Each method, made from a number of evaluations."""
    return {
        "DDIM": lambda n: DDIM(n, rho=rho),
        "Heun": lambda n: Heun((n + 1) // 2, rho),
        "DPM-Solver++": lambda n: DPMSolver(n, rho),
        "UniPC, order 2": lambda n: UniPC(n, 2, rho),
        "UniPC, order 3": lambda n: UniPC(n, 3, rho),
    }


class Drawer:
    """Draws the same pictures with one sampler or another."""

    def __init__(self, checkpoint: str, number: int, seed: int) -> None:
        self.generator = Generator.from_checkpoint(checkpoint)
        self.rho, self.guidance = self.generator.sampler.rho, self.generator.guidance
        prompts = Checkpoint(checkpoint).data(DataModule).rows("val").values or []
        self.prompts = [prompts[i * len(prompts) // number] for i in range(number)]
        self.seeds, self.calls = range(seed, seed + number), 0
        self.generator.denoiser.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def __call__(self, sampler: Sampler) -> tuple[Tensor, int]:
        """x, and the evaluations it took."""
        self.generator.sampler, self.calls = sampler, 0
        x = torch.cat(list(self.generator.draw(self.prompts, self.seeds, len(self.prompts))))
        return x.double(), self.calls


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def frechet(checkpoint: str, sampler: Sampler, number: int, scale: list[str]) -> float:
    """The Fréchet distance that `evaluate` finds."""
    from pipeline.building import describe

    with tempfile.TemporaryDirectory() as folder:
        told, out = Path(folder) / "sampler.yaml", Path(folder) / "result.json"
        told.write_text(json.dumps(describe(sampler)))
        line = ["evaluate", "--checkpoint", checkpoint, "--sampler", str(told), "--out", str(out)]
        if code := command([*line, "--number", str(number), *scale]):
            raise SystemExit(code)
        return json.loads(out.read_text())["frechet"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--counts", default="4,6,8,12,16,24", help="evaluations (4 to 24)")
    parser.add_argument("--tolerances", default="0.1,0.01,0.001", help="of Adaptive")
    parser.add_argument("--number", type=int, default=32, help="pictures (32)")
    parser.add_argument("--seed", type=int, default=3000, help="of the first picture (3000)")
    parser.add_argument("--reference", type=int, default=128, help="evaluations of the solution")
    parser.add_argument("--rho", type=float, help="of the grids (default: the run's)")
    parser.add_argument("--scale", type=float, help="of guidance (default: the run's)")
    parser.add_argument("--frechet", type=int, default=0, help="pictures to score, 0 for none")
    args = parser.parse_args()
    draw = Drawer(args.checkpoint, args.number, args.seed)
    if args.scale is not None:
        draw.generator.guidance = ClassifierFree(args.scale)
    rho = args.rho or draw.rho
    counts = [int(n) for n in args.counts.split(",")]
    start = time.process_time()
    truth, _ = draw(UniPC(args.reference, 3, rho))
    check = distance(draw(Heun((args.reference + 1) // 2, rho))[0], truth)
    print(
        f"{args.number} pictures, rho {rho:g}; Heun with {args.reference} evaluations: {check:.5f}"
    )
    print(f"\n| evaluations | {' | '.join(map(str, counts))} |")
    print("|---|" + "---|" * len(counts))
    for name, make in methods(rho).items():
        found = [f"{distance(draw(make(n))[0], truth):.4f}" for n in counts]
        print(f"| {name} | {' | '.join(found)} |", flush=True)
    for tolerance in map(float, args.tolerances.split(",") if args.tolerances else ()):
        x, calls = draw(Adaptive(tolerance, 200))
        print(
            f"| Adaptive, tolerance {tolerance:g} | {calls}: {distance(x, truth):.4f} |",
            flush=True,
        )
    print(f"\n{time.process_time() - start:.0f} s of the processor")
    if args.frechet:
        scale = [] if args.scale is None else ["--scale", str(args.scale)]
        for name, make in methods(rho).items():
            scores = [frechet(args.checkpoint, make(n), args.frechet, scale) for n in counts]
            print(f"| {name} | {' | '.join(f'{v:.1f}' for v in scores)} |", flush=True)


if __name__ == "__main__":
    main()
