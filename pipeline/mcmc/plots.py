"""Draws as pictures."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["plot_pairs", "plot_traces"]

PLOTTED = 4  # coordinates, the first ones


def plot_traces(x: Tensor, file: Path) -> None:
    """Each coordinate against the step, a line for each chain."""
    columns = x.flatten(2)[:, :, :PLOTTED].cpu().unbind(dim=2)
    figure = Figure(figsize=(9, 1.8 * len(columns)), layout="constrained")
    axes = figure.subplots(len(columns), squeeze=False, sharex=True)[:, 0]
    for i, (axis, column) in enumerate(zip(axes, columns, strict=True)):
        axis.plot(column.numpy(), linewidth=0.4, alpha=0.7)
        axis.set_ylabel(f"x_{i}")
    axes[-1].set_xlabel("step")
    figure.savefig(file, dpi=120)


def plot_pairs(x: Tensor, file: Path) -> None:
    """Each coordinate's histogram, and each pair's points: 4,000 of all draws, evenly spaced."""
    points = x.flatten(2)[:, :, :PLOTTED].flatten(0, 1).cpu()
    points = points[torch.linspace(0, len(points) - 1, min(len(points), 4000)).long()].numpy()
    n = points.shape[1]
    figure = Figure(figsize=(2.2 * n + 1, 2.2 * n + 1), layout="constrained")
    axes = figure.subplots(n, n, squeeze=False)
    for i in range(n):
        for j in range(n):
            if i == j:
                axes[i, i].hist(points[:, i], bins=60)
            elif j < i:
                axes[i, j].plot(points[:, j], points[:, i], ".", markersize=1, alpha=0.5)
            else:
                axes[i, j].axis("off")
        axes[i, 0].set_ylabel(f"x_{i}")
        axes[n - 1, i].set_xlabel(f"x_{i}")
    figure.savefig(file, dpi=120)
