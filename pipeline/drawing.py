"""`generate`: from a checkpoint to files; and what `evaluate` needs of it."""

import csv
import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.generator import Generator, build, read_checkpoint
from pipeline.guidance import ClassifierFree
from pipeline.png import contact_sheet, save, to_uint8
from pipeline.samplers import State

__all__ = ["bar", "choose", "generate", "open_model", "pick_device"]


def generate(args: Namespace) -> int:
    """Draw, and write down what is drawn as it comes: what is finished is kept at Ctrl-C."""
    prompts = read_prompts(args)
    generator, about, settings = load(args)
    prompts = prompts or about["prompts"]
    if not prompts:
        raise UserError("There is nothing to draw: give a prompt, or --prompts FILE.")
    out = make_folder(args.out)
    values = [prompt for prompt in prompts for _ in range(args.number)]
    seeds = [args.seed + k for _ in prompts for k in range(args.number)]
    about_each = [{"prompt": str(v), "seed": s} for v, s in zip(values, seeds, strict=True)]
    write = write_pictures if len(generator.shape) == 3 else write_vectors
    done: list[Tensor] = []
    try:
        with bar(generator, len(values), args) as progress:
            for x in generator(values, seeds, args.micro_batch, progress.watch):
                write(x, len(done), out, about_each, settings)
                done += x.cpu()
    finally:
        if done:
            settings |= acceptance(progress.accepted, generator.sampler.steps)
            finish(done, out, about_each, settings, columns=max(args.number, 4))
    return 0


