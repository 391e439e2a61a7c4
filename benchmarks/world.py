"""What a process pays for its share of a batch, by the number of processes and of rows: its noise,
and which rows it takes.

    python benchmarks/world.py
"""

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.data.order import Order
from pipeline.noise import Noise

SHARE = 32  # rows of a process
REPEATS = 50


def cost(work: Callable[[int], object]) -> tuple[float, float]:
    """The least time of a call in ms, and the most memory that Python took in KiB."""
    times = []
    for k in range(REPEATS):
        start = time.perf_counter()
        work(k)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    work(0)
    most = tracemalloc.get_traced_memory()[1] / 1024
    tracemalloc.stop()
    return 1000 * min(times), most


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    x = torch.empty(SHARE, 3, 32, 32)

    def noise(world: int) -> Callable[[int], object]:
        def work(k: int) -> None:
            made = Noise(0, k, rows=((world - 1) * SHARE, world * SHARE))
            made.uniform(SHARE), made.spread(SHARE), made.normal(x)

        return work

    print("| processes | noise of 32 rows (3, 32, 32), ms |")
    print("|---|---|")
    for world in (1, 8, 64, 1024):
        print(f"| {world} | {cost(noise(world))[0]:.2f} |")
    print("\n| rows of the data | 32 rows of a batch for 1,024 processes, ms | KiB |")
    print("|---|---|---|")
    for rows in (10**4, 10**6, 10**9):
        order = Order(rows, SHARE * 1024, rank=1023, world=1024)
        took, most = cost(order.draw)
        print(f"| 10^{len(str(rows)) - 1} | {took:.2f} | {most:.0f} |")


if __name__ == "__main__":
    main()
