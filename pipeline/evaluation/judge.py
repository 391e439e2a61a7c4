"""A judge: a small classifier that reads back from pictures what the data say of them.

It is taught on true training pictures alone, once for each data set, and kept. It errs: how often
it is right on true held-out pictures, which it has not seen either, stands beside every score, and
no more can be expected of drawn ones.

What a label is told by differs: the style of a drawing by its colours, its subject by its shapes.
There is a reader of each, and a label is read by the one that was right more often on a tenth of
the training pictures, kept back.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from pipeline.data import DataModule
from pipeline.evaluation.reference import digest_of
from pipeline.files import digest, whole

__all__ = ["Judge", "judge_of"]

VERSION = 2  # of the network and how it is taught
STEPS, BATCH, RATE = 2000, 64, 3e-3
KEPT = 10  # of so many pictures one is kept back
WIDTH = 24
BINS = 16  # of each channel
SMOOTHING = 0.1

Labels = Mapping[str, Sequence[str]]


class Colours(nn.Module):
    r"""Linear in the square roots f of the shares of 16 × 16 × 16 colours, by ridge regression.

    .. math:: W = (G + \lambda I)^{-1} \sum_i (f_i - \bar f) \, (e_i - \bar e)^\top, \quad
        G = \sum_i (f_i - \bar f) (f_i - \bar f)^\top, \quad \lambda = \mathrm{tr}(G) / D

    with e the value as a one-hot vector.
    """

    def __init__(self, channels: int, values: Labels) -> None:
        super().__init__()
        self.length = BINS**channels
        self.heads = heads(self.length, values)

    def features(self, x: Tensor) -> Tensor:
        place = torch.zeros_like(x[:, 0], dtype=torch.int64)
        for channel in x.long().mul(BINS).div(256, rounding_mode="floor").unbind(1):
            place = place * BINS + channel
        place = place.flatten(1)
        shares = x.new_zeros(len(x), self.length, dtype=torch.float32)
        shares.scatter_add_(1, place, shares.new_ones(place.shape) / place.shape[1])
        return shares.sqrt()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logits of each label, with shape (B, K), for uint8 pictures (B, C, H, W)."""
        f = self.features(x)
        return {name: head(f) for name, head in self.heads.items()}

    @torch.no_grad()
    def teach(self, x: np.ndarray, rows: np.ndarray, truth: dict[str, Tensor]) -> None:
        """Solves for the weights of all labels together."""
        device, every = next(self.parameters()).device, list[Any](self.heads.values())
        sizes = [len(head.bias) for head in every]
        hot = [F.one_hot(of, size) for of, size in zip(truth.values(), sizes, strict=True)]
        values = torch.cat(hot, dim=1).double()
        sums = torch.zeros(self.length + values.shape[1], dtype=torch.float64, device=device)
        products = sums.new_zeros(self.length, len(sums))
        for some in np.array_split(rows, -(-len(rows) // 1024)):
            f = self.features(pictures(x, some, device)).double()
            both = torch.cat((f, values[some]), dim=1)
            sums += both.sum(dim=0)
            products += f.T @ both
        mean = sums / len(rows)
        products -= len(rows) * torch.outer(mean[: self.length], mean)
        gram, cross = products.split([self.length, values.shape[1]], dim=1)
        gram.diagonal().add_(gram.diagonal().mean())
        weights = torch.linalg.solve(gram, cross)
        bias = mean[self.length :] - mean[: self.length] @ weights
        for head, w, b in zip(every, weights.T.split(sizes), bias.split(sizes), strict=True):
            head.weight.copy_(w)
            head.bias.copy_(b)


class Shapes(nn.Module):
    """Convolutions, each stage of half the size of the one before, and the means of all stages."""

    def __init__(self, channels: int, side: int, values: Labels) -> None:
        widths = [WIDTH * 2**k for k in range(max(2, int(math.log2(side)) - 1))]
        super().__init__()
        self.stages, self.norm = nn.ModuleList(), nn.BatchNorm1d(sum(widths))
        self.heads = heads(sum(widths), values)
        width = channels
        for k, wider in enumerate(widths):
            stage = []
            for narrow, stride in ((width, 1 if k == 0 else 2), (wider, 1)):
                conv = nn.Conv2d(narrow, wider, 3, stride, 1, bias=False)
                stage += [conv, nn.BatchNorm2d(wider), nn.ReLU()]
            self.stages.append(nn.Sequential(*stage))
            width = wider

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logits of each label, with shape (B, K), for uint8 pictures (B, C, H, W)."""
        h, means = x.float() / 127.5 - 1, []
        for stage in self.stages:
            h = stage(h)
            means.append(h.mean(dim=(2, 3)))
        features = self.norm(torch.cat(means, dim=1))
        return {name: head(features) for name, head in self.heads.items()}

    def teach(self, x: np.ndarray, rows: np.ndarray, truth: dict[str, Tensor]) -> None:
        """Minimises smoothed cross entropies, on pictures moved a little each time."""
        optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        order, side = np.random.default_rng(0), x.shape[-1]
        reach, device = side // 16, self.norm.weight.device
        told = f"teaching a judge of {', '.join(truth)}"
        self.train()
        for _ in trange(STEPS, desc=told, disable=None):
            some = rows[order.integers(0, len(rows), BATCH)]
            moved = F.pad(pictures(x, some, device).float(), (reach,) * 4, mode="replicate")
            top, left = order.integers(0, 2 * reach + 1, 2)
            logits = self(moved[..., top : top + side, left : left + side])
            losses = [
                F.cross_entropy(of_label, truth[name][some], label_smoothing=SMOOTHING)
                for name, of_label in logits.items()
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()


class Judge(nn.Module):
    """Reads each label, of known values, by colours or by shapes."""

    by_shapes: Tensor

    def __init__(self, channels: int, side: int, values: Labels) -> None:
        super().__init__()
        self.values = {name: list(known) for name, known in values.items()}
        self.colours, self.shapes = Colours(channels, values), Shapes(channels, side, values)
        self.register_buffer("by_shapes", torch.zeros(len(self.values), dtype=torch.bool))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logits of each label, with shape (B, K), for uint8 pictures (B, C, H, W)."""
        colours, shapes = self.colours(x), self.shapes(x)
        return {
            name: (shapes if by_shapes else colours)[name]
            for name, by_shapes in zip(self.values, self.by_shapes.tolist(), strict=True)
        }

    @torch.no_grad()
    def read(self, pictures: Tensor) -> dict[str, list[str]]:
        """What uint8 pictures (N, C, H, W) show, label by label."""
        device = self.by_shapes.device
        found: dict[str, list[str]] = {name: [] for name in self.values}
        for some in pictures.split(BATCH):
            for name, logits in self(some.to(device)).items():
                known = self.values[name]
                found[name] += [known[k] for k in logits.argmax(dim=1).tolist()]
        return found


def judge_of(data: DataModule, device: torch.device | str = "cpu") -> Judge | None:
    """The judge of the labels that the data have, or None; taught once and kept."""
    labels = data.labelled("train")
    if not labels:
        return None
    x = data.rows("train").x
    values = {name: sorted(set(column)) for name, column in labels.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge(x.shape[1], x.shape[-1], values).to(device)
    about = digest(VERSION, digest_of(x), dict(labels))
    path = data.cache / "judges" / f"{about[:32]}.safetensors"
    if not restored(judge, path):
        teach(judge, x, labels)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, part)
    return judge.eval()


def restored(judge: Judge, path: Path) -> bool:
    """Whether the file is there and is this judge's."""
    try:
        judge.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def teach(judge: Judge, x: np.ndarray, labels: Labels) -> None:
    """Both readers, and then which label is read by which."""
    device = judge.by_shapes.device
    truth = {}
    for name, known in judge.values.items():
        places = {value: k for k, value in enumerate(known)}
        truth[name] = torch.tensor([places[value] for value in labels[name]], device=device)
    mixed = np.random.default_rng(0).permutation(len(x))
    kept, rest = np.sort(mixed[: len(x) // KEPT]), np.sort(mixed[len(x) // KEPT :])
    scores = []
    for reader in (judge.colours, judge.shapes):
        reader.teach(x, rest, truth)
        reader.eval()
        hits = torch.zeros(len(truth), dtype=torch.int64)
        for rows in np.array_split(kept, -(-len(kept) // BATCH)):
            with torch.no_grad():
                logits = reader(pictures(x, rows, device))
            for k, name in enumerate(truth):
                hits[k] += (logits[name].argmax(dim=1) == truth[name][rows]).sum().cpu()
        scores.append(hits)
    judge.by_shapes.copy_(scores[1] > scores[0])


def pictures(x: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Some of the pictures, on a device."""
    return torch.from_numpy(np.ascontiguousarray(x[rows])).to(device)


def heads(length: int, values: Labels) -> nn.ModuleDict:
    """A linear layer for each label."""
    return nn.ModuleDict({name: nn.Linear(length, len(known)) for name, known in values.items()})
