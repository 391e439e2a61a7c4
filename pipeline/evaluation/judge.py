"""A judge: a small classifier that reads back from pictures what the data say of them.

It is taught on true training pictures alone, once for each data set, and kept. It errs: how often
it is right on true held-out pictures, which it has not seen either, stands beside every score, and
no more can be expected of drawn ones.
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

VERSION = 1  # of the network and how it is taught
STEPS, BATCH, RATE = 2000, 64, 3e-3
WIDTH = 24
SMOOTHING = 0.1

Labels = Mapping[str, Sequence[str]]


class Judge(nn.Module):
    """Convolutions, each stage of half the size of the one before, and a linear layer for each
    label over the means of all stages: style is told from small parts, subject from large ones.

    Arguments:
        channels: The number C of channels of a picture.
        side: The side of a picture.
        values: The values of each label.
    """

    def __init__(self, channels: int, side: int, values: Labels) -> None:
        super().__init__()
        self.values = {name: list(known) for name, known in values.items()}
        widths = [WIDTH * 2**k for k in range(max(2, int(math.log2(side)) - 1))]
        self.stages = nn.ModuleList()
        width = channels
        for k, wider in enumerate(widths):
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(width, wider, 3, 1 if k == 0 else 2, 1, bias=False),
                    nn.BatchNorm2d(wider),
                    nn.ReLU(),
                    nn.Conv2d(wider, wider, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(wider),
                    nn.ReLU(),
                )
            )
            width = wider
        self.norm = nn.BatchNorm1d(sum(widths))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(sum(widths), len(known)) for name, known in self.values.items()}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The logits of each label, with shape (B, K), for uint8 pictures (B, C, H, W)."""
        h, means = x.float() / 127.5 - 1, []
        for stage in self.stages:
            h = stage(h)
            means.append(h.mean(dim=(2, 3)))
        features = self.norm(torch.cat(means, dim=1))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: Tensor) -> dict[str, list[str]]:
        """What uint8 pictures (N, C, H, W) show, label by label."""
        device = self.norm.weight.device
        found: dict[str, list[str]] = {name: [] for name in self.values}
        for some in pictures.split(BATCH):
            for name, logits in self(some.to(device)).items():
                known = self.values[name]
                found[name] += [known[k] for k in logits.argmax(dim=1).tolist()]
        return found

    def adherence(
        self, pictures: Tensor, wanted: Labels, order: np.random.Generator
    ) -> dict[str, Any]:
        """Read the labels back from pictures.

        Arguments:
            pictures: uint8, with shape (N, C, H, W).
            wanted: What was asked of each, label by label.
            order: Decides how prompts are shuffled.

        Returns:
            Plain numbers: the "accuracy" of each label, of their "mean" and of "all" together; the
            same for the prompts in another order, "shuffled"; and "chance".
        """
        found, n = self.read(pictures), len(pictures)
        places: list[int] = order.permutation(n).tolist()
        shuffled = {name: [column[k] for k in places] for name, column in wanted.items()}
        share = {name: 1 / len(known) for name, known in self.values.items()}
        return {
            "accuracy": right(found, wanted),
            "shuffled": right(found, shuffled),
            "chance": share
            | {"mean": sum(share.values()) / len(share), "all": math.prod(share.values())},
        }


def right(found: Labels, wanted: Labels) -> dict[str, float]:
    """The share of each label that is right, the mean of these, and the share of all right."""
    hits = {name: np.array(found[name]) == np.array(wanted[name]) for name in found}
    part = {name: float(hit.mean()) for name, hit in hits.items()}
    every = np.all(list(hits.values()), axis=0)
    return part | {"mean": float(np.mean(list(part.values()))), "all": float(every.mean())}


def judge_of(data: DataModule, device: torch.device | str = "cpu") -> Judge | None:
    """The judge of the labels that the data have, read where it was taught before; None where they
    have none.

    Arguments:
        data: The data module.
        device: Where it is taught and reads.
    """
    labels = data.labelled("train")
    if not labels:
        return None
    x = data.rows("train").x
    values = {name: sorted(set(column)) for name, column in labels.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge(x.shape[1], x.shape[-1], values).to(device)
    about = digest(VERSION, STEPS, BATCH, RATE, WIDTH, SMOOTHING, digest_of(x), dict(labels))
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
    """Minimises the cross entropies of all labels, smoothed, on pictures that are moved a little
    each time.
    """
    device = judge.norm.weight.device
    places = {
        name: {value: k for k, value in enumerate(known)} for name, known in judge.values.items()
    }
    truth = {
        name: torch.tensor([places[name][value] for value in column], device=device)
        for name, column in labels.items()
    }
    optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    order, reach = np.random.default_rng(0), x.shape[-1] // 16
    judge.train()
    for _ in trange(STEPS, desc=f"teaching a judge of {', '.join(labels)}", disable=None):
        rows = order.integers(0, len(x), BATCH)
        pictures = torch.from_numpy(np.ascontiguousarray(x[rows])).to(device)
        moved = F.pad(pictures.float(), (reach,) * 4, mode="replicate")
        top, left = order.integers(0, 2 * reach + 1, 2)
        side = pictures.shape[-1]
        logits = judge(moved[..., top : top + side, left : left + side])
        loss = torch.stack(
            [
                F.cross_entropy(of_label, truth[name][rows], label_smoothing=SMOOTHING)
                for name, of_label in logits.items()
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
