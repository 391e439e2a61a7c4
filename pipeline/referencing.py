"""`reference`: the statistics of a data set, made once, written down with what decides them, and
found again.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from pipeline.data import DataModule, Hub
from pipeline.drawing import pick_device
from pipeline.errors import UserError
from pipeline.evaluation.features import EfficientNetLite0, Features
from pipeline.evaluation.reference import reference_of
from pipeline.generator import build, read_checkpoint

__all__ = ["read_features", "reference"]

PLAIN = dict | list | bool | int | float | str | None


def reference(args: Namespace) -> int:
    """The door: makes or finds a reference, and says where it is."""
    features = read_features(args.features).to(pick_device(args.device))
    data = open_data(args)
    found, path = reference_of(data, args.split, features, args.number, args.batch, args.out)
    print(f"{found.about['pictures']}, split {args.split!r}")
    print(f"features: {features.name} ({features.protocol})")
    print(f"Statistics of {found.statistics.n} and features of {len(found.rows)} are in {path}")
    return 0


def read_features(file: str | None) -> Features:
    """The features that a YAML of conf/features/ names; EfficientNet-Lite0 by default."""
    if file is None:
        return EfficientNetLite0()
    if not Path(file).is_file():
        raise UserError(f"--features {file}: there is no such file; conf/features/ has some.")
    return parse(Features, "features", ["--features", file])


def open_data(args: Namespace) -> DataModule:
    """The data of an experiment, of a checkpoint, or in a folder."""
    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]} changes an experiment, and none is given with -c.")
    if args.pictures:
        # with itself as the split to validate on, nothing is held out of it
        return Hub(args.pictures, None, size=args.size, val_split="train")
    if args.checkpoint:
        path = Path(args.checkpoint)
        path = path / "last.ckpt" if path.is_dir() else path
        return build(read_checkpoint(path)["pipeline"]["data"], args.trust)
    if not Path(args.config).is_file():
        raise UserError(f"-c {args.config}: there is no such file; conf/experiment/ has some.")
    others = set(yaml.safe_load(Path(args.config).read_text())) - {"data"}
    return parse(DataModule, "data", ["--config", args.config, *args.overrides], others)


def parse(
    cls: type, name: str, argv: list[str], others: set[str] | frozenset = frozenset()
) -> Any:
    """Builds what `name` is in a configuration, and leaves the other parts as they are."""
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser(exit_on_error=False)
    if others:
        parser.add_argument("--config", action="config")
    for other in sorted(others):
        parser.add_argument(f"--{other}", type=PLAIN)  # Any would build what it names
    parser.add_subclass_arguments(cls, name, required=True)
    if "seed_everything" in others:
        parser.link_arguments("seed_everything", f"{name}.init_args.seed")
    try:
        return parser.instantiate(parser.parse_args(argv))[name]
    except ArgumentError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{' '.join(argv)} does not say what {name} to use: {reason}") from error
