"""The doors: `python -m pipeline fit / generate / sample / evaluate / reference`.

Importing torch takes seconds, so each command imports what it needs when it runs, and help comes
at once.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

__all__ = ["main"]

FIT_HELP = """\
usage: python -m pipeline fit -c EXPERIMENT.yaml [--KEY VALUE ...]
       python -m pipeline fit --resume RUN [--KEY VALUE ...]

Train a conditional score network. Everything is set by the YAML of an experiment, and any part of
it by the command line.

  -c FILE                       an experiment, for example conf/experiment/shapes.yaml;
                                several merge, the later wins
  --resume RUN                  go on with a stopped run, for example runs/shapes/20260102-030405,
                                as if it had not stopped
  --run FOLDER                  where to write (default: runs/EXPERIMENT/TIME)

Often changed
  --seed_everything 1           the seed of weights, data, noise and order
  --trainer.max_steps 5000      how long to train; the learning rate falls to 0 at the end
  --trainer.devices 4           how many GPUs (default: all)
  --trainer.accumulate_grad_batches 2
  --data.batch_size 256         the global batch, all devices together
  --data conf/data/emoji.yaml   other data: any group of conf/ can be swapped like this
  --data.path my/pictures       with the hub data: a folder of pictures with metadata.jsonl,
                                parquet files, or a hub id
  --model.sampler conf/sampler/ddim.yaml
  --model.optimizer.lr 1e-3
  --trainer.logger false        no CSV and no Weights & Biases

  --print_config                print the whole configuration: a start for one of your own
  --help-all                    every option there is

The run's folder gets config.yaml, last.ckpt (also at Ctrl-C), best.ckpt, sheets/, csv/ and wandb/.
"""

SAMPLE_HELP = """\
usage: python -m pipeline sample -c FILE.yaml [--KEY VALUE ...]

Draw from a stated density by Markov chain Monte Carlo: a target of conf/target/ (or any of your
own, by class_path) with a kernel of conf/kernel/. No trained model is needed.

  -c FILE                       for example conf/sample/banana.yaml; several merge, the later wins
  --target conf/target/funnel.yaml
  --kernel conf/kernel/mala.yaml
  --kernel.step_size 0.1        any argument of target and kernel can be set like this
  --dim D                       the number of coordinates, where the target does not say
  --chains 16                   how many chains, from points around 0 of standard deviation SPREAD
  --spread 1.0
  --draws 1000                  steps of each chain that are kept
  --warmup 500                  steps before them, in which the step size and the unit of each
                                coordinate are found, and then frozen
  --seed 0                      the same seed, the same draws
  --out FOLDER                  where to write (default: outputs/TIME)

  --print_config                print the whole configuration: a start for one of your own
  --help-all                    every option there is

Prints mean, standard deviation, quantiles, effective sample sizes and R-hat of each coordinate,
and warns where the chains have not met or have diverged. The folder gets draws.safetensors with
x (draws, chains, D), config.yaml, trace.png and pairs.png.
"""


def main(argv: Sequence[str]) -> int:
    """Run a command; bad input ends in one sentence and exit code 2."""
    argv = list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Train a model that draws from p(x | u), and draw from it: prompt in, "
        "picture out.",
        epilog="Each command has a --help of its own.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("fit", help="train a model from a YAML experiment", add_help=False)
    commands.add_parser("sample", help="draw from a stated density by MCMC", add_help=False)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_reference(commands)
    try:
        if argv[:1] == ["fit"]:
            return fit(argv[1:])
        if argv[:1] == ["sample"]:
            return sample(argv[1:])
        args, args.overrides = parser.parse_known_args(argv)
        if args.overrides and args.command != "reference":
            parser.error(f"unrecognized arguments: {' '.join(args.overrides)}")
        args.line = shlex.join(["python", "-m", "pipeline", *argv])
        if args.command == "reference":
            from pipeline.referencing import reference

            return reference(args)
        if args.command == "evaluate":
            from pipeline.evaluating import evaluate

            return evaluate(args)
        from pipeline.drawing import generate

        return generate(args)
    except (UserError, ValueError) as error:
        if os.environ.get("PIPELINE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; what was finished is kept.", file=sys.stderr)
        return 130


def fit(argv: list[str]) -> int:
    """Train, after the help was given and `--resume` spelled out."""
    if not argv or argv[0] in ("-h", "--help"):
        print(FIT_HELP)
        return 0
    argv = ["--help" if arg == "--help-all" else arg for arg in _resume(argv)]
    from pipeline.training import train

    return train(argv)


def sample(argv: list[str]) -> int:
    """Draw from a stated density, after the help was given."""
    if not argv or argv[0] in ("-h", "--help"):
        print(SAMPLE_HELP)
        return 0
    from pipeline import sampling

    line = shlex.join(["python", "-m", "pipeline", "sample", *argv])
    return sampling.sample(["--help" if arg == "--help-all" else arg for arg in argv], line)


def _resume(argv: list[str]) -> list[str]:
    """Spell out `--resume RUN`."""
    if "--resume" not in argv:
        return argv
    at = argv.index("--resume")
    run = Path(argv[at + 1]) if at + 1 < len(argv) else Path("RUN")
    files = run / "config.yaml", run / "last.ckpt"
    for file in files:
        if not file.is_file():
            raise UserError(
                f"--resume {run}: there is no {file}; give the folder of a run that was stopped."
            )
    spelled = ["-c", str(files[0]), "--ckpt_path", str(files[1]), "--run", str(run)]
    return spelled + argv[:at] + argv[at + 2 :]


def _add_model(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What to draw with; of checkpoint, sampler, steps and scale there may be several."""
    many: dict[str, Any] = {"action": "append"} if several else {}
    also = "; may be repeated" if several else ""
    commas = ", or several with commas between" if several else ""
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help=f"a checkpoint or a run's folder (default: the newest run){also}",
        **many,
    )
    parser.add_argument(
        "--sampler",
        metavar="YAML",
        help=f"a sampler, e.g. conf/sampler/ddim.yaml (default: the run's){also}",
        **many,
    )
    parser.add_argument(
        "--steps",
        type=str if several else int,
        metavar="N",
        help=f"the number of steps of the sampler (default: its own){commas}",
    )
    parser.add_argument(
        "--scale",
        type=str if several else float,
        metavar="W",
        help="guidance: 0 ignores the prompt, 1 is the model as it was trained, more is stronger "
        f"(default: the run's){commas}",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=16,
        metavar="B",
        help="pictures drawn together (default: 16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    _add_device_and_trust(parser)


def _add_device_and_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package of yours whose classes the checkpoint may name; may be repeated",
    )