def write_pictures(
    x: Tensor, first: int, out: Path, about_each: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """One PNG for each picture, with how it was made in its text fields."""
    for i, picture in enumerate(to_uint8(x), start=first):
        about = about_each[i]
        text = {"Title": about["prompt"], "Settings": json.dumps(about | settings)}
        save(picture, out / f"{i:05d}.png", text)
        about["file"] = f"{i:05d}.png"


def write_vectors(
    x: Tensor, first: int, out: Path, about_each: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """One line of `samples.csv` for each vector: its prompt, its seed, its numbers."""
    with (out / "samples.csv").open("a", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        if not first:
            lines.writerow(["prompt", "seed", *(f"x_{k}" for k in range(x.shape[1]))])
        for about, row in zip(about_each[first:], x.tolist(), strict=False):
            lines.writerow([about["prompt"], about["seed"], *row])


def finish(
    done: list[Tensor],
    out: Path,
    about_each: list[dict[str, Any]],
    settings: dict[str, Any],
    columns: int,
) -> None:
    """The manifest, and a contact sheet of the first 256 pictures."""
    manifest = settings | {"samples": about_each[: len(done)]}
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (out / "manifest.json").write_text(text, encoding="utf-8")
    if done[0].ndim == 3:
        captions = [about["prompt"] for about in about_each[: min(len(done), 256)]]
        sheet = contact_sheet(to_uint8(torch.stack(done[:256])), captions, columns)
        sheet.save(out / "sheet.png")
        print(f"{len(done)} pictures, sheet.png and manifest.json are in {out}")
    else:
        print(f"{len(done)} vectors are in {out / 'samples.csv'}, manifest.json beside it")


def load(args: Namespace) -> tuple[Generator, dict[str, Any], dict[str, Any]]:
    """The generator of a checkpoint with sampler and guidance as the command line says.

    Beside it, what the checkpoint says about itself, and the settings that decide what is drawn.
    """
    generator, about, path = open_model(args, args.checkpoint)
    chosen = choose(generator, about, args.sampler, args.steps, args.scale, args.trust)
    settings = {
        "checkpoint": str(path),
        **chosen,
        "micro_batch": args.micro_batch,
        "device": str(generator.device),
        "command": args.line,
    }
    return generator, about, settings


def open_model(args: Namespace, checkpoint: str | None) -> tuple[Generator, dict[str, Any], Path]:
    """The generator of a checkpoint, by default the newest, on the device that is asked for; what
    the checkpoint says about itself; and where it is.
    """
    if args.number < 1 or args.micro_batch < 1:
        raise UserError(
            f"--number {args.number} and --micro-batch {args.micro_batch} must be at least 1."
        )
    path = Path(checkpoint) if checkpoint else newest()
    path = path / "last.ckpt" if path.is_dir() else path
    about = read_checkpoint(path)["pipeline"]
    device = pick_device(args.device)
    try:
        generator = Generator.from_checkpoint(path, torch.device(device), args.trust)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be loaded on --device {device}: {reason}") from error
    return generator, about, path


def pick_device(name: str) -> str:
    """The device of a name; of "auto", a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def choose(
    generator: Generator,
    about: dict[str, Any],
    sampler: str | None,
    steps: int | None,
    scale: float | None,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw with a sampler, steps and scale from now on, those of the run where they are None.
    Returns the settings.
    """
    node = read_yaml(sampler) if sampler else about["sampler"]
    if steps is not None:
        node = {**node, "init_args": {**(node.get("init_args") or {}), "steps": steps}}
    generator.sampler = build(node, trust)
    generator.guidance = build(about["guidance"], trust)
    if scale is not None:
        generator.guidance = ClassifierFree(scale)
    return {
        "sampler": told(generator.sampler),
        "guidance": told(generator.guidance),
        "shape": list(generator.shape),
    }


def told(part: object) -> dict[str, Any] | None:
    """The class and the numbers of a sampler or a guidance, and of the parts of one."""
    if part is None:
        return None
    numbers = {k: told(v) if hasattr(v, "__dict__") else v for k, v in vars(part).items()}
    return {"class": type(part).__name__, **numbers}


class Bar(tqdm):
    """A bar over the steps of a sampler, which notes what they accept."""

    accepted: list[Tensor | None]

    def watch(self, state: State) -> None:
        self.update()
        self.accepted.append(None if state.acceptance is None else state.acceptance.mean())


def bar(generator: Generator, number: int, args: Namespace) -> Bar:
    steps = generator.rounds(number, args.micro_batch) * generator.sampler.steps
    interval = 0.5 if sys.stderr.isatty() else 15.0  # a log wants few lines
    silent = generator.place()[0] > 0
    made = Bar(total=steps, desc="Drawing", unit="step", mininterval=interval, disable=silent)
    made.accepted = []
    return made


def acceptance(accepted: list[Tensor | None], steps: int) -> dict[str, Any]:
    """The mean acceptance of each step that proposes, for the manifest."""
    of_each = [[a for a in accepted[i::steps] if a is not None] for i in range(steps)]
    means = [round(torch.stack(one).mean().item(), 4) for one in of_each if one]
    return {"acceptance": means} if means else {}


def newest() -> Path:
    """The newest checkpoint in runs/."""
    found = sorted(Path("runs").glob("*/*/last.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(
            "There is no trained model in runs/: `make train` makes one, or give --checkpoint."
        )
    return found[-1]


def read_yaml(file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise UserError(f"--sampler {file}: there is no such file; conf/sampler/ has some.")
    node = yaml.safe_load(Path(file).read_text())
    if not isinstance(node, dict) or "class_path" not in node:
        raise UserError(f"--sampler {file} names no class_path; see those in conf/sampler/.")
    return node


def read_prompts(args: Namespace) -> list[str]:
    """The prompts asked for; an empty list leaves the choice to the run."""
    prompts = list(args.prompts)
    if args.file:
        if args.file != "-" and not Path(args.file).is_file():
            raise UserError(
                f"--prompts {args.file}: there is no such file; give a text file with a prompt "
                "per line, or - for standard input."
            )
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text("utf-8")
        read = [line.strip() for line in text.splitlines() if line.strip()]
        if not read:
            raise UserError(f"--prompts {args.file} holds no prompt; write one per line.")
        prompts += read
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(
                f"Prompt {i + 1} is empty; say what to draw, or use --scale 0 for pictures that "
                "ignore the prompt."
            )
    return prompts


def make_folder(out: str | None) -> Path:
    """A folder that can be written to and holds no earlier pictures."""
    folder = Path(out) if out else Path("outputs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write").touch()
        (folder / ".write").unlink()
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written to: {error.strerror}; name another folder."
        ) from error
    if any(folder.glob("*.png")) or any(folder.glob("samples.csv")):
        raise UserError(
            f"--out {folder} holds samples already; name another folder, so that none is lost."
        )
    return folder
