"""`show`: a run, a sampler or a chain as a labelled picture."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from pipeline.doors.shared import add_model, add_model_file, add_number, choose, open_model
from pipeline.errors import UserError
from pipeline.files import check_writable, whole

SUMMARY = "show a run, a sampler or a chain as a labelled picture"
FREE = ("sampler.", "guidance.", "target.")  # how further options begin
DESCRIPTION = """\
Draw a figure into a PNG, which says in its text fields how it was made."""
EPILOG = 'example: python -m pipeline show denoising "a small red circle"'

COLUMNS = 8  # of pictures, at most
SCALES, STEPS = (0.0, 1.0, 2.0, 4.0), (2, 4, 8)  # of guidance, beside the run's own

Made = tuple[Any, dict[str, Any]]  # a figure, and how it was made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (said, add, *_) in KINDS.items():
        # "resolve": what a kind takes several of is said again
        how: Any = {"description": f"{said[:1].upper()}{said[1:]}.", "conflict_handler": "resolve"}
        own = kinds.add_parser(name, help=said, **how)
        add(own)
        what = f"the PNG, replaced where it is there (default: a new outputs/{name}.png)"
        own.add_argument("--out", metavar="FILE", help=what)


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Make one figure, write it, and say where it is."""
    from pipeline.distributed import join
    from pipeline.figures import save

    *_, free, make = KINDS[args.kind]
    for word in options:
        if word.startswith("--") and not word[2:].startswith(free):
            raise UserError(f"There is no option {word} of show {args.kind}; see --help.")
    args.out = out = place(args.out, args.kind)
    check_writable(out.parent, out)
    with join(getattr(args, "device", "cpu")) as args.device:
        figure, made = make(args, options)
    title = "; ".join([args.kind, *map(str, made.get("prompts", ()))])
    about = json.dumps({"kind": args.kind, **made, "command": line}, ensure_ascii=False)
    save(figure, out, {"Title": title, "Settings": about})
    print(f"{args.kind} is in {out}")
    return 0


def place(out: str | None, name: str) -> Path:
    """The file to write: by default one that is not there yet."""
    if out is None:
        names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2)))
        files = (Path("outputs") / f"{one}.png" for one in names)
        return next(file for file in files if not file.exists())
    if not out.endswith(".png"):
        raise UserError(f"--out {out}: a PNG is written; name a file that ends in .png.")
    return Path(out)


def add_run(parser: argparse.ArgumentParser) -> None:
    what = "the folder of a run (default: the newest run)"
    parser.add_argument("run", nargs="?", metavar="RUN", help=what)


def show_curves(args: argparse.Namespace, options: list[str]) -> Made:
    from pipeline.checkpoint import locate
    from pipeline.figures import curves, read_metrics

    run = Path(args.run) if args.run else locate(None).parent
    metrics = read_metrics(run / "csv" / "metrics.csv")
    if "train/loss" not in metrics:
        raise UserError(f"{run}/csv/metrics.csv has no train/loss yet; let the run go on.")
    panels = {
        "loss": {"train/loss": "train/loss", "val/loss": "val/loss"},
        "val/loss by noise": bands(run, sorted(k for k in metrics if k.startswith("val/band_"))),
        "learning rate": {"train/lr": "train/lr"},
    }
    for title, names in panels.items():
        panels[title] = {name: said for name, said in names.items() if name in metrics}
    panels = {title: names for title, names in panels.items() if names}
    return curves(metrics, panels), {"run": str(run), "panels": panels}


