"""The doors: `python -m pipeline fit / generate / evaluate`.

Importing torch takes seconds, so each command imports what it needs when it runs, and help comes
at once.
"""

import argparse
import json
import os
import shlex
import sys
import time
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

  -c FILE                       an experiment, for example conf/experiment/shapes.yaml; several
  merge, the later wins
  --resume RUN                  go on with a stopped run, for example runs/shapes/20260102-030405,
  as if it had not stopped
  --run FOLDER                  where to write (default: runs/EXPERIMENT/TIME)

Often changed
  --seed_everything 1           the seed of weights, data, noise and order
  --trainer.max_steps 5000      how long to train; the learning rate falls to 0 at its end
  --trainer.devices 4           how many GPUs (default: all)
  --trainer.accumulate_grad_batches 2
  --data.batch_size 256         the global batch, all devices together
  --data conf/data/emoji.yaml   other data: any group of conf/ can be swapped like this
  --data.path my/pictures       with the hub data: a folder of pictures with metadata.jsonl,
                                parquet files, or a hub id
  --model.sampler conf/sampler/ddim.yaml
  --model.optimizer.lr 1e-3
  --trainer.logger false        no CSV and no Weights & Biases

  --print_config                print the whole configuration and stop; a start for an experiment
  of your own
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
        return {"generate": generate, "evaluate": evaluate}[args.command](args)
    except (UserError, ValueError) as error:
        if os.environ.get("PIPELINE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; what was finished is kept.", file=sys.stderr)
        return 130


# fit
# -------------------------------------------------------------------------------------------------
# -----------------


def fit(argv: list[str]) -> int:
    """Train: LightningCLI builds model, data and trainer from YAML, and this adds the run's folder
    and its loggers.
    """
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


# generate
# -------------------------------------------------------------------------------------------------
# ------------


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


