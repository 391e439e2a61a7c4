"""Figures for people, labelled and readable in grey, as PNG files that say how they were made."""

import csv
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import whole
from pipeline.mcmc.targets import Target
from pipeline.tracking import before

__all__ = [
    "Metrics",
    "curves",
    "grid",
    "pairs",
    "paths",
    "read_metrics",
    "save",
    "scores",
    "traces",
]

Metrics = dict[str, tuple[list[int], list[float]]]  # by name: the steps, and the values at them

STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # of a line, beside its colour
MARKED = 40  # the most points of a line that are marked
PLOTTED = 4  # coordinates, the first ones
LEVELS = (-8.0, -4.5, -2.0, -0.5)  # log p below its maximum: of a Gaussian at 4, 3, 2 and 1 std


def read_metrics(file: Path) -> Metrics:
    """What stands in a run's `csv/metrics.csv`; rows that a kill has torn are left out.

    Raises:
        UserError: There is no such file, or it is no table of numbers.
    """
    if not file.is_file():
        raise UserError(f"There is no {file}; give the folder of a run that logs to CSV.")
    found: Metrics = {}
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                for name, text in row.items() if before(row, sys.maxsize) else ():
                    if text and name not in ("epoch", "step"):
                        steps, values = found.setdefault(name, ([], []))
                        steps.append(int(row["step"]))
                        values.append(float(text))
    except (csv.Error, ValueError) as error:
        raise UserError(f"{file} is no table of numbers: {error}.") from error
    return found


def curves(metrics: Metrics, panels: Mapping[str, Mapping[str, str]]) -> Figure:
    """Metrics over the steps of training, a panel below the other.

    Arguments:
        panels: By its title, the metrics of each panel, and what they are called.
    """
    figure = Figure(figsize=(7.2, 2.1 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for k, (name, label) in enumerate(names.items()):
            dash, marker = STYLES[k % len(STYLES)]
            marks = {"marker": marker, "markersize": 4} if len(metrics[name][0]) <= MARKED else {}
            how: Any = {"color": shade(k, len(names)), "label": label, "linewidth": 1.2, **marks}
            axis.plot(*metrics[name], dash, **how)
        if "loss" in title and all(min(metrics[name][1]) > 0 for name in names):
            axis.set_yscale("log")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8, loc="upper right")
    axes[-1].set_xlabel("training step")
    return figure


def shade(k: int, n: int) -> Any:
    """The k-th of n colours, the last one dark."""
    return colormaps["cividis"](0.6 * (n - 1 - k) / max(n - 1, 1))


def paths(target: Target, panels: Mapping[str, Tensor]) -> Figure:
    """Chains of the plane over contours of their law, each from its circle to its square.

    Arguments:
        target: The law, with a density.
        panels: By its title, the points of a panel's chains, with shape (draws, chains, 2).
    """
    points = torch.cat([x.flatten(0, 1) for x in panels.values()])
    low, high = points.amin(dim=0), points.amax(dim=0)
    ends = torch.stack((low, high)) + 0.1 * torch.stack((low - high, high - low))
    x, y = (torch.linspace(a, b, 200, dtype=points.dtype) for a, b in ends.T.tolist())
    log_prob = target.log_prob(torch.cartesian_prod(x, y)).reshape(200, 200).T
    log_prob = (log_prob - log_prob[log_prob.isfinite()].max()).nan_to_num(-1e9, neginf=-1e9)
    figure = Figure(figsize=(4.4 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (title, chains) in zip(axes, panels.items(), strict=True):
        axis.contourf(x, y, log_prob, (*LEVELS, 1.0), cmap="Greys", vmin=-9, vmax=30)
        axis.contour(x, y, log_prob, LEVELS, colors="0.6", linewidths=0.7, linestyles="solid")
        for k, path in enumerate(chains.unbind(dim=1)):
            color, dash = shade(k, chains.shape[1]), STYLES[k % len(STYLES)][0]
            axis.plot(*path.T, dash, color=color, linewidth=1.1)
            for marker, point in (("o", path[0]), ("s", path[-1])):
                axis.plot(*point, marker, color=color, markersize=7, markeredgecolor="white")
        axis.set(title=title, xlabel="x_0")
    axes[0].set_ylabel("x_1")
    return figure


def traces(x: Tensor) -> Figure:
    """Each coordinate of (draws, chains, D) against the step, a line for each chain."""
    columns = x.flatten(2)[:, :, :PLOTTED].cpu().unbind(dim=2)
    figure = Figure(figsize=(9, 1.8 * len(columns)), layout="constrained")
    axes = figure.subplots(len(columns), squeeze=False, sharex=True)[:, 0]
    for i, (axis, column) in enumerate(zip(axes, columns, strict=True)):
        axis.plot(column.numpy(), linewidth=0.4, alpha=0.7)
        axis.set_ylabel(f"x_{i}")
    axes[-1].set_xlabel("step")
    return figure


def pairs(x: Tensor) -> Figure:
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
    return figure


def scores(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Figure:
    """Of a sweep: scores against evaluations, a line for each checkpoint, sampler and scale."""
    panels = {"frechet": f"Fréchet distance, {found[0]['reference']['features']}"}
    if all("accuracy" in result for result in found):
        panels["accuracy"] = "attribute accuracy"
    figure = Figure(figsize=(6.4 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for line in rows:
            run = Path(line["checkpoint"]).parent.name
            points = lines.setdefault(f"{run} {line['sampler']}, scale {line['scale']:g}", [])
            points.append((line["evaluations"], line[name], line[f"{name}_spread"] or 0.0))
        for label, points in sorted(lines.items()):
            x, y, spread = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=label)
        if name == "frechet":
            floor = found[0]["floor"][name]
            axis.axhline(floor, color="grey", linestyle=":", label="true pictures")
        axis.set(xlabel="network evaluations for a picture", ylabel=title, xscale="log")
        asked = sorted({result["evaluations"] for result in found})
        axis.set_xticks(asked, [f"{n:g}" for n in asked], minor=False)
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=8)
    return figure


def grid(
    pictures: Tensor, rows: Sequence[str], columns: Sequence[str], across: str, down: str = ""
) -> Figure:
    """Pictures in rows and columns, each pixel a square.

    Arguments:
        pictures: uint8, with shape (rows, columns, C, H, W), C = 1 or 3.
        rows, columns: What stands before each row, and above each column.
        across, down: What the columns are, and what the rows are.
    """
    n, m, _, height, width = pictures.shape
    size = (0.95 * m + 1.8, 0.95 * n * height / width + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.02, wspace=0, hspace=0)  # type: ignore
    axes = figure.subplots(n, m, squeeze=False)
    text: Any = {"fontsize": 8, "parse_math": False}  # a prompt may hold a $
    for i in range(n):
        for j in range(m):
            picture = pictures[i, j].movedim(0, -1).expand(height, width, 3).cpu().numpy()
            axes[i, j].imshow(picture, interpolation="nearest")
            axes[i, j].set(xticks=[], yticks=[])
        label = textwrap.fill(rows[i], 22)
        axes[i, 0].set_ylabel(label, rotation=0, ha="right", va="center", **text)
    for axis, label in zip(axes[0], columns, strict=True):
        axis.set_title(label, **text)
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(down, fontsize=9)
    return figure


def save(figure: Figure, file: Path, text: Mapping[str, str]) -> None:
    """Write a figure as a PNG, whole or not at all, with words in its text fields."""
    with whole(file) as part:
        figure.savefig(part, format="png", dpi=110, metadata=dict(text))
