"""What the network is asked for, and which network: EDM, flow and clean x, UNet and DiT.

Each pair is trained for the same time on one machine (of its processor where there is no GPU, so
that other work on it changes little), its learning rate falling to 0 at the end, and drawn from as
the experiment says; `evaluate` scores it on what was held out. The DiT's width is such that both
networks have about as many weights. Clean x has the weight of the velocity, the others their own.
A pair that the folder holds already is not trained again.

    python benchmarks/outputs.py [--minutes 6] [-- more options of fit]
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.callbacks import Precision
from pipeline.cli import main as command
from pipeline.experiment import Experiment, keep_memory

OUTPUTS = {
    "EDM": "conf/objective/dsm_flat.yaml",
    "Flow": "conf/objective/dsm_flat.yaml",
    "Clean": "conf/objective/dsm_clean.yaml",
}
DENOISER = "--model.denoiser"
TRIED = 30  # steps, of which the last two thirds are timed


NOW = time.perf_counter if torch.cuda.is_available() else time.process_time


class Clock(pl.Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(NOW())


def options(output: str, network: str, args: argparse.Namespace) -> list[str]:
    """What `fit` is told of a pair."""
    told = [f"{DENOISER}.class_path", f"pipeline.denoisers.{output}"]
    told += [
        f"{DENOISER}.schedule",
        "conf/schedule/rectified.yaml",
        "--model.objective",
        OUTPUTS[output],
    ]
    if network == "UNet":
        widths = [f"{DENOISER}.network.widths", f"[{args.widths}]"] if args.widths else []
        return [*told, f"{DENOISER}.network", args.unet, *widths]
    told += [f"{DENOISER}.network", "conf/network/dit_small.yaml"]
    for name, value in zip(
        ("width", "depth", "patch", "head_width"), args.dit.split(","), strict=True
    ):
        told += [f"{DENOISER}.network.{name}", value]
    return told


def steps_in(minutes: float, experiment: str, told: list[str]) -> tuple[int, float]:
    """How many steps so many minutes hold, by a trial, and the millions of weights."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        short = ["--trainer.max_steps", str(TRIED), "--trainer.val_check_interval", str(10**6)]
        run = Experiment([experiment], [*told, *short], folder)
        model, trainer = run.make()
        chosen = [one for one in trainer.callbacks if isinstance(one, Precision)]
        trainer.callbacks, trainer.loggers = [*chosen, clock], []
        trainer.fit(model, datamodule=run.data)
    gaps = [b - a for a, b in itertools.pairwise(clock.times[TRIED // 3 :])]
    weights = sum(p.numel() for p in model.denoiser.parameters()) / 1e6
    return int(60 * minutes / statistics.median(gaps)), weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", default="conf/experiment/shapes.yaml")
    parser.add_argument("--unet", default="conf/network/unet_small.yaml")
    parser.add_argument("--widths", help="of the UNet, as 32,64,128, for its file's")
    parser.add_argument(
        "--dit", default="160,6,4,40", help="width, depth, patch and head width (160,6,4,40)"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, each (6)")
    parser.add_argument("--number", type=int, default=128, help="pictures to score (128)")
    parser.add_argument("--seed", type=int, default=5000, help="of the first picture (5000)")
    parser.add_argument("--only", default="", help="pairs, as Clean/DiT,EDM/UNet")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="a folder (outputs)")
    parser.add_argument("more", nargs="*", help="more options of fit, after --")
    args = parser.parse_args()
    keep_memory()
    pairs = [f"{o}/{n}" for n in ("UNet", "DiT") for o in OUTPUTS]
    for pair in args.only.split(",") if args.only else pairs:
        output, network = pair.split("/")
        folder = args.out / f"{output}_{network}"
        result, about = folder.with_suffix(".json"), folder.with_suffix(".about.json")
        told = [*options(output, network, args), *args.more]
        if not result.exists():
            steps, weights = steps_in(args.minutes, args.experiment, told)
            length = [
                "--trainer.max_steps",
                str(steps),
                "--trainer.val_check_interval",
                str(steps),
            ]
            start = NOW()
            line = ["fit", "-c", args.experiment, *told, *length, "--run", str(folder)]
            if code := command(line):
                raise SystemExit(code)
            minutes = (NOW() - start) / 60
            about.write_text(json.dumps({"steps": steps, "weights": weights, "minutes": minutes}))
            line = ["evaluate", "--checkpoint", str(folder), "--out", str(result)]
            if code := command([*line, "--number", str(args.number), "--seed", str(args.seed)]):
                raise SystemExit(code)
    print("\n| network | output | weights | steps in minutes | right | grain | Fréchet |")
    print("|---|---|---|---|---|---|---|")
    for pair in pairs:
        result = args.out / f"{pair.replace('/', '_')}.json"
        if result.exists():
            found, about = (
                json.loads(file.read_text())
                for file in (result, result.with_suffix(".about.json"))
            )
            right = ", ".join(f"{k} {v:.3f}" for k, v in found.get("accuracy", {}).items())
            grain = "" if found.get("grain") is None else f"{found['grain']:.2f}"
            print(
                f"| {pair.split('/')[1]} | {pair.split('/')[0]} | {about['weights']:.1f} M | "
                f"{about['steps']} in {about['minutes']:.1f} | {right} | {grain} | "
                f"{found['frechet']:.1f} |"
            )


if __name__ == "__main__":
    main()