def generate(args: argparse.Namespace) -> int:
    """Draw pictures and write them down as they come."""
    if args.number < 1 or args.micro_batch < 1:
        raise UserError(
            f"--number {args.number} and --micro-batch {args.micro_batch} must be at least 1."
        )
    prompts = _prompts(args)
    out = _folder(args.out)
    generator, about, checkpoint = _generator(args)
    prompts = prompts or about["prompts"]
    if not prompts:
        raise UserError("There is nothing to draw: give a prompt, or --prompts FILE.")
    import torch
    from tqdm import tqdm

    from pipeline.png import contact_sheet, save, to_uint8

    values = [prompt for prompt in prompts for _ in range(args.number)]
    seeds = [args.seed + k for _ in prompts for k in range(args.number)]
    settings = {"checkpoint": str(checkpoint), **_settings(generator, args)}
    entries, drawn = [], []
    batches = -(-len(values) // args.micro_batch)
    with tqdm(
        total=batches * generator.sampler.steps, desc="Drawing", unit="step", disable=None
    ) as bar:
        for x in generator(values, seeds, args.micro_batch, bar.update):
            for picture in to_uint8(x):
                i = len(entries)
                entry = {"file": f"{i:05d}.png", "prompt": values[i], "seed": seeds[i]}
                save(
                    picture,
                    out / entry["file"],
                    {"Title": values[i], "Settings": json.dumps(entry | settings)},
                )
                entries.append(entry)
                drawn.append(picture.cpu())
    (out / "manifest.json").write_text(
        json.dumps(settings | {"pictures": entries}, indent=2, ensure_ascii=False)
    )
    shown = torch.stack(drawn[:256])
    contact_sheet(shown, values[:256], columns=max(args.number, 4)).save(out / "sheet.png")
    print(f"{len(entries)} pictures, sheet.png and manifest.json are in {out}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts asked for; an empty list leaves the choice to the run."""
    prompts = list(args.prompts)
    if args.file:
        if args.file != "-" and not Path(args.file).is_file():
            raise UserError(
                f"--prompts {args.file}: there is no such file; give a text file with a "
                f"prompt per line, or -."
            )
        text = (
            sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
        )
        read = [line.strip() for line in text.splitlines() if line.strip()]
        if not read:
            raise UserError(f"--prompts {args.file} holds no prompt; write one per line.")
        prompts += read
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(
                f"Prompt {i + 1} is empty; say what to draw, or use --scale 0 for pictures "
                f"without a prompt."
            )
    return prompts


def _folder(out: str | None) -> Path:
    folder = Path(out) if out else Path("outputs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write").touch()
        (folder / ".write").unlink()
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written to ({error.strerror}); name another folder."
        ) from error
    if any(folder.glob("[0-9]*.png")) or (folder / "manifest.json").exists():
        raise UserError(
            f"--out {folder} holds pictures already; name another folder, so that none is lost."
        )
    return folder


def _newest() -> Path:
    found = sorted(Path("runs").glob("*/*/last.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(
            "There is no trained model in runs/: run `make train` first, or give --checkpoint "
            "FILE."
        )
    return found[-1]


def _generator(args: argparse.Namespace) -> tuple[Any, dict[str, Any], Path]:
    """The generator of a checkpoint, its sampler and guidance changed as the command line says."""
    path = Path(args.checkpoint) if args.checkpoint else _newest()
    path = path / "last.ckpt" if path.is_dir() else path
    import torch
    import yaml

    from pipeline.generator import Generator, build, read_checkpoint
    from pipeline.guidance import ClassifierFree

    about = read_checkpoint(path)["pipeline"]
    device = (
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    try:
        generator = Generator.from_checkpoint(path, torch.device(device), args.trust)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The model of {path} cannot be put on --device {device}: {str(error).splitlines()[0]}"
        ) from error
    if args.sampler:
        if not Path(args.sampler).is_file():
            raise UserError(
                f"--sampler {args.sampler}: there is no such file; conf/sampler/ has some."
            )
        generator.sampler = build(yaml.safe_load(Path(args.sampler).read_text()), args.trust)
    if args.steps is not None:
        node = yaml.safe_load(Path(args.sampler).read_text()) if args.sampler else about["sampler"]
        node = {**node, "init_args": {**(node.get("init_args") or {}), "steps": args.steps}}
        generator.sampler = build(node, args.trust)
    if args.scale is not None:
        generator.guidance = ClassifierFree(args.scale)
    return generator, about, path


def _settings(generator: Any, args: argparse.Namespace) -> dict[str, Any]:  # noqa: ANN401
    def told(part: object) -> dict[str, Any] | None:
        return part and {"class": type(part).__name__, **vars(part)}

    return {
        "sampler": told(generator.sampler),
        "guidance": told(generator.guidance),
        "size": list(generator.shape),
        "micro_batch": args.micro_batch,
        "device": str(generator.device),
        "command": shlex.join(["python", "-m", "pipeline", *sys.argv[1:]]),
    }


# evaluate
# -------------------------------------------------------------------------------------------------
# ------------


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


def evaluate(args: argparse.Namespace) -> int:
    """Attribute accuracy on unseen combinations of the built-in shapes."""
    generator, about, checkpoint = _generator(args)
    import torch
    from tqdm import tqdm

    from pipeline.evaluation.adherence import shapes_adherence
    from pipeline.generator import build
    from pipeline.png import contact_sheet

    data = build(about["data"], args.trust)
    batches = -(-args.number // args.micro_batch)
    with tqdm(
        total=batches * generator.sampler.steps, desc="Drawing", unit="step", disable=None
    ) as bar:
        result, pictures, prompts = shapes_adherence(
            generator, data, args.number, args.seed, args.micro_batch, bar.update
        )
    result |= {"checkpoint": str(checkpoint), **_settings(generator, args)}
    for name, value in result["accuracy"].items():
        chance, shuffled = result["chance"][name], result["shuffled"][name]
        print(f"{name:>12}  {value:.3f}   shuffled prompts {shuffled:.3f}   chance {chance:.3f}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2))
        contact_sheet(torch.as_tensor(pictures[:64]), prompts[:64]).save(
            Path(args.out).with_suffix(".png")
        )
    return 0
