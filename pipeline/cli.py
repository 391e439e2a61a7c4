"""The doors: `python -m pipeline fit / generate / evaluate`.

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
    _add_generate(commands)
    _add_evaluate(commands)
    try:
        if argv[:1] == ["fit"]:
            return fit(argv[1:])
        args = parser.parse_args(argv)
        args.line = shlex.join(["python", "-m", "pipeline", *argv])
        from pipeline import drawing

        return {"generate": drawing.generate, "evaluate": drawing.evaluate}[args.command](args)
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


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="a checkpoint or a run's folder (default: the newest run)",
    )
    parser.add_argument(
        "--sampler",
        metavar="YAML",
        help="a sampler, e.g. conf/sampler/ddim.yaml (default: the run's)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="the number of steps of the sampler (default: its own)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="W",
        help="guidance: 0 ignores the prompt, 1 is the model as it was trained, more is stronger "
        "(default: the run's)",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=16,
        metavar="B",
        help="pictures drawn together (default: 16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
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
    _add_drawing(parser)


def _add_evaluate(commands: Any) -> None:  # noqa: ANN401
    parser = commands.add_parser(
        "evaluate",
        help="measure a model that was trained on the built-in shapes",
        description="Draw one picture for each of N prompts whose combination of attributes was "
        "never seen in training, read the attributes back from the pixels with a detector that is "
        "not the model, and print how often they are right; beside it the same pictures against "
        "shuffled prompts, and chance.",
    )
    parser.add_argument(
        "--number", type=int, default=256, metavar="N", help="prompts (default: 256)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="also write the result as JSON, and a sheet beside it"
    )
    _add_drawing(parser)