def bands(run: Path, metrics: list[str]) -> dict[str, str]:
    """The noise ratios of each band of a run's objective, from low to high, by its metric; of an
    objective that is not of ours their names alone.
    """
    import torch

    from pipeline.building import OURS, Config, make
    from pipeline.experiment import newest_config
    from pipeline.objectives import DSM
    from pipeline.schedules import Schedule

    if not metrics:
        return {}
    try:
        config = Config([newest_config(run)])
        objective = make(config.resolve("model.objective", DSM, trust=(OURS,)))
        schedule = make(config.resolve("model.denoiser.schedule", Schedule, trust=(OURS,)))
    except UserError:
        return {name: name for name in metrics}
    t = torch.linspace(0, 1, 8193, dtype=torch.float64)
    band, ratio = objective.band(schedule, t), schedule.ratio(t)
    within = {name: ratio[band == k] for k, name in enumerate(objective.bands)}
    return {f"val/{k}": f"σ/α {r[0]:.2g} to {r[-1]:.2g}" for k, r in within.items() if len(r)}


def add_langevin(parser: argparse.ArgumentParser) -> None:
    what = "a law of the plane (default: %(default)s); any of its arguments can be set by "
    what += "--target.KEY VALUE"
    default = "conf/target/mixture.yaml"
    parser.add_argument("--target", metavar="YAML", default=default, help=what)
    what = "the step μ of both kernels (default: %(default)s)"
    parser.add_argument("--step-size", type=float, default=0.05, metavar="MU", help=what)
    add_number(parser, "--chains", "N", 3, "chains of each kernel")
    add_number(parser, "--draws", "N", 50, "steps of each chain")
    add_number(parser, "--seed", "SEED", 0, "the seed")


def show_langevin(args: argparse.Namespace, options: list[str]) -> Made:
    from pipeline.building import Config, Text, brief, make
    from pipeline.figures import paths
    from pipeline.mcmc import MALA, ULA, Target, sample

    if not args.step_size > 0:
        raise UserError(f"--step-size {args.step_size:g} must be positive.")
    config = Config()
    config.set("target", Text(args.target), f"--target {args.target}")
    config.add(options)
    target = make(config.resolve("target", Target))
    if (dim := getattr(target, "dim", None) or 2) != 2:
        raise UserError(f"--target {args.target} has {dim} coordinates; name a law of the plane.")
    told = {"chains": args.chains, "draws": args.draws, "seed": args.seed}
    kernels = ULA(args.step_size), MALA(args.step_size)
    ula, mala = (sample(target, kernel, dim=2, warmup=0, **told) for kernel in kernels)
    assert mala.acceptance is not None
    panels = {
        f"ULA, the lecture's (1), μ = {args.step_size:g}": ula.x,
        f"MALA, the same μ: {mala.acceptance.mean():.0%} accepted": mala.x,
    }
    about = {"target": brief(target), "step_size": args.step_size, **told}
    return paths(target, panels), about


def add_prompts(parser: argparse.ArgumentParser) -> None:
    what = "what to draw, all with one seed (default: some prompts of the run)"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=what)
    add_model(parser)


