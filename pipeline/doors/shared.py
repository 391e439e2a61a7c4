"""What several doors ask for: a model and how to draw from it, an experiment, features, a device.

What takes seconds to import is imported where it is used: help comes at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.checkpoint import Checkpoint
    from pipeline.evaluation.features import Features
    from pipeline.generator import Generator


def add_model_file(parser: argparse.ArgumentParser, **many: Any) -> None:
    """The model itself, of which there may be `many`."""
    add, also = parser.add_argument, "; may be repeated" if many else ""
    what = f"a checkpoint or a run's folder (default: the newest run){also}"
    add("--checkpoint", metavar="FILE", help=what, **many)
    what = "an exported model: its folder, or OWNER/NAME on the Hugging Face hub"
    add("--model", dest="checkpoint", metavar="FOLDER", type=exported_model, help=what, **many)
    what = "which weights: an average of the checkpoint by name, a length such as 0.08 where "
    what += "the run kept power-function averages, or trained (default: its first average)"
    add("--ema", metavar="NAME", help=what)


def exported_model(name: str) -> str:
    """The folder of a model that was exported."""
    from pipeline.checkpoint import BEFORE, LAST
    from pipeline.exported import find

    if any((Path(name) / file).is_file() for file in (LAST, BEFORE)):
        raise argparse.ArgumentTypeError(f"{name} is a run, and is named by --checkpoint")
    try:
        return str(find(name))
    except UserError as error:  # argparse would say that the value is invalid, and no more
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def add_model(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """What to draw with; of checkpoint, sampler, steps and scale there may be several."""
    many: dict[str, Any] = {"action": "append"} if several else {}
    also = "; may be repeated" if several else ""
    commas = ", or several with commas between" if several else ""
    add = parser.add_argument
    add_model_file(parser, **many)
    what = f"a sampler, e.g. conf/sampler/ddim.yaml (default: the run's){also}; any of its "
    what += "arguments can be set by --sampler.KEY VALUE"
    add("--sampler", metavar="YAML", help=what, **many)
    what = f"the number of steps of the sampler (default: its own){commas}"
    add("--steps", type=str if several else int, metavar="N", help=what)
    what = "how to guide, e.g. conf/guidance/classifier_free.yaml (default: the run's); any of "
    what += "its arguments can be set by --guidance.KEY VALUE"
    add("--guidance", metavar="YAML", help=what)
    what = "guidance: 0 ignores the prompt, 1 is the model as it was trained, more is stronger "
    what += f"(default: the run's){commas}"
    add("--scale", type=str if several else float, metavar="W", help=what)
    add_number(parser, "--micro-batch", "B", 16, "pictures drawn together")
    add_number(parser, "--seed", "SEED", 0, "the first seed")
    add_device_and_trust(parser)


def add_number(
    parser: argparse.ArgumentParser, name: str, metavar: str, default: int, what: str
) -> None:
    """A whole number, whose default is said."""
    told = f"{what} (default: {default})"
    parser.add_argument(name, type=int, default=default, metavar=metavar, help=told)


def add_device_and_trust(parser: argparse.ArgumentParser) -> None:
    what = "cpu, cuda, cuda:1, … (default: a GPU if there is one)"
    parser.add_argument("--device", default="auto", help=what)
    what = "a package, or a module, of yours whose classes checkpoints and samplers may name; "
    what += "may be repeated"
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=what)


def add_features(parser: argparse.ArgumentParser) -> None:
    what = "a feature network, e.g. conf/features/inception.yaml for FID (default: "
    what += "EfficientNet-Lite0 with 112 features, which needs no download)"
    parser.add_argument("--features", metavar="YAML", help=what)


def add_configuration(parser: argparse.ArgumentParser, example: str) -> None:
    """The files of a door that is configured by YAML."""
    add, what = parser.add_argument, f"{example}; several merge, the later wins"
    add("-c", "--config", action="append", default=[], metavar="FILE", help=what)
    what = "print the whole configuration, a start for one of your own, and stop"
    add("--print_config", action="store_true", help=what)
    add("--help-all", action="store_true", help="say what every option there is does, and stop")


def say_configuration(args: argparse.Namespace, plan: Any, text: str) -> bool:
    """Whether the configuration was asked for, and printed."""
    from pipeline.building import explain

    if args.help_all:
        print("\n".join(explain(plan)))
    elif args.print_config:
        print(text, end="")
    return args.help_all or args.print_config


def open_model(
    path: str | None, device: str, trust: Sequence[str], average: str | None = None
) -> tuple["Checkpoint", "Generator"]:
    """A checkpoint, by default the newest, and what draws from it on a device."""
    from pipeline.checkpoint import Checkpoint, locate
    from pipeline.codec import Codec
    from pipeline.distributed import place
    from pipeline.generator import Generator
    from pipeline.samplers import Sampler

    checkpoint = Checkpoint(locate(path), trust)
    if path is None and place()[0] == 0:
        steps = checkpoint.content.get("global_step", "?")
        print(f"The model is the newest: {checkpoint.path}, after {steps} steps.", file=sys.stderr)
    sampler, codec = checkpoint.part("sampler", Sampler), checkpoint.part("codec", Codec)
    denoiser = checkpoint.denoiser(average, device)
    conditioning, prompts = checkpoint.conditioning(), checkpoint.prompts
    return checkpoint, Generator(denoiser, conditioning, codec, sampler, prompts=prompts)


def choose(
    generator: "Generator",
    checkpoint: "Checkpoint",
    sampler: str | None,
    guidance: str | None,
    steps: int | None,
    scale: float | None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw with these from now on, or with the run's where `None`; returns them in words."""
    from pipeline.building import OURS, Config, Text, brief, make
    from pipeline.checkpoint import Checkpoint
    from pipeline.denoisers import Denoiser
    from pipeline.guidance import Guidance
    from pipeline.samplers import Sampler

    config = Config()
    for name, file in (("sampler", sampler), ("guidance", guidance)):
        told = Text(file) if file else checkpoint.about[name]
        config.set(name, told, f"--{name} {file}" if file else str(checkpoint.path))
    if scale is not None:
        if config.get("guidance") is None:
            config.set("guidance", {"class_path": "pipeline.guidance.ClassifierFree"})
        config.set("guidance.scale", scale)
    if steps is not None:
        config.set("sampler.steps", steps)
    config.add(options)

    def weaker(path: str) -> Denoiser:
        """The denoiser of another checkpoint, for x and u as those of the first."""
        other = Checkpoint(path, checkpoint.trust)
        for key, what in (("codec", "other data"), ("fingerprint", "another conditioning")):
            if other.about[key] != checkpoint.about[key]:
                said = f"{other.path} is a model of {what} than {checkpoint.path}"
                raise UserError(f"{said}, and cannot guide it.")
        return other.denoiser().to(generator.device)

    how: dict[str, Any] = {"trust": (OURS, *checkpoint.trust), "openers": {Denoiser: weaker}}
    generator.sampler = make(config.resolve("sampler", Sampler, **how))
    generator.guidance = make(config.resolve("guidance", Guidance | None, **how))
    if generator.conditioning is None and getattr(generator.guidance, "needs_condition", False):
        given = {"guidance": guidance, "scale": scale} | dict.fromkeys(
            (one[2:].partition("=")[0] for one in options if one.startswith("--guidance.")), True
        )
        if told := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"{checkpoint.path} was trained without a condition, so there is nothing to guide "
                f"it by: leave out --{told[-1]}, or use Autoguidance."
            )
        generator.guidance = None  # the run's, which it does not use
    generator.guided()  # what is wrong is found first
    return {
        "sampler": brief(generator.sampler),
        "guidance": brief(generator.guidance),
        "shape": list(generator.codec.shape),
    }


def read_features(file: str | None, device: str) -> "Features":
    """The features that a YAML of conf/features/ names; EfficientNet-Lite0 by default."""
    from pipeline.building import Config, Text, make
    from pipeline.evaluation.features import EfficientNetLite0, Features

    if file is None:
        return EfficientNetLite0().to(device)
    config = Config()
    config.set("features", Text(file))
    return make(config.resolve("features", Features)).to(device)