def _add_generate(commands: Any) -> None:  # noqa: ANN401
    parser = commands.add_parser(
        "generate",
        help="draw pictures from prompts",
        description="Draw pictures from prompts with a trained model. Each picture is a PNG that "
        "says in its text fields how it was made; beside them stand a contact sheet and a "
        "manifest. Picture k of a prompt is drawn with seed SEED + k and is the same whatever "
        "else is drawn.",
        epilog='example: python -m pipeline generate "a small red circle" --number 4 --scale 3',
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="what to draw (default: some prompts of the run)",
    )
    parser.add_argument(
        "--prompts",
        dest="file",
        metavar="FILE",
        help="a text file with a prompt per line; - reads them from standard input",
    )
    parser.add_argument(
        "--number", type=int, default=4, metavar="N", help="pictures per prompt (default: 4)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: outputs/TIME)")
    _add_model(parser)


def _add_evaluate(commands: Any) -> None:  # noqa: ANN401
    parser = commands.add_parser(
        "evaluate",
        help="measure a model",
        description="Draw N pictures of what was held out of training (unseen combinations of the "
        "built-in shapes, else rows of the split val) and print how far they are from the "
        "training pictures; beside it, how far true held-out pictures are. On the built-in "
        "shapes, attributes are also read back from the pixels by a detector that is not the "
        "model; beside it stand the same pictures against shuffled prompts, and chance.",
        epilog="Every combination of what is given to --checkpoint, --sampler, --steps and "
        "--scale is measured, and one that --out holds already is not drawn again. On several "
        "devices: torchrun --nproc-per-node N -m pipeline evaluate ...",
    )
    _add_model(parser, several=True)
    parser.add_argument(
        "--number", type=int, default=256, metavar="N", help="pictures (default: 256)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="K",
        help="draw K times N pictures, for the spread of the scores (default: 1)",
    )
    parser.add_argument(
        "--features",
        metavar="YAML",
        help="a feature network, e.g. conf/features/inception.yaml for FID (default: "
        "EfficientNet-Lite0 with 112 features, which needs no download)",
    )
    parser.add_argument(
        "--clip", metavar="FOLDER", help="a CLIP, a folder or a name on the hub, to score prompts"
    )
    parser.add_argument(
        "--likelihood",
        type=int,
        metavar="K",
        help="also bits per dimension of K true held-out pictures, without guidance",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="write the result, and a sheet beside it; a FOLDER takes many, and the plot of a "
        "sweep",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also write a W&B run, offline when not logged in"
    )


def _add_reference(commands: Any) -> None:  # noqa: ANN401
    parser = commands.add_parser(
        "reference",
        help="make the statistics that generated pictures are measured against",
        description="Read the pictures of a data set with a feature network, and write down mean "
        "and covariance of the features, and some of the features, with what decides them. What "
        "was made before is found again.",
        epilog="example: python -m pipeline reference -c conf/experiment/cifar10.yaml "
        "--data.path FOLDER --features conf/features/efficientnet.yaml",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-c",
        "--config",
        metavar="YAML",
        help="an experiment, whose data are taken; --data.KEY VALUE changes them",
    )
    source.add_argument(
        "--checkpoint", metavar="FILE", help="a checkpoint or a run's folder, with its data"
    )
    source.add_argument("--pictures", metavar="FOLDER", help="a folder of pictures, all of it")
    parser.add_argument(
        "--size",
        type=int,
        default=32,
        metavar="PIXELS",
        help="the side that pictures of a folder are brought to (default: 32)",
    )
    parser.add_argument(
        "--features",
        metavar="YAML",
        help="a feature network, e.g. conf/features/inception.yaml for FID (default: "
        "EfficientNet-Lite0 with 112 features, which needs no download)",
    )
    parser.add_argument("--split", default="train", help="which rows (default: train)")
    parser.add_argument(
        "--number", type=int, metavar="N", help="pictures, drawn at random (default: all)"
    )
    parser.add_argument(
        "--batch", type=int, default=64, metavar="B", help="pictures read together (default: 64)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="where to write (default: the cache, where it is found)"
    )
    _add_device_and_trust(parser)
