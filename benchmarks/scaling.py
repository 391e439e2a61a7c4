"""What a training step costs by network, resolution and devices: operations and bytes as counted,
beside the time that was measured.

    python benchmarks/scaling.py [--rows 8] [--repeats 3]

The first table is of one example in float32, forward and back. The time of each row is told from
the counted operations by the speed of the first row. The second is of the bytes that a device
holds for each weight, counted in two processes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.building import build
from pipeline.callbacks.recompute import again
from pipeline.callbacks.watch import Operations
from pipeline.condition import Condition
from pipeline.denoisers import Clean
from pipeline.engines import shard
from pipeline.networks import Network, blocks
from pipeline.optimizers import MuonAdamW
from pipeline.schedules import Rectified

CASES = [
    ("unet_small", 32, {}),
    ("unet_small", 64, {}),
    ("unet", 32, {}),
    ("unet", 64, {}),
    ("dit_small", 32, {}),
    ("dit_small", 64, {"patch": 4}),
    ("dit_small", 64, {}),
    ("dit", 32, {}),
]
TOKENS, WIDTH = 16, 384  # of a caption


def make(name: str, **more: Any) -> Network:
    """A network of conf/, for captioned pictures."""
    node = yaml.safe_load(Path(f"conf/network/{name}.yaml").read_text())
    node["init_args"] |= {"channels": 3, "u_dim": WIDTH, "planes": 0, "dims": 2, **more}
    return build(node, Network)


def step(network: Network, rows: int, size: int) -> Callable[[], Any]:
    """A call that goes forward and back."""
    x, level = torch.randn(rows, 3, size, size), torch.randn(rows)
    u = Condition(torch.randn(rows, TOKENS, WIDTH))
    return lambda: network(x, level, u).square().mean().backward()


def kept(network: Network, rows: int, size: int) -> float:
    """The bytes that the way forward leaves for the way back, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    held: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step(network, rows, size)()
    return float(sum(x.untyped_storage().nbytes() for x in held.values()))


def state(rank: int, store: str, sharded: bool, into: str) -> None:
    """The bytes a weight that the first of two processes holds: weights, gradients, optimizer and
    one average.
    """
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    denoiser = Clean(make("dit_small"), Rectified())
    if sharded:
        shard(denoiser, init_device_mesh("cpu", (2,)))
    weights = list(denoiser.parameters())
    optimizer = MuonAdamW(weights)
    step(denoiser.network, 2, 32)()  # type: ignore[arg-type]
    optimizer.step()
    held = [*weights, *(p.grad for p in weights), *(p.detach().clone() for p in weights)]
    held += [x for of_one in optimizer.state.values() for x in of_one.values()]
    own = [x.to_local() if hasattr(x, "to_local") else x for x in held]  # type: ignore
    total = sum(x.nbytes for x in own)
    if rank == 0:
        Path(into).write_text(f"{total / sum(p.numel() for p in weights):.2f}")
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    names = "network, size, weights, operations 10⁹, kept MiB, recomputed MiB, time ms, told ms"
    print(f"| {names.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|")
    speed = 0.0
    for name, size, more in CASES:
        network = make(name, **more)
        for p in network.parameters():
            p.data.normal_(std=0.02)  # layers that begin at zero too
        with Operations() as counter:
            step(network, 1, size)()
        work, times = step(network, args.rows, size), []
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) / args.rows)
        speed = speed or counter.number / min(times)
        plain = kept(network, args.rows, size) / args.rows
        for block in blocks(network):
            block.forward = partial(again, block.forward)
        less = kept(network, args.rows, size) / args.rows
        told = "".join(f", {key} {value}" for key, value in more.items())
        found = [plain / 2**20, less / 2**20, 1000 * min(times), 1000 * counter.number / speed]
        weights = sum(p.numel() for p in network.parameters()) / 1e6
        print(
            f"| {name}{told} | {size} | {weights:.1f} M | {counter.number / 1e9:.2f} | "
            f"{' | '.join(f'{one:.1f}' for one in found)} |",
            flush=True,
        )
    print("\n| two devices, Muon and AdamW, one average | bytes a weight and device |")
    print("|---|---|")
    for name, sharded in (("DDP", False), ("FSDP", True)):
        with tempfile.TemporaryDirectory() as folder:
            told = (f"file://{folder}/store", sharded, f"{folder}/said")
            multiprocessing.spawn(state, told, nprocs=2)
            print(f"| {name} | {Path(told[2]).read_text()} |")


if __name__ == "__main__":
    main()
