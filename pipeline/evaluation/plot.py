"""A sweep as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["plot"]


def plot(found: list[dict[str, Any]], rows: list[dict[str, Any]], file: Path) -> None:
    """Scores against network evaluations, a line for each checkpoint, sampler and scale."""
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
    figure.savefig(file, dpi=120)
