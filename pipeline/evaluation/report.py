"""Results in words: line by line, as a table, and as a run of Weights & Biases."""

import itertools
import math
from pathlib import Path
from typing import Any

from pipeline.evaluation.measure import DISTANCES
from pipeline.evaluation.store import Store
from pipeline.figures import save, scores

__all__ = ["block", "context", "row", "summarise"]

BIASED = 10_000  # pictures below which a Fréchet distance comes out too large
SCORES = (*DISTANCES, "inception_score", "clip_score", "retrieval")
WORST = 3  # classes that are printed


def summarise(
    found: list[dict[str, Any]], store: Store, several: bool, wandb: str | None = None
) -> None:
    """The table and plot of several, what the numbers mean, and a W&B run of a command."""
    rows = [row(result) for result in found]
    if several:
        print(table(rows))
        save(scores(found, rows), store.folder / "sweep.png", {})
        print(f"One JSON for each line, a sheet beside it, and sweep.png are in {store.folder}")
    for said in dict.fromkeys(map(context, found)):
        print(said)
    if wandb:
        to_wandb(found, rows, store.folder, wandb)


def block(result: dict[str, Any]) -> str:
    """A result line by line, each score beside what it is to be compared with."""
    lines = [f"{result['pictures']} pictures of what was held out of training"]
    spread = result["spread"] or {}
    width = max(10, *(len(name) for name in (*SCORES, "bits_per_dim") if name in result))
    for name, value in result.get("accuracy", {}).items():
        shuffled, chance = result["shuffled"][name], result["chance"][name]
        of_true = result["floor"].get("accuracy", {})
        true = f"   true pictures {of_true[name]:.3f}" if name in of_true else ""
        lines.append(
            f"{name:>{width}} {value:.3f}{plus_minus(spread.get('accuracy', {}).get(name))}   "
            f"prompts shuffled {shuffled:.3f}   chance {chance:.3f}{true}"
        )
    if result.get("grain") is not None:
        value = f"{result['grain']:.3g}{plus_minus(spread.get('grain'))}"
        lines.append(f"{'grain':>{width}} {value}   grey levels on the ground; true pictures 0")
    for name in SCORES:
        if name in result:
            ends = ""
            if name == "kernel":
                ends = f" (95 %: {result['kernel_low']:.4g} to {result['kernel_high']:.4g})"
            if name == "inception_score":
                ends = f" (over splits: ± {result['inception_score_deviation']:.2g})"
            true = result["floor"].get(name)
            beside = "too few true pictures" if true is None else f"true pictures {true:.4g}"
            value = f"{result[name]:.4g}{plus_minus(spread.get(name))}{ends}"
            lines.append(f"{name:>{width}} {value}   {beside}")
    if "bits_per_dim" in result:
        error = plus_minus(result["bits_per_dim_error"])
        lines.append(f"{'bits_per_dim':>{width}} {result['bits_per_dim']:.4g}{error}")
    if "frechet_by_class" in result:
        lines.append(worst(result))
    return "\n".join(lines)


def worst(result: dict[str, Any]) -> str:
    """The classes of largest Fréchet distance."""
    of_class, floor = result["frechet_by_class"], result["floor"].get("frechet_by_class", {})
    told = [
        f"{name} {of_class[name]:.4g} (true pictures {floor.get(name, math.nan):.4g})"
        for name in sorted(of_class, key=of_class.__getitem__, reverse=True)[:WORST]
    ]
    return f"frechet within the worst of {len(of_class)} classes: {', '.join(told)}"


def plus_minus(spread: float | None) -> str:
    return "" if spread is None else f" ± {spread:.2g}"


def context(result: dict[str, Any]) -> str:
    """What the numbers mean, and a warning where they mean little."""
    about, n = result["reference"], result["floor"]["number"]
    seeds = result["seeds"]
    lines = [
        f"features: {about['features']} ({about['protocol']})",
        f"reference: {about['pictures']} of split {about['split']!r}, sha256 {about['data'][:16]}",
        f"floor: {n} true pictures that training did not see, against the same reference",
        f"seeds: {seeds}; what stands behind ± is the standard deviation over them"
        if seeds > 1
        else "seeds: 1, so the spread is not known; --seeds 3 shows it",
    ]
    if "accuracy" in result["floor"]:
        lines.append(
            "accuracy: by a judge taught on true training pictures alone; beside each score, how "
            "often it is right on the floor's"
        )
    if "ladder" in result:
        rungs = ", ".join(f"{value:.4g} {name}" for name, value in result["ladder"].items())
        lines.append(f"ladder: frechet of the true pictures {rungs}")
    if "likelihood" in result:
        how = result["likelihood"]
        lines.append(
            f"bits_per_dim: of {how['pictures']} true pictures that training did not see, without "
            f"guidance, in {how['steps']} steps with {how['probes']} probe each; what stands "
            "behind ± is the standard error"
        )
    if "inception_score" in result:
        lines.append(
            "inception_score: the larger the more pictures; only that of Inception-v3, of 50,000 "
            "pictures, may be compared with published ones"
        )
    if n < result["pictures"]:
        lines.append(f"warning: the floor is of {n} pictures, all there are; with more it is less")
    if result["pictures"] < BIASED:
        lines.append(
            f"warning: with fewer than {BIASED:,} pictures a Fréchet distance is too large, the "
            "more so the fewer: compare it with the floor, and with others of as many pictures"
        )
    return "\n".join(lines)


def row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as one line of a table."""
    spread, guidance = result["spread"] or {}, result["guidance"] or {}
    line = {
        "checkpoint": result["checkpoint"],
        "sampler": result["sampler"]["class"],
        "steps": result["sampler"]["steps"],
        "scale": guidance.get("scale", 1.0),
        "evaluations": result["evaluations"],
        "pictures": result["pictures"],
    }
    if "accuracy" in result:
        line |= {"accuracy": result["accuracy"]["mean"], "all": result["accuracy"]["all"]}
        line["accuracy_spread"] = spread.get("accuracy", {}).get("mean")
    of_true = ("bits_per_dim", "bits_per_dim_error")
    line |= {name: result[name] for name in (*SCORES, *of_true) if name in result}
    line |= {"frechet_spread": spread.get("frechet"), "frechet_floor": result["floor"]["frechet"]}
    return line


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns."""
    names = columns(rows)
    cells = [names] + [[shown(one.get(name)) for name in names] for one in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [map(str.rjust, line, widths) for line in cells]
    return "\n".join("  ".join(line) for line in lines)


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """What any of the rows has; models of other data have other scores."""
    return list(dict.fromkeys(itertools.chain(*rows)))


def shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def to_wandb(
    found: list[dict[str, Any]], rows: list[dict[str, Any]], folder: Path, line: str
) -> None:
    """All points as a table, and the one of least Fréchet distance as the summary."""
    from lightning.pytorch.loggers import WandbLogger

    from pipeline.tracking import loggers

    config = {"command": line, "reference": found[0]["reference"], "seeds": found[0]["seeds"]}
    for logger in loggers(folder, "conditional-pipeline", config):
        if isinstance(logger, WandbLogger):
            names = columns(rows)
            data = [[one.get(name) for name in names] for one in rows]
            logger.log_table("evaluation", columns=names, data=data)
            best = min(rows, key=lambda one: one["frechet"])
            logger.experiment.summary.update({f"eval/{name}": v for name, v in best.items()})
            logger.experiment.finish()
