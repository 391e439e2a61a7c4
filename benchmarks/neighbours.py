"""Drawn pictures beside the true ones, and beside their nearest neighbours in the training data.

For captions of the training data and for captions never seen: what the model draws, the true
picture of that caption, and the training picture nearest to the drawn one (least mean square
difference of pixels). A drawn picture equal to its neighbour is a memory, not an invention. Of the
seen captions, those are counted whose drawn picture is nearest to the picture of that caption.

    python benchmarks/neighbours.py --checkpoint runs/emoji/TIME --out docs/emoji.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import max_pool2d

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.checkpoint import Checkpoint
from pipeline.data import DataModule
from pipeline.generator import Generator
from pipeline.guidance import ClassifierFree
from pipeline.png import contact_sheet


def spaced(n: int, count: int) -> np.ndarray:
    """count rows of n, evenly spaced."""
    return np.linspace(0, n - 1, min(count, n)).round().astype(int)


def ground(drawn: torch.Tensor, truth: torch.Tensor) -> float:
    """How far drawn pictures are from white, root mean square in grey levels, where the true ones
    are white and nothing is within two pixels.
    """
    shown = (truth < 255).any(dim=1, keepdim=True).float()
    white = max_pool2d(shown, 5, 1, 2) == 0
    off = (255 - drawn.float()).square().mean(dim=1, keepdim=True)
    return float(off[white].mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--seen", type=int, default=32, help="captions of the training data")
    parser.add_argument("--unseen", type=int, default=16, help="captions never seen")
    parser.add_argument("--scale", type=float, default=None, help="guidance (default: the run's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="neighbours.png")
    args = parser.parse_args()
    generator = Generator.from_checkpoint(args.checkpoint)
    if args.scale is not None:
        generator.guidance = ClassifierFree(args.scale)
    data = Checkpoint(args.checkpoint).data(DataModule)
    train, val = data.rows("train"), data.rows("val")
    training = torch.from_numpy(np.array(train.x)).flatten(1).float()  # (N, C·H·W)
    cells, captions, distances = [], [], {"seen": [], "unseen": []}
    right, grain = 0, float("nan")
    for split, rows, count in (("seen", train, args.seen), ("unseen", val, args.unseen)):
        places = spaced(len(rows.x), count)
        prompts = [rows.values[i] for i in places]
        seeds = range(args.seed, args.seed + len(prompts))
        drawn = torch.cat(list(generator(prompts, seeds))).cpu()
        away = torch.cdist(drawn.flatten(1).float(), training) / training.shape[1] ** 0.5
        near = away.argmin(dim=1)
        distances[split] = away.min(dim=1).values.tolist()
        truth = torch.from_numpy(np.array(rows.x[places]))
        if split == "seen":
            right = int((near.numpy() == places).sum())
            grain = ground(drawn, truth)
        true_away = torch.cdist(truth.flatten(1).float(), training)
        if split == "unseen":  # how near a true unseen picture lies to the training data
            distances["true unseen"] = (
                true_away.min(dim=1).values / training.shape[1] ** 0.5
            ).tolist()
        for i, j in enumerate(near):
            cells += [drawn[i], truth[i], torch.from_numpy(np.array(train.x[int(j)]))]
            captions += [f"{split}: {prompts[i]}", "true", f"nearest: {train.values[int(j)]}"]
    contact_sheet(torch.stack(cells), captions, columns=12, side=64).save(args.out)
    medians = {split: float(np.median(d)) for split, d in distances.items()}
    print(f"nearest to the training picture of their own caption: {right} of {args.seen} seen")
    print(f"ground of these, root mean square from white: {grain:.2f} grey levels")
    print("root mean square difference from the nearest training picture, of 255, median:")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
