"""Whether drawn rows of a table can be told from real ones.

The real rows are halved at random. For the u of one half rows are drawn, and a forest of decision
trees is taught to tell them, u beside them, from the other half (a classifier two-sample test,
Lopez-Paz & Oquab, https://arxiv.org/abs/1610.06545): its accuracy on rows that a tree was not
taught on is 0.5 where nothing can be told. Beside it stand its floor, the same of the first half's
own rows, and a ceiling, the same of the drawn rows with their u shuffled. The mean over several
halvings, with its standard deviation among them.

A model may copy its training rows: the distance of a drawn row from the nearest training row
stands beside that of a held-out row (medians, in standard deviations of the columns).

    python benchmarks/table.py --checkpoint runs/table/TIME --out table.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.ensemble import RandomForestClassifier

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.checkpoint import Checkpoint
from pipeline.data import Table
from pipeline.generator import Generator


def accuracy(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """How often a row is told to be of a or of b by the trees that were not taught on it."""
    label = np.repeat([0, 1], [len(a), len(b)])
    forest = RandomForestClassifier(
        200, min_samples_leaf=3, oob_score=True, random_state=seed, class_weight="balanced"
    )
    return forest.fit(np.concatenate([a, b]), label).oob_score_


def halvings(real: np.ndarray, drawn: np.ndarray, u: np.ndarray, count: int) -> np.ndarray:
    """Accuracies of drawn, real and shuffled rows against real ones, with shape (count, 3)."""
    found = []
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(real))
        a, b = order[: len(order) // 2], order[len(order) // 2 :]
        other = np.concatenate([real[b], u[b]], axis=1)
        shuffled = np.random.default_rng(count + seed).permutation(a)
        sides = ((drawn[a], u[a]), (real[a], u[a]), (drawn[a], u[shuffled]))
        found.append([accuracy(np.concatenate(side, axis=1), other, seed) for side in sides])
    return np.array(found)


def shown(found: np.ndarray) -> str:
    mean, spread = found.mean(axis=0), found.std(axis=0)
    return "  ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))


def nearest(x: np.ndarray, to: np.ndarray, itself: bool = False) -> float:
    apart = torch.cdist(torch.from_numpy(x), torch.from_numpy(to))
    return float((apart.fill_diagonal_(torch.inf) if itself else apart).amin(dim=1).median())


def plot(names: list[str], real: np.ndarray, drawn: np.ndarray, out: str) -> None:
    """Every marginal, real and drawn, and the correlations of both."""
    across = min(len(names), 5)
    rows = -(-len(names) // across)
    figure = Figure(figsize=(15, 2.4 * rows + 4.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.4 * rows, 4.5])
    places = top.subplots(rows, across, squeeze=False).flat
    for axes in places[len(names) :]:
        axes.set_axis_off()
    for axes, name, r, d in zip(places, names, real.T, drawn.T, strict=False):
        bins = np.histogram_bin_edges(r, 30)
        axes.hist(r, bins, density=True, alpha=0.5, label="real")
        axes.hist(d, bins, density=True, histtype="step", color="black", label="drawn")
        axes.set_title(name, fontsize=9)
    top.axes[0].legend(fontsize=8)
    sides = zip(bottom.subplots(1, 3), ("real", "drawn", "difference"), strict=True)
    c_real, c_drawn = np.corrcoef(real.T), np.corrcoef(drawn.T)
    for (axes, title), c in zip(sides, (c_real, c_drawn, c_drawn - c_real), strict=True):
        image = axes.imshow(c, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(f"correlation, {title}", fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    bottom.colorbar(image, ax=bottom.axes)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--rows", type=int, default=2000, help="real rows, at most")
    parser.add_argument("--halvings", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="table.png")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.checkpoint)
    generator, data = Generator.from_checkpoint(args.checkpoint), checkpoint.data(Table)
    splits = [data.rows(split) for split in ("train", "val")]
    x = np.concatenate([source.x for source in splits]).astype(np.float64)
    asked = [v for source in splits for v in source.values or [""] * len(source.x)]
    kept = np.random.default_rng(args.seed).permutation(len(x))[: args.rows]
    real, values = x[kept], [asked[k] for k in kept]
    seeds = range(args.seed, args.seed + len(values))
    drawn = torch.cat(list(generator(values, seeds, 256))).numpy()
    u = np.zeros((len(values), 0))
    if generator.conditioning is not None:
        u = generator.conditioning.embed(values).tokens[:, 0].numpy()
    print("accuracy of a forest: drawn rows against real; floor, real against real; u shuffled")
    print(f"  all {len(real)} rows: {shown(halvings(real, drawn, u, args.halvings))}")
    said = [generator.conditioning.said(v) for v in values] if u.size else []
    for name, words in data.names().items() if said else ():
        for word in words if isinstance(words[0], str) else ():
            own = np.array([one[name] == word for one in said])
            if own.sum() >= 40:  # fewer tell nothing
                of_class = halvings(real[own], drawn[own], u[own], args.halvings)
                print(f"  {name} {word}, {own.sum()} rows: {shown(of_class)}")
    scale = x.std(axis=0)
    train, val = (source.x.astype(np.float64) / scale for source in splits)
    ways = nearest(drawn / scale, train), nearest(val, train), nearest(train, train, itself=True)
    print("distance from the nearest training row, median, in standard deviations:")
    print("  drawn {:.2f}, held-out {:.2f}, training {:.2f}".format(*ways))
    apart = np.abs(np.corrcoef(drawn.T) - np.corrcoef(real.T))
    means = (drawn.mean(axis=0) - real.mean(axis=0)) / real.std(axis=0)
    spread = drawn.std(axis=0) / real.std(axis=0)
    print(
        f"largest difference of a correlation {apart.max():.3f}, of a mean, in deviations, "
        f"{np.abs(means).max():.3f}; deviations, drawn / real: {spread.min():.2f} to "
        f"{spread.max():.2f}"
    )
    plot(data.x, real, drawn, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
