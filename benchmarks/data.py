"""How many pictures a second the data module gives: decoding them once, and from then on.

PNG files of 3 × 32 × 32 in a parquet file, processor time. Beside ours stand a bare gather of rows
of the same numbers with the scaling of a batch to [-1, 1], which is the least there is, and what a
script for `datasets` does: decode and scale each picture in `with_transform`, with a DataLoader.

    python benchmarks/data.py [--pictures 20000] [--batch 256]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from aims import aim

from pipeline.data import Hub
from pipeline.data.shapes import Shapes


def seconds(batches: Iterable[Any], limit: int) -> tuple[float, int]:
    """Processor time of so many pictures at most, and their number."""
    start, count = time.process_time(), 0
    for batch in batches:
        count += len(batch)
        if count >= limit:
            break
    return time.process_time() - start, count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    with tempfile.TemporaryDirectory() as folder:
        shapes = Shapes(None, per_combination=-(-args.pictures // 192), cache_dir=folder)
        shapes.dataset("train").to_parquet(f"{folder}/train.parquet")
        how = {"caption": "caption", "batch_size": args.batch, "cache_dir": f"{folder}/cache"}
        data = Hub(f"{folder}/train.parquet", None, size=32, **how)
        rows = data.dataset("train")  # without the time that `datasets` takes to copy them
        start = time.process_time()
        n = len(data.rows("train").x)
        decoded = n / (time.process_time() - start)
        print(f"decoding once: {decoded:,.0f} pictures a second")

        def ours() -> Iterable[torch.Tensor]:
            for raw in data.train_dataloader():
                yield data.on_after_batch_transfer(raw, 0).x

        x = np.array(data.rows("train").x)

        def bare() -> Iterable[torch.Tensor]:
            order = torch.randperm(n)
            for some in order.split(args.batch):
                yield torch.from_numpy(x[some.numpy()]).float() / 127.5 - 1

        def transformed() -> Iterable[torch.Tensor]:

            def scaled(some: dict[str, Any]) -> dict[str, Any]:
                pictures = [np.array(one.convert("RGB")) for one in some["image"]]
                return {"x": [torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1 for p in pictures]}

            from datasets import Image as Decoded

            live = rows.cast_column("image", Decoded()).with_transform(scaled)
            loader: Any = torch.utils.data.DataLoader(live, args.batch, shuffle=True)  # type: ignore
            for batch in loader:
                yield batch["x"]

        found: dict[str, list[float]] = {}
        for number in range(args.rounds + 1):
            for way, limit in ((ours, n), (bare, n), (transformed, 8 * args.batch)):
                taken, count = seconds(way(), limit)
                if number:
                    found.setdefault(way.__name__, []).append(count / taken)
        for name, rates in found.items():
            low, middle, high = np.quantile(rates, [0.25, 0.5, 0.75])
            print(f"{name}: {middle:,.0f} pictures a second ({low:,.0f}–{high:,.0f})")
        aim("pictures a second from the cache", float(np.median(found["ours"])), 2e5, least=True)
        aim("and decoded", decoded, 1e4, least=True)


if __name__ == "__main__":
    main()
