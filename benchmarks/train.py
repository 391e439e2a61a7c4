"""What a training step of a network costs beside other libraries' networks and the machine.

A step is the network on a batch, a mean squared error, its gradient and AdamW. The networks have
about as many weights, at 3 × 32 × 32: ours as the default has it (folded by 2), unfolded at
diffusers' widths, a DiT, and diffusers' UNet2DModel. Their operations are counted, and their rate
is put beside the machine's in the same round: of a product of matrices of 1,024 numbers a side, or
of a convolution of 128 channels, 3 × 3, whichever is faster. Medians and quartiles of interleaved
rounds; processor time where there is no GPU.

    python benchmarks/train.py [--rounds 10] [--batch 32] [--compile] [--dtype bfloat16]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from aims import aim

from pipeline.networks import DiT, UNet

SIDE = 1024  # of the matrices
SHAPE = (3, 32, 32)
WIDTHS = [32, 64, 128]


def networks() -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]]:
    """Each with how it is called, on x and a level of each row."""

    def plain(net: nn.Module, x: Tensor, level: Tensor) -> Tensor:
        return net(x, level)

    own = {"widths": WIDTHS, "channels": 3}
    found: dict[str, Any] = {
        "ours, the default": (UNet(**own, blocks=2, patch=2, coordinates=True), plain),
        "ours, unfolded": (UNet(**own, blocks=1, patch=1), plain),
        "ours, DiT, patch 4": (DiT(channels=3, width=160, depth=6, patch=4, head_width=40), plain),
    }
    try:
        from diffusers import UNet2DModel
    except ImportError:
        print("left out: diffusers, which is not installed", file=sys.stderr)
        return found
    peer = UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(WIDTHS),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        add_attention=False,
    )
    found["diffusers' UNet2DModel"] = (peer, lambda net, x, level: net(x, level).sample)
    return found


class Step:
    def __init__(self, net: nn.Module, call: Any, args: argparse.Namespace) -> None:
        self.net = net.to(args.device)
        self.call = call if not args.compile else torch.compile(call)
        self.optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        self.dtype, self.device = getattr(torch, args.dtype), args.device
        self.x = torch.randn(args.batch, *SHAPE, device=args.device)
        self.level = torch.randn(args.batch, device=args.device)

    def __call__(self) -> None:
        low = self.dtype is not torch.float32
        with torch.autocast(self.device, self.dtype, enabled=low):
            loss = (self.call(self.net, self.x, self.level) - self.x).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def taken(work: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values: list[float], digits: int = 2) -> str:
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="all of them, by torch.compile")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)
    steps, counted = dict[str, Step](), dict[str, float]()
    for name, (net, call) in networks().items():
        eager = Step(net, call, argparse.Namespace(**vars(args) | {"compile": False}))
        with FlopCounterMode(display=False) as counter:
            eager()
        counted[name], steps[name] = counter.get_total_flops(), Step(net, call, args)
    matrix = torch.randn(SIDE, SIDE, device=args.device, dtype=getattr(torch, args.dtype))
    image, kernel = (
        torch.randn(n, 128, side, side).to(matrix).to(memory_format=torch.channels_last)
        for n, side in ((32, 16), (128, 3))
    )

    @torch.no_grad()
    def convolve() -> Tensor:
        return nn.functional.conv2d(image, kernel, padding=1)

    rates = dict[str, list[float]]()
    times = dict[str, list[float]]()
    for number in range(args.rounds + 2):
        product = min(taken(lambda: matrix @ matrix, args.device) for _ in range(5))
        convolution = min(taken(convolve, args.device) for _ in range(5))
        limit = 2 * max(SIDE**3 / product, 9 * 128**2 * image[:, 0].numel() / convolution)
        for name, step in steps.items():
            seconds = taken(step, args.device)
            if number > 1:  # the first two warm up
                times.setdefault(name, []).append(seconds)
                rates.setdefault(name, []).append(counted[name] / seconds / limit)
    peer = times.get("diffusers' UNet2DModel")
    print(
        "| network | weights, M | operations, 10⁹ | ms a step | share of the rate | / diffusers |"
    )
    print("|---|---|---|---|---|---|")
    for name, step in steps.items():
        weights = sum(p.numel() for p in step.net.parameters()) / 1e6
        ms = quartiles([1e3 * v for v in times[name]], 0)
        ratio = [a / b for a, b in zip(times[name], peer, strict=True)] if peer else []
        print(
            f"| {name} | {weights:.1f} | {counted[name] / 1e9:.0f} | {ms} | "
            f"{quartiles(rates[name])} | {quartiles(ratio) if ratio else '–'} |"
        )
    first = next(iter(steps))
    print()
    aim("the default's share of the rate", statistics.median(rates[first]), 0.87, least=True)
    if peer:
        ratio = statistics.median(a / b for a, b in zip(times[first], peer, strict=True))
        aim("its time over diffusers'", ratio, 0.55)


if __name__ == "__main__":
    main()
