"""`evaluate`: what a checkpoint is worth, with one sampler or a sweep of them.

Each point of a sweep is a JSON file of its own, written when it is finished and named after all
that decides it, so that a sweep goes on where it stopped.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from pipeline.data import DataModule
from pipeline.drawing import bar, choose, open_model
from pipeline.errors import UserError
from pipeline.evaluation.adherence import CLIP
from pipeline.evaluation.measure import DISTANCES, FEWEST, Measure, bits_of_held_out
from pipeline.generator import Generator, build, place
from pipeline.png import contact_sheet
from pipeline.referencing import read_features
from pipeline.samplers import Likelihood

__all__ = ["evaluate"]

VERSION = 1  # of what a result says: raise it when the same pictures would score otherwise
BIASED = 10_000  # pictures below which a Fréchet distance comes out too large
SCORES = (*DISTANCES, "inception_score", "clip_score", "retrieval")
WORST = 3  # classes that are printed

T = TypeVar("T")


def evaluate(args: Namespace) -> int:
    """Draw, score and write down; what is finished is kept at Ctrl-C."""
    choices = list(
        itertools.product(
            args.sampler or [None],
            numbers(args.steps, int, "--steps"),
            numbers(args.scale, float, "--scale"),
        )
    )
    checkpoints = args.checkpoint or [None]
    several = len(checkpoints) * len(choices) > 1
    check(args, several)
    features, clip = read_features(args.features), CLIP(args.clip) if args.clip else None
    likelihood = Likelihood()

    @functools.cache
    def measure_of(data: str) -> Measure:
        return Measure(open_data(json.loads(data), args.trust), features, args.number, clip)

    found: list[dict[str, Any]] = []
    with processes(args):
        try:
            for checkpoint in checkpoints:
                generator, about, path = open_model(args, checkpoint)
                generator.together = True
                for part in filter(None, (features, clip)):
                    part.to(generator.device)
                decisive = {
                    "sha256": digest(path),
                    "pictures": args.number,
                    "seed": args.seed,
                    "seeds": args.seeds,
                    "micro_batch": args.micro_batch,
                    "features": features.fingerprint(),
                    "clip": clip and clip.fingerprint(),
                    "version": VERSION,
                }
                if args.likelihood is not None:
                    decisive["likelihood"] = {
                        "pictures": args.likelihood,
                        "steps": likelihood.path.steps,
                        "probes": likelihood.probes,
                    }
                measure = functools.partial(measure_of, json.dumps(about["data"]))
                # once for a checkpoint: sampler and guidance have no part in it
                bits = functools.cache(
                    functools.partial(bits_of, generator, measure, likelihood, args)
                )
                for choice in choices:
                    settings = choose(generator, about, *choice, args.trust) | decisive
                    told = {"checkpoint": str(path), **settings}
                    found.append(result_of(generator, measure, bits, told, key_of(settings), args))
                    if not several and place()[0] == 0:
                        print(block(found[-1]))
        finally:
            if found and place()[0] == 0:
                finish(found, several, args)
    return 0


def check(args: Namespace, several: bool) -> None:
    """Says what is wrong before anything is drawn."""
    if args.number < FEWEST or args.seeds < 1:
        raise UserError(
            f"--number {args.number} must be at least {FEWEST}, and --seeds {args.seeds} at least "
            "1."
        )
    if args.likelihood is not None and args.likelihood < 2:
        raise UserError(
            f"--likelihood {args.likelihood} must be at least 2: one picture shows no error."
        )
    if several and (not args.out or is_file(args.out)):
        raise UserError(
            f"A sweep keeps each of its points: give --out FOLDER, not {args.out or 'none'}."
        )
    if args.wandb and not args.out:
        raise UserError("--wandb needs --out, the place where an offline run is kept.")


def is_file(out: str) -> bool:
    return Path(out).suffix == ".json"


def numbers(text: str | None, kind: type[T], option: str) -> Sequence[T | None]:
    """The numbers of a list such as "6,12,18"; without a list, one None."""
    try:
        return [kind(part) for part in text.split(",")] if text else [None]  # type: ignore
    except ValueError:
        raise UserError(
            f"{option} {text} is no list of numbers; write them with commas between, as 6,12,18."
        ) from None


@contextmanager
def processes(args: Namespace) -> Iterator[None]:
    """Joins the processes that torchrun has started, where it has; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if args.device == "auto" and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(settings: dict[str, Any]) -> str:
    """The name of a result: a digest of all that decides it."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_data(node: dict[str, Any], trust: Sequence[str]) -> DataModule:
    """The data of a checkpoint, if they are pictures."""
    data = build(node, trust)
    if len(data.shape) != 3:
        raise UserError(
            f"The model was trained on {type(data).__name__}, whose rows are vectors of "
            f"{data.shape[0]} numbers, and evaluate measures pictures."
        )
    return data


def result_of(
    generator: Generator,
    measure: Callable[[], Measure],
    bits: Callable[[], dict[str, float]],
    settings: dict[str, Any],
    key: str,
    args: Namespace,
) -> dict[str, Any]:
    """One point of the sweep, from its file where it was finished before."""
    file = place_of(args.out, settings, key)
    result = from_first(lambda: known(file, key))
    if result is None:
        of_true = bits()  # first, for it may ask for more pictures than there are
        scores, pictures, prompts = measured(generator, measure(), args)
        result = {"key": key, **settings, **scores, **of_true}
        result |= {"device": str(generator.device), "command": args.line}
        if file and place()[0] == 0:
            write(file, result)
            contact_sheet(pictures[:64], prompts[:64]).save(file.with_suffix(".png"))
    return result


def place_of(out: str | None, settings: dict[str, Any], key: str) -> Path | None:
    """The file of a result."""
    if not out or is_file(out):
        return Path(out) if out else None
    sampler, guidance = settings["sampler"], settings["guidance"] or {}
    name = f"{sampler['class']}-{sampler['steps']}-{guidance.get('scale', 1.0):g}-{key[:8]}.json"
    return Path(out) / name.lower()


def known(file: Path | None, key: str) -> dict[str, Any] | None:
    """The result in a file, if it is the one that is asked for."""
    if file is None or not file.is_file():
        return None
    try:
        result = json.loads(file.read_text("utf-8"))
    except ValueError:
        return None
    if not isinstance(result, dict) or result.get("key") != key:
        return None
    print(f"{file} was finished before.", file=sys.stderr)
    return result


def write(file: Path, result: dict[str, Any]) -> None:
    """Writes a JSON, whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2, ensure_ascii=False), "utf-8")
        os.replace(part, file)
    except OSError as error:
        raise UserError(
            f"--out {file} cannot be written to: {error.strerror}; name another."
        ) from error


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in every process."""
    box: list[Any] = [make() if place()[0] == 0 else None]
    if place()[1] > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def measured(
    generator: Generator, measure: Measure, args: Namespace
) -> tuple[dict[str, Any], Tensor, list[str]]:
    """The scores, their mean where there are several seeds; the last pictures and prompts."""
    start, repeats, pictures, prompts = time.perf_counter(), [], torch.empty(0), []
    with counted(generator) as calls:
        for k in range(args.seeds):
            seed = args.seed + k * args.number
            with bar(generator, args.number, args) as progress:
                sampler = generator.sampler
                progress.set_description(f"{type(sampler).__name__} {sampler.steps}, seed {seed}")
                scores, pictures, prompts = measure(
                    generator, seed, args.micro_batch, progress.watch
                )
            repeats.append(scores)
    drawn = args.seeds * generator.rounds(args.number, args.micro_batch) * args.micro_batch
    result = over(repeats, statistics.fmean) | {
        "spread": over(repeats, statistics.stdev) if args.seeds > 1 else None,
        "repeats": repeats,
        "evaluations": sum(calls) / drawn,
        "seconds": time.perf_counter() - start,
        "floor": measure.floor,
        "reference": measure.reference.about,
    }
    return result, pictures, prompts


def bits_of(
    generator: Generator, measure: Callable[[], Measure], likelihood: Likelihood, args: Namespace
) -> dict[str, float]:
    """Where asked for, the bits for each value of true pictures: their mean and its standard
    error.
    """
    if args.likelihood is None:
        return {}
    data, n, b = measure().data, args.likelihood, args.micro_batch
    silent = True if generator.place()[0] > 0 else None
    with tqdm(
        total=generator.rounds(n, b), desc="Likelihood", unit="batch", disable=silent
    ) as progress:
        found = bits_of_held_out(generator, data, n, likelihood, args.seed, b, progress.update)
    error = found.std().item() / math.sqrt(n)
    return {"bits_per_dim": found.mean().item(), "bits_per_dim_error": error}


def over(trees: list[Any], what: Callable[[list[float]], float]) -> Any:
    """A statistic of each number of equal dictionaries, at any depth."""
    if isinstance(trees[0], dict):
        return {key: over([tree[key] for tree in trees], what) for key in trees[0]}
    return what(trees)


@contextmanager
def counted(generator: Generator) -> Iterator[list[int]]:
    """How many rows the network is given in each call."""
    calls: list[int] = []
    network: Any = generator.denoiser.network
    hook = network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    try:
        yield calls
    finally:
        hook.remove()


def finish(found: list[dict[str, Any]], several: bool, args: Namespace) -> None:
    """The table and the plot of a sweep, and the W&B run."""
    rows = [row(result) for result in found]
    if several:
        print(table(rows))
        plot(found, Path(args.out) / "sweep.png")
        print(f"One JSON for each line, a sheet beside it, and sweep.png are in {args.out}")
    for said in dict.fromkeys(map(context, found)):
        print(said)
    if args.wandb:
        folder = Path(args.out).parent if is_file(args.out) else Path(args.out)
        to_wandb(found, rows, folder, args.line)


def block(result: dict[str, Any]) -> str:
    """A result line by line, each score beside what it is to be compared with."""
    lines = [f"{result['pictures']} pictures of what was held out of training"]
    spread = result["spread"] or {}
    width = max(10, *(len(name) for name in (*SCORES, "bits_per_dim") if name in result))
    for name, value in result.get("accuracy", {}).items():
        shuffled, chance = result["shuffled"][name], result["chance"][name]
        lines.append(
            f"{name:>{width}} {value:.3f}{plus_minus(spread.get('accuracy', {}).get(name))}   "
            f"prompts shuffled {shuffled:.3f}   chance {chance:.3f}"
        )
    for name in SCORES:
        if name in result:
            ends = ""
            if name == "kernel":
                ends = f" (95 %: {result['kernel_low']:.4g} to {result['kernel_high']:.4g})"
            if name == "inception_score":
                ends = f" (over splits: ± {result['inception_score_deviation']:.2g})"
            lines.append(
                f"{name:>{width}} {result[name]:.4g}{plus_minus(spread.get(name))}{ends}   "
                f"true pictures {result['floor'].get(name, math.nan):.4g}"
            )
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


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Scores against network evaluations, a line for each checkpoint, sampler and scale."""
    panels = {"frechet": f"Fréchet distance, {found[0]['reference']['features']}"}
    if all("accuracy" in result for result in found):
        panels["accuracy"] = "attribute accuracy"
    figure = Figure(figsize=(6.4 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for result in found:
            line = row(result)
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
