"""`reference`: the statistics of a data set, made once and found again."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.doors.shared import add_device_and_trust, add_features, add_number, read_features
from pipeline.errors import UserError
from pipeline.files import check_writable

if TYPE_CHECKING:
    from pipeline.data import DataModule

SUMMARY = "make the statistics that generated pictures are measured against"
FREE = ("data.", "seed_everything")  # how further options begin
DESCRIPTION = """\
Read the pictures of a data set with a feature network, and write down mean and covariance of the
features, and some of the features, with what decides them. What was made before is found again."""
EPILOG = """\
example: python -m pipeline reference -c conf/experiment/cifar10.yaml --data.path FOLDER
           --features conf/features/efficientnet.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    what = "an experiment, whose data are taken; --data.KEY VALUE changes them"
    source.add_argument("-c", "--config", metavar="YAML", help=what)
    what = "a checkpoint or a run's folder, with its data"
    source.add_argument("--checkpoint", metavar="FILE", help=what)
    source.add_argument("--pictures", metavar="FOLDER", help="a folder of pictures, all of it")
    add_number(parser, "--size", "PIXELS", 32, "the side that pictures of a folder are brought to")
    add_features(parser)
    add = parser.add_argument
    add("--split", default="train", help="which rows (default: train)")
    add("--number", type=int, metavar="N", help="pictures, drawn at random (default: all)")
    add_number(parser, "--batch", "B", 64, "pictures read together")
    add("--out", metavar="FILE", help="where to write (default: the cache, where it is found)")
    add_device_and_trust(parser)


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Make or find a reference, and say where it is."""
    from pipeline.distributed import join
    from pipeline.evaluation.reference import reference_of

    if options and not args.config:
        raise UserError(f"{options[0]} changes an experiment, and none is given with -c.")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder; name a file in it.")
    if args.out:
        check_writable(Path(args.out).parent, args.out)
    with join(args.device) as device:
        features = read_features(args.features, device)
        data = open_data(args, options)
        how = (args.number, args.batch, args.out)
        found, path = reference_of(data, args.split, features, *how)
    print(f"{found.about['pictures']}, split {args.split!r}")
    print(f"features: {features.name} ({features.protocol})")
    print(f"Statistics of {found.statistics.n} and features of {len(found.rows)} are in {path}")
    return 0


def open_data(args: argparse.Namespace, options: Sequence[str]) -> "DataModule":
    """The data of an experiment, of a checkpoint, or in a folder."""
    from pipeline.building import make
    from pipeline.checkpoint import Checkpoint
    from pipeline.data import DataModule, Hub
    from pipeline.experiment import read

    if args.pictures:
        # with itself as the split to validate on, nothing is held out of it
        return Hub(args.pictures, None, size=args.size, split="all", val_split="all")
    if args.checkpoint:
        return Checkpoint(args.checkpoint, args.trust).data(DataModule)
    return make(read([args.config], options).resolve("data", DataModule))
