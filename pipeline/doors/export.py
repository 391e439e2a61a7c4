"""`export`: from a checkpoint to a folder that others can draw from."""

import argparse
import json
from pathlib import Path
from shlex import quote
from typing import Any

from pipeline.doors.shared import add_device_and_trust, add_model_file
from pipeline.errors import UserError

SUMMARY = "write a model for others: safetensors, one JSON, a model card"
FREE = ()
DESCRIPTION = """\
Write a model into a folder that needs neither its run nor its YAML: model.safetensors (one
average of its weights), config.json, which builds it again, and README.md, a model card with a
sheet that the model has drawn. `generate --model FOLDER` and Generator.from_pretrained
draw from it."""
EPILOG = """\
example: python -m pipeline export --out circles --license cc-by-4.0 --evaluation result.json
         python -m pipeline generate "a small red circle" --model circles"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_file(parser)
    add("--out", metavar="FOLDER", required=True, help="where to write; it must hold no model")
    what = "a result of `evaluate --out`, for the card"
    add("--evaluation", metavar="FILE.json", help=what)
    what = "what it was trained on and under which licence, for the card (default: the name of "
    what += "the data's class)"
    add("--data", metavar="TEXT", help=what)
    what = "the licence of the weights, as the hub names licences (default: unknown)"
    add("--license", metavar="NAME", default="unknown", help=what)
    what = "also upload it to the Hugging Face hub, as a private model"
    add("--push", metavar="OWNER/NAME", help=what)
    add_device_and_trust(parser)


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Draw a sheet, write the model, and say where it is."""
    from pipeline import exported
    from pipeline.checkpoint import Checkpoint, averages, locate
    from pipeline.distributed import join
    from pipeline.files import whole
    from pipeline.generator import Generator

    checkpoint = Checkpoint(locate(args.checkpoint), args.trust)
    figures = read_result(args.evaluation, checkpoint.sha256) if args.evaluation else ""
    content, data = checkpoint.content, checkpoint.about["data"]
    average = args.ema or next(iter(averages(content)), "trained")
    facts = {"weights": f"{average!r}, after {content.get('global_step', 'unknown')} steps"}
    name = "unknown" if data is None else data["class_path"].rpartition(".")[2]
    facts["data and their licence"] = args.data or f"{name}; the licence was not stated"
    with join(args.device) as device:  # what cannot draw is not written
        generator = Generator.from_checkpoint(checkpoint.path, device, args.trust, average)
        sheet = draw(generator)
    named = exported.SHEET if sheet is not None else None
    card = exported.model_card(checkpoint.about, facts, figures, named, args.license)
    exported.save(args.out, checkpoint.about, generator.denoiser.state_dict(), card)
    if sheet is not None:
        with whole(Path(args.out) / exported.SHEET) as part:
            sheet.save(part, format="PNG")
    made = quote(args.out)
    print(f"The model is in {made}; draw by: python -m pipeline generate --model {made}")
    if args.push is not None:
        print(f"It is uploaded as {exported.push(args.out, args.push)}")
    return 0


def draw(generator: Any) -> Any:
    """A sheet of the model's own prompts, or of eight draws without one; `None` where there is
    nothing to see, or a prompt is not enough.
    """
    from pipeline.conditioning import Picture
    from pipeline.generator import Bar

    if isinstance(generator.conditioning, Picture):
        return None
    prompts = list(generator.prompts)[:16] or [""] * 8
    if generator.conditioning is not None and not generator.prompts:
        return None
    with Bar.over(generator, len(prompts), 16) as bar:
        seeds = range(len(prompts))
        rows = [row for some in generator(prompts, seeds, 16, bar.watch) for row in some]
    return generator.sheet(rows, prompts, 4)


def read_result(file: str, sha256: str) -> str:
    """An evaluation of the checkpoint of a digest in words."""
    from pipeline.evaluation.report import block, context

    try:
        result = json.loads(Path(file).read_text("utf-8"))
        how = f"drawn by {words(result['sampler'])}, guidance {words(result['guidance'])}"
        told, of = f"{how}\n{block(result)}\n{context(result)}", result["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(
            f"--evaluation {file} cannot be read as a result ({reason}); give a file that "
            "`evaluate --out FILE.json` wrote."
        ) from error
    if of != sha256:
        raise UserError(
            f"--evaluation {file} is of another model, or of another step of this one: evaluate "
            "the checkpoint that is exported."
        )
    return told


def words(how: dict[str, Any] | None) -> str:
    """How it was drawn, or guided, in a line."""
    if how is None:
        return "none"
    given = [
        f"{key} {value}" for key, value in how.items() if key != "class" and value is not None
    ]
    return f"{how['class']} ({', '.join(given)})"
