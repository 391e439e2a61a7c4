"""What measuring costs: distances, statistics and features beside what they are compared with.

    python benchmarks/evaluation.py [--dim 2048] [--rounds 3] [--pictures 64]

Each figure is a ratio within one run: rounds of ours and of theirs alternate, and the median of
the ratios is printed as a row of markdown. pytorch-fid itself imports torchvision; what is timed
is the arithmetic that it publishes, `scipy.linalg.sqrtm` of the product of the covariances.

    python benchmarks/evaluation.py --ladder FOLDER [--pictures 512]

Instead, with the parquet files of CIFAR-10 in FOLDER: how far test pictures with more and more
noise are from train pictures.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.data import Hub
from pipeline.evaluation.distances import (
    density_coverage,
    frechet,
    kernel_distance,
    precision_recall,
)
from pipeline.evaluation.features import EfficientNetLite0
from pipeline.evaluation.statistics import Statistics
from pipeline.noise import Noise


def seconds(of: Callable[[], Any]) -> float:
    start = time.perf_counter()
    of()
    return time.perf_counter() - start


def row(question: str, ratios: list[float], detail: str) -> None:
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"| {question} | {middle:.2f} (from {low:.2f} to {high:.2f}) | {detail} |", flush=True)


def like_features(n: int, dim: int, key: str) -> Tensor:
    """Correlated, with a spectrum that falls as that of a network's features does."""
    scale = torch.arange(1, dim + 1) ** -0.5
    mix = torch.linalg.qr(Noise("mix").normal(torch.empty(dim, dim)))[0]
    return (Noise(key).normal(torch.empty(n, dim)) * scale) @ mix


class Rows(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


def compare_frechet(dim: int, n: int, rounds: int) -> None:
    x, y = like_features(n, dim, "x"), 1.1 * like_features(n, dim, "y") + 0.01
    a, b = Statistics(dim).update(x), Statistics(dim).update(y)
    theirs = FrechetInceptionDistance(feature=Rows(dim)).set_dtype(torch.float64)
    theirs.update(x.double(), real=True)
    theirs.update(y.double(), real=False)
    c_a, c_b = a.covariance.numpy(), b.covariance.numpy()
    offset = (a.mean - b.mean).square().sum().item()

    def published() -> float:
        root = scipy.linalg.sqrtm(c_a.dot(c_b))
        return offset + np.trace(c_a) + np.trace(c_b) - 2 * np.trace(root).real

    ours: list[float] = []
    metrics: list[float] = []
    scipys: list[float] = []
    for _ in range(rounds):
        ours.append(seconds(lambda: frechet(a, b)))
        theirs._computed = None  # it keeps its result
        metrics.append(seconds(theirs.compute))
        scipys.append(seconds(published))
    found, other, third = frechet(a, b), theirs.compute().item(), published()
    apart = max(abs(other / found - 1), abs(third / found - 1))
    detail = f"{{:.2f}} s / {statistics.median(ours):.2f} s, equal to {apart:.0e}"
    for name, times in (("torchmetrics", metrics), ("pytorch-fid", scipys)):
        ratios = [t / o for t, o in zip(times, ours, strict=True)]
        question = f"Fréchet distance, {dim} features of {n}: {name} / ours"
        row(question, ratios, detail.format(statistics.median(times)))


def compare_statistics(dim: int, n: int, rounds: int) -> None:
    x = like_features(n, dim, "x")
    for size in (64, 1000):
        batches = x.split(size)
        doubles = [some.double() for some in batches]
        product = torch.zeros(dim, dim, dtype=torch.float64)

        def bare(doubles: list[Tensor] = doubles, product: Tensor = product) -> None:
            for some in doubles:
                product.addmm_(some.T, some)

        def ours(batches: tuple[Tensor, ...] = batches) -> None:
            gathered = Statistics(dim)
            for some in batches:
                gathered.update(some)

        ratios = [seconds(ours) / seconds(bare) for _ in range(rounds + 1)][1:]
        question = f"statistics / bare float64 product, batches of {size}"
        row(question, ratios, f"{dim} features of {n}")


def compare_features(pictures: int, rounds: int) -> None:
    for dim in (112, 1280):
        features = EfficientNetLite0(dim)
        levels = Noise("pictures").uniform(pictures * 3 * 32 * 32).view(pictures, 3, 32, 32)
        x = (255 * levels).to(torch.uint8)
        prepared = features.prepare(x.float())

        def alone(features: EfficientNetLite0 = features, prepared: Tensor = prepared) -> None:
            with torch.inference_mode():
                features.network(prepared)

        def ours(features: EfficientNetLite0 = features, x: Tensor = x, dim: int = dim) -> None:
            Statistics(dim).update(features(x))

        times = [(seconds(ours), seconds(alone)) for _ in range(rounds + 1)][1:]
        rate = pictures / statistics.median(whole for whole, _ in times)
        row(
            f"features and statistics / the network alone, {features.name}",
            [whole / bare for whole, bare in times],
            f"{rate:.0f} pictures a second, {torch.get_num_threads()} threads",
        )


def ladder(folder: str, pictures: int) -> None:
    """Distances of test pictures with noise from train pictures."""
    data = Hub(folder, None, image="img", val_split="test")
    real = torch.as_tensor(np.array(data.rows("train").x[:pictures]))
    others = torch.as_tensor(np.array(data.rows("val").x[:pictures]))
    print(
        "\n| features | noise, grey levels | Fréchet | kernel | precision | density | coverage |"
    )
    print("|---|---|---|---|---|---|---|")
    for dim in (112, 1280):
        features = EfficientNetLite0(dim)
        x = torch.cat(list(features.read(real)))
        a = Statistics(dim).update(x)
        for level in (0, 4, 8, 16, 32):
            noise = Noise("ladder").normal(others.float())
            noisy = (others + level * noise).round().clamp(0, 255).to(torch.uint8)
            y = torch.cat(list(features.read(noisy)))
            kernel = kernel_distance(x, y, Noise("resamples"))
            precision, (density, coverage) = precision_recall(x, y)[0], density_coverage(x, y)
            print(
                f"| {features.name} | {level} | {frechet(a, Statistics(dim).update(y)):.1f} | "
                f"{kernel.value:.3g} ({kernel.low:.3g} to {kernel.high:.3g}) | {precision:.3f} | "
                f"{density:.3f} | {coverage:.3f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--number", type=int, default=10_000, help="features")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--ladder", metavar="FOLDER", help="the parquet files of CIFAR-10")
    args = parser.parse_args()
    if args.ladder:
        return ladder(args.ladder, args.pictures)
    print("| question | ratio | detail |\n|---|---|---|")
    compare_frechet(args.dim, args.number, args.rounds)
    compare_statistics(args.dim, args.number, args.rounds)
    compare_features(args.pictures, args.rounds)


if __name__ == "__main__":
    main()
