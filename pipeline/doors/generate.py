"""`generate`: from a checkpoint to files."""

import argparse
import csv
import itertools
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.doors.shared import add_model, add_number, choose, open_model
from pipeline.errors import UserError
from pipeline.files import new_folder, whole

SUMMARY = "draw pictures from prompts"
FREE = ("sampler.", "guidance.")  # how further options begin
DESCRIPTION = """\
Draw pictures from prompts with a trained model. Each picture is a PNG that says in its text fields
how it was made; beside them stand a contact sheet and a manifest. Picture k of a prompt is drawn
with seed SEED + k and is the same whatever else is drawn."""
EPILOG = 'example: python -m pipeline generate "a small red circle" --number 4 --scale 3'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, what = parser.add_argument, "what to draw (default: some prompts of the run)"
    add("prompts", nargs="*", metavar="PROMPT", help=what)
    what = "a text file with a prompt per line, - for standard input; for a model of tables a "
    what += "CSV file of what is asked for, where a cell may be empty"
    add("--prompts", dest="file", metavar="FILE", help=what)
    what = "a picture, or a folder of them, to draw from, each with each prompt or with none: "
    what += "small, in grey or with transparent parts, as the model was trained"
    add("--pictures", metavar="PATH", help=what)
    add_number(parser, "--number", "N", 4, "pictures per prompt")
    add("--out", metavar="FOLDER", help="where to write (default: outputs/TIME)")
    add_model(parser)


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Draw, and write down what is drawn as it comes: what is finished is kept when stopped.

    The processes that torchrun has started share the pictures out; the first one writes.
    """
    from pipeline.conditioning import Several
    from pipeline.distributed import join

    if args.number < 1 or args.micro_batch < 1:
        raise UserError(
            f"--number {args.number} and --micro-batch {args.micro_batch} must be at least 1."
        )
    prompts = read_prompts(args.prompts, args.file)
    with join(args.device) as device:
        checkpoint, generator = open_model(args.checkpoint, device, args.trust, args.ema)
        how = (args.sampler, args.guidance, args.steps, args.scale, options)
        chosen = choose(generator, checkpoint, *how)
        if prompts and generator.conditioning is None:
            raise UserError(
                f"{checkpoint.path} was trained without a condition and takes no prompt, such as "
                f"{prompts[0]!r}: leave it out."
            )
        if isinstance(generator.conditioning, Several) and str(args.file).endswith(".csv"):
            prompts = [*args.prompts, *read_rows(Path(args.file))]
        prompts = prompts or ([""] if args.pictures else checkpoint.prompts)
        if not prompts:
            raise UserError("There is nothing to draw: give a prompt, or --prompts FILE.")
        asked = to_draw(generator, prompts, args.pictures)
        # what is wrong with a prompt is found before a folder is made
        generator.embed([value for value, _ in asked])
        settings = {
            "checkpoint": str(checkpoint.path),
            "ema": args.ema,
            **chosen,
            "micro_batch": args.micro_batch,
            "device": str(generator.device),
            "command": line,
        }
        draw(generator, asked, args, settings)
    return 0


def to_draw(
    generator: Any, prompts: list[str], path: str | None
) -> list[tuple[Any, dict[str, Any]]]:
    """What to draw from, each prompt with each picture, and what the manifest says of it."""
    if path is None:
        return [(prompt, {"prompt": prompt}) for prompt in prompts]
    from PIL import Image, ImageOps

    from pipeline.data.folder import is_picture
    from pipeline.data.pictures import eight_bits

    where, found = Path(path), []
    inside = [file for file in sorted(where.glob("*")) if is_picture(file.name)]
    files = inside if where.is_dir() else [where]
    if not files:
        raise UserError(f"--pictures {path} holds no picture.")
    for prompt, file in itertools.product(prompts, files):
        try:
            with Image.open(file) as opened:
                picture = eight_bits(ImageOps.exif_transpose(opened)).convert("RGBA")
            value = generator.given(prompt, picture)
        except Exception as error:  # Pillow raises whatever a broken file provokes
            raise UserError(f"--pictures {file} cannot be drawn from: {error}.") from error
        found.append((value, {"prompt": prompt, "picture": str(file)}))
    return found


def draw(
    generator: Any, asked: list[Any], args: argparse.Namespace, settings: dict[str, Any]
) -> None:
    """Each `--number` times, with seeds of its own."""
    from pipeline.conditioning import Several
    from pipeline.distributed import place
    from pipeline.generator import Bar

    generator.together, writes = True, place()[0] == 0
    values = [value for value, _ in asked for _ in range(args.number)]
    seeds = [args.seed + k for _ in asked for k in range(args.number)]
    about = [said | {"seed": args.seed + k} for _, said in asked for k in range(args.number)]
    if isinstance(generator.conditioning, Several):
        about = [one | {"u": generator.conditioning.said(one["prompt"])} for one in about]
    results = ("*.png", "*.wav", "samples.*", "manifest.json")
    done: list[Any] = []
    with (
        new_folder(args.out, results) if writes else nullcontext(Path()) as out,
        Bar.over(generator, len(values), args.micro_batch) as bar,
    ):
        try:
            for rows in generator(values, seeds, args.micro_batch, bar.watch):
                if writes:
                    generator.codec.write(rows, len(done), out, about, settings)
                    done += rows.cpu()
        finally:
            if done:
                settings |= bar.acceptance()
                columns = args.number + 1 if args.pictures else max(args.number, 4)
                sheet = generator.sheet(done[:256], values[: len(done[:256])], columns)
                finish(generator.codec, done, out, about, settings, sheet)


def finish(
    codec: Any,
    done: list[Any],
    out: Path,
    about: list[dict[str, Any]],
    settings: dict[str, Any],
    sheet: Any,
) -> None:
    """The manifest, and a sheet of the first 256."""
    import torch

    from pipeline.codec import Columns

    manifest = settings | {"samples": about[: len(done)]}
    with whole(out / "manifest.json") as part:
        part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    if isinstance(codec, Columns):
        from pyarrow import parquet, table

        lines = table(codec.columns(torch.stack(done), about[: len(done)]))
        parquet.write_table(lines, out / "samples.parquet")
    if sheet is not None:
        sheet.save(out / "sheet.png")
    also = "manifest.json" if sheet is None else "sheet.png and manifest.json"
    print(f"{len(done)} {codec.plural}, with {also}, are in {out}")


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts asked for; an empty list leaves the choice to the run."""
    prompts = list(given)
    if file:
        if file != "-" and not Path(file).is_file():
            raise UserError(
                f"--prompts {file}: there is no such file; give a text file with a prompt "
                "per line, or - for standard input."
            )
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompts {file} is not UTF-8 text (byte {error.start} is no character): save "
                "it as UTF-8."
            ) from error
        read = [line.strip() for line in text.splitlines() if line.strip()]
        if not read:
            raise UserError(f"--prompts {file} holds no prompt; write one per line.")
        prompts += read
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(
                f"Prompt {i + 1} is empty; say what to draw, or use --scale 0 for pictures that "
                "ignore the prompt."
            )
    return prompts


def read_rows(file: Path) -> list[str]:
    """The rows of a CSV file as prompts for `Several`; empty cells are left out."""
    from pipeline.conditioning import Several

    how: Any = {"skipinitialspace": True, "restkey": "(no column)"}
    with file.open(newline="", encoding="utf-8-sig") as opened:
        try:
            rows = list(map(Several.text, csv.DictReader(opened, **how)))
        except csv.Error as error:
            raise UserError(f"--prompts {file} cannot be read as CSV: {error}.") from error
    if not rows:
        raise UserError(f"--prompts {file} holds a header and no rows; write one per line.")
    return rows
