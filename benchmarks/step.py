"""What a whole training step costs beside the bare step of its network.

The whole step is the default experiment as `make train` runs it: loader, noise and levels,
condition dropout, preconditioning, clipping, AdamW, moving average, logging, progress bar. The
bare step is the same network on the same shapes: forward, mean square, backward, the same
optimizer. Blocks of both alternate in one run, so that a machine that drifts slows both.

    python benchmarks/step.py [--blocks 12] [--steps 20] [--experiment conf/experiment/shapes.yaml]
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from aims import aim

from pipeline.experiment import Experiment, keep_memory
from pipeline.tracking import loggers


class Compare(pl.Callback):
    """Times blocks of whole steps, and after each a block of bare ones."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.whole: list[float] = []
        self.bare: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.network = copy.deepcopy(pl_module.denoiser.network)
        self.optimizer = pl_module.optimizer(self.network.parameters())
        self.start = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.steps:
            return
        if self.start is not None:  # the first block warms up
            synchronise(batch.x)
            self.whole.append(time.perf_counter() - self.start)
        bare = self.block(batch, pl_module.denoiser.precision)
        if self.start is not None:
            self.bare.append(bare)
        self.start = time.perf_counter()

    def block(self, batch: Any, precision: torch.dtype | None) -> float:
        x, level = torch.randn_like(batch.x), torch.randn(len(batch.x), device=batch.x.device)
        synchronise(x)
        start = time.perf_counter()
        for _ in range(self.steps):
            with torch.autocast(x.device.type, precision, enabled=precision is not None):
                out = self.network(x, level, batch.u)
            (out.float() - batch.x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronise(x)
        return time.perf_counter() - start


def synchronise(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", default="conf/experiment/shapes.yaml")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        steps = args.steps * (args.blocks + 1)
        length = [
            "--trainer.max_steps",
            str(steps),
            "--trainer.val_check_interval",
            str(10 * steps),
        ]
        experiment = Experiment([args.experiment], length, folder)
        model, trainer = experiment.make()
        compare = Compare(args.steps)
        trainer.callbacks.append(compare)
        trainer.loggers = loggers(Path(folder), "benchmark", {})
        trainer.fit(model, datamodule=experiment.data)
    ratios = [w / b for w, b in zip(compare.whole, compare.bare, strict=True)]
    ms = [1000 * statistics.median(times) / args.steps for times in (compare.whole, compare.bare)]
    low, high = min(ratios), max(ratios)
    print(f"whole step {ms[0]:.2f} ms, bare step {ms[1]:.2f} ms (medians of {len(ratios)})")
    print(
        f"ratio {statistics.median(ratios):.3f} (of pairs of blocks, from {low:.3f} to {high:.3f})"
    )
    aim("the ratio", statistics.median(ratios), 1.05)


if __name__ == "__main__":
    main()