def opened(
    args: argparse.Namespace, options: list[str], number: int, path: str | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """A checkpoint of pictures, what draws from it as was asked, and that in words, with the
    prompts: those given, or so many of the run's.
    """
    checkpoint, generator = open_model(path or args.checkpoint, args.device, args.trust, args.ema)
    prompts = args.prompts or checkpoint.prompts[:number]
    if not generator.codec.pictures:
        kind = generator.codec.plural
        raise UserError(f"{checkpoint.path} is a model of {kind}, and this shows pictures.")
    if args.prompts and generator.conditioning is None:
        raise UserError(
            f"{checkpoint.path} was trained without a condition and takes no prompt, such as "
            f"{prompts[0]!r}: leave it out."
        )
    if not prompts or not all(map(str.strip, args.prompts)):
        raise UserError("A prompt is empty, or there is none; say what to draw.")
    args.micro_batch = max(args.micro_batch, len(prompts))
    how = (args.sampler, args.guidance, args.steps, args.scale, options)
    about = choose(generator, checkpoint, *how)
    about |= {"seed": args.seed, "ema": args.ema, "micro_batch": args.micro_batch}
    return checkpoint, generator, {"checkpoint": str(checkpoint.path), "prompts": prompts, **about}


def draw(generator: Any, prompts: list[str], args: argparse.Namespace) -> Any:
    """A picture of each prompt, with shape (prompts, C, H, W)."""
    return next(iter(generator(prompts, [args.seed] * len(prompts), args.micro_batch)))


def show_denoising(args: argparse.Namespace, options: list[str]) -> Made:
    import torch

    from pipeline.figures import grid
    from pipeline.png import contact_sheet

    _, generator, about = opened(args, options, 3)
    prompts = about["prompts"]
    ratios, noisy, clean = trajectory(generator, prompts, args)
    words = [f"{ratio:.2g}" for ratio in ratios]
    frames = []
    for word, *pair in zip(words, noisy, clean, strict=True):
        captions = [f"noise ratio {word}"] * len(prompts) + prompts
        frames.append(contact_sheet(torch.cat(pair), captions, len(prompts)))
    film: Any = {"save_all": True, "append_images": frames[1:], "loop": 0}
    film["duration"] = [250] * (len(frames) - 1) + [2500]  # milliseconds
    with whole(args.out.with_suffix(".gif")) as part:
        frames[0].save(part, format="GIF", **film)
    print(f"The animation is in {args.out.with_suffix('.gif')}")
    kept = evenly(range(len(ratios)))
    pictures = torch.stack((noisy[kept], clean[kept])).permute(2, 0, 1, 3, 4, 5).flatten(0, 1)
    rows = [text for prompt in prompts for text in (prompt, "")]
    across = "noise ratio σ/α; of each prompt x_t above, what the denoiser makes of it below"
    return grid(pictures, rows, [words[k] for k in kept], across), about


def trajectory(
    generator: Any, prompts: list[str], args: argparse.Namespace
) -> tuple[list[float], Any, Any]:
    r"""What a sampler passes through: the noise ratio at each of its N times; :math:`x_t` there,
    scaled to :math:`\alpha^2 + \sigma^2 = 1`; what the denoiser makes of it, the last what is
    drawn. Both are rows, uint8 with shape (N, prompts, C, H, W).
    """
    import torch

    from pipeline.noise import PictureNoise
    from pipeline.samplers import Adaptive, State

    sampler, n, decode = generator.sampler, len(prompts), generator.codec.decode
    if isinstance(sampler, Adaptive):
        raise UserError("Adaptive gives each picture times of its own; name another --sampler.")
    seeds, states, noisy, clean = [args.seed] * n, list[State](), [], []
    x = next(iter(generator.draw(prompts, seeds, args.micro_batch, states.append)))
    denoiser, u = generator.guided(), generator.embed(prompts)
    times = sampler.times(denoiser)
    with torch.inference_mode():
        start = sampler.init(denoiser, torch.empty_like(x), times[0], u, PictureNoise(seeds))
        for t, state in zip(times, [start, *states[:-1]], strict=True):
            alpha_t, sigma_t = denoiser.schedule.at(t)
            noisy.append(decode(state.x[:n] / (alpha_t**2 + sigma_t**2) ** 0.5))
            clean.append(decode(denoiser(state.x[:n], t, u)))
    clean[-1] = decode(x)
    return denoiser.schedule.ratio(times).tolist(), torch.stack(noisy), torch.stack(clean)


def evenly(found: Any) -> list[Any]:
    """At most `COLUMNS` of what there is, the first and the last among them."""
    k = min(len(found), COLUMNS)
    return [found[round(i * (len(found) - 1) / max(k - 1, 1))] for i in range(k)]


def add_guidance(parser: argparse.ArgumentParser) -> None:
    add_prompts(parser)
    what = "scales with commas between (default: 0,1,2,4 and the run's own)"
    parser.add_argument("--scale", type=numbers, metavar="W,…", help=what)
    what = "numbers of steps with commas between (default: 2,4,8 and the run's own)"
    parser.add_argument("--steps", type=integers, metavar="N,…", help=what)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def show_guidance(args: argparse.Namespace, options: list[str]) -> Made:
    import torch

    from pipeline.figures import grid

    scales, steps = args.scale, args.steps
    args.scale = args.steps = None  # first as the run has them
    checkpoint, generator, about = opened(args, options, 1)
    if generator.conditioning is None:
        raise UserError(f"{checkpoint.path} was trained without a condition: nothing guides it.")
    if len(prompts := about["prompts"]) > 1:
        raise UserError(f"{len(prompts)} prompts were given, and this is a figure of one.")
    own = getattr(generator.guidance, "scale", 1.0), generator.sampler.steps
    axes = sorted({*(scales or (*SCALES, own[0]))}), sorted({*(steps or (*STEPS, own[1]))})
    cells = []
    for scale, n in itertools.product(*axes):
        choose(generator, checkpoint, args.sampler, args.guidance, n, scale, options)
        cells.append(draw(generator, prompts, args)[0])
    pictures = torch.stack(cells).unflatten(0, (len(axes[0]), len(axes[1])))
    rows, columns = (
        [f"{one:g}{' (own)' * (one == mine)}" for one in axis]
        for axis, mine in zip(axes, own, strict=True)
    )
    across = f"steps of {type(generator.sampler).__name__} (own: of the run itself)"
    figure = grid(pictures, rows, columns, across, "guidance scale")
    figure.suptitle(prompts[0], fontsize=9, parse_math=False)
    return figure, about | {"scales": axes[0], "steps": axes[1]}


def add_training(parser: argparse.ArgumentParser) -> None:
    add_prompts(parser)
    add_model_file(parser, action="append")
    parser.epilog = (
        f"A run's folder stands for all that it holds; of more than {COLUMNS}, some are taken."
    )


def show_training(args: argparse.Namespace, options: list[str]) -> Made:
    import torch

    from pipeline.figures import grid

    files, first, columns, about = checkpoints(args.checkpoint), None, [], {}
    for path in files.values():
        checkpoint, generator, about = opened(args, options, 3, path)
        first = first or checkpoint
        if checkpoint.about["codec"] != first.about["codec"]:
            raise UserError(f"{path} is a model of other data than {first.path}.")
        args.prompts = about["prompts"] if generator.conditioning else []
        columns.append(draw(generator, about["prompts"], args))
    steps = [f"{step:,}" for step in files]
    figure = grid(torch.stack(columns, dim=1), about["prompts"], steps, "training step")
    return figure, about | {"checkpoint": files}


def checkpoints(given: list[str] | None) -> dict[int, str]:
    """Checkpoints by the step they were written at, of many some; a folder stands for all in it.

    Raises:
        UserError: One does not say its step, or there is one alone.
    """
    from pipeline.checkpoint import Checkpoint, locate

    found: dict[int, str] = {}
    for path in map(Path, given or [str(locate(None).parent)]):
        for file in sorted(path.glob("*.ckpt")) or [path]:
            if (step := Checkpoint(file).content.get("global_step")) is None:
                raise UserError(f"{file} does not say its training step; name one of a run.")
            found[step] = str(file)
    if len(found) < 2:
        raise UserError(
            f"{', '.join(found.values())} is of one training step alone; name more checkpoints by "
            "--checkpoint, or train with a ModelCheckpoint that keeps all (save_top_k: -1)."
        )
    return {step: found[step] for step in evenly(sorted(found))}


MODEL = ("sampler.", "guidance.")
# by the name of a kind: what it shows, its arguments, how its options with a dot begin, its maker
KINDS: dict[str, Any] = {
    "curves": ("losses, by noise too, and learning rate of a run", add_run, (), show_curves),
    "denoising": ("what a sampler passes through, moving too", add_prompts, MODEL, show_denoising),
    "langevin": ("ULA and MALA over a density", add_langevin, ("target.",), show_langevin),
    "guidance": ("one prompt by guidance scale and steps", add_guidance, MODEL, show_guidance),
    "training": ("prompts by step of training", add_training, MODEL, show_training),
}
