"""`evaluate`: what checkpoints are worth, with one sampler or a sweep of them."""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

from pipeline.doors.shared import (
    add_features,
    add_model,
    add_number,
    choose,
    open_model,
    read_features,
)
from pipeline.errors import UserError

T = TypeVar("T")

SUMMARY = "measure a model"
FREE = ("sampler.", "guidance.")  # how further options begin
DESCRIPTION = """\
Draw N pictures of what was held out of training (unseen combinations of the built-in shapes, else
rows of the split val) and print how far they are from the training pictures; beside it, how far
true held-out pictures are. On the built-in shapes, attributes are also read back from the pixels
by a detector that is not the model; beside it stand the same pictures against shuffled prompts,
and chance."""
EPILOG = """\
Every combination of what is given to --checkpoint, --sampler, --steps and --scale is measured, and
one that --out holds already is not drawn again. On several devices:
  torchrun --nproc-per-node N -m -- pipeline evaluate ..."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, several=True)
    add_number(parser, "--number", "N", 256, "pictures")
    add_number(parser, "--seeds", "K", 1, "draw K times N pictures, for the spread of the scores")
    add_features(parser)
    add, what = parser.add_argument, "a CLIP, a folder or a name on the hub, to score prompts"
    add("--clip", metavar="FOLDER", help=what)
    what = "also bits per dimension of K true held-out pictures, without guidance"
    add("--likelihood", type=int, metavar="K", help=what)
    what = "also the Fréchet distance of true pictures with noise of 1, 2, 4 and 8 grey levels, "
    what += "and blurred: what a distance looks like"
    add("--ladder", action="store_true", help=what)
    what = "write the result, and a sheet beside it; a FOLDER takes many, and the plot of a sweep"
    add("--out", metavar="FILE.json", help=what)
    add("--wandb", action="store_true", help="also write a W&B run, offline when not logged in")


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Draw, score and write down; what is finished is kept at Ctrl-C."""
    from pipeline.distributed import join, place
    from pipeline.evaluation.adherence import CLIP
    from pipeline.evaluation.report import block, summarise
    from pipeline.evaluation.store import Store
    from pipeline.evaluation.sweep import Model, Protocol, Sweep

    steps, scales = numbers(args.steps, int, "--steps"), numbers(args.scale, float, "--scale")
    choices = list(itertools.product(args.sampler or [None], steps, scales))
    checkpoints, store = args.checkpoint or [None], Store(args.out)
    several = len(checkpoints) * len(choices) > 1
    check(args, several, store)
    asked = (args.number, args.seed, args.seeds, args.micro_batch, args.likelihood, args.ladder)
    protocol = Protocol(*asked)
    found: list[dict[str, Any]] = []
    with join(args.device) as device:
        clip = CLIP(args.clip).to(device) if args.clip else None
        sweep = Sweep(protocol, read_features(args.features, device), clip, store, line)
        try:
            for path in checkpoints:
                checkpoint, generator = open_model(path, device, args.trust, args.ema)
                generator.together = True
                model = Model(checkpoint, generator, sweep)
                for sampler, n, scale in choices:
                    how = (sampler, args.guidance, n, scale, options)
                    chosen = choose(generator, checkpoint, *how)
                    found.append(model.point(chosen | ({"ema": args.ema} if args.ema else {})))
                    if not several and place()[0] == 0:
                        print(block(found[-1]))
        finally:
            if found and place()[0] == 0:
                summarise(found, store, several, line if args.wandb else None)
    return 0


def check(args: argparse.Namespace, several: bool, store: Any) -> None:
    """Says what is wrong before anything is drawn."""
    if args.micro_batch < 1:
        raise UserError(f"--micro-batch {args.micro_batch} must be at least 1.")
    if several and not store.takes_many:
        raise UserError(
            f"A sweep keeps each of its points: give --out FOLDER, not {args.out or 'none'}."
        )
    if args.wandb and not args.out:
        raise UserError("--wandb needs --out, the place where an offline run is kept.")
    store.check()


def numbers(text: str | None, kind: type[T], option: str) -> Sequence[T | None]:
    """The numbers of a list such as "6,12,18"; without a list, one None."""
    try:
        return [kind(part) for part in text.split(",")] if text else [None]  # type: ignore
    except ValueError:
        raise UserError(
            f"{option} {text} is no list of numbers; write them with commas between, as 6,12,18."
        ) from None
