"""Whether what is drawn from a picture obeys it, and a sheet: given, drawn three times, true.

For held-out pictures, A(x) of the drawn x is compared with what was given, where it is known: root
mean square of the difference, in grey levels; beside it the same with what another picture gave
(each row the next one's), and for pictures drawn from the prompt alone. Then how far the drawn
pictures are from the true ones, and these from the true ones of other rows.

    python benchmarks/planes.py --checkpoint runs/super_resolution/TIME --out super_resolution.png
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.checkpoint import Checkpoint
from pipeline.conditioning import Picture
from pipeline.data import DataModule
from pipeline.generator import Generator
from pipeline.png import contact_sheet

DRAWS = 3  # of each picture in the sheet


def levels(difference: Tensor, where: Tensor) -> float:
    """The root mean square of a difference of x where it counts, in grey levels."""
    counted = where.expand(difference.shape)
    return 127.5 * float((difference.square() * counted).sum() / counted.sum()) ** 0.5


def measured(picture: Picture, x: Tensor, given: Tensor, truth: Tensor) -> dict[str, float]:
    """How far drawn pictures are from what was given, from what others were, from the truth."""
    found, seen = {}, picture.observe(x)
    if not picture.pairs:  # of a pair x does not say what was given
        for name, other in (("own", given), ("shuffled", given.roll(1, 0))):
            found[name] = levels(seen - other[:, :-1], given[:, -1:] * other[:, -1:])
    everywhere = torch.ones_like(truth[:, :1])
    found["from true"] = levels(x - truth, everywhere)
    found["from true, shuffled"] = levels(x - truth.roll(1, 0), everywhere)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--number", type=int, default=48, help="held-out pictures")
    parser.add_argument("--shown", type=int, default=12, help="pictures of the sheet")
    parser.add_argument("--path", help="where the data are now, if they have moved")
    parser.add_argument("--out", default="planes.png")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.checkpoint)
    generator = Generator.from_checkpoint(args.checkpoint)
    picture, codec = generator.conditioning, generator.codec
    assert isinstance(picture, Picture), "the model is given no picture"
    if args.path:
        checkpoint.about["data"]["init_args"]["path"] = args.path
    values, rows = checkpoint.data(DataModule).held_out(args.number)
    given, truth = torch.stack([value.planes for value in values]), codec.encode(rows)
    x = torch.cat(list(generator.draw(values, range(args.number))))
    print("from picture and prompt:", json.dumps(measured(picture, x, given, truth)))
    if picture.prompt is not None:
        alone = [str(value) for value in values]
        x_alone = torch.cat(list(generator.draw(alone, range(args.number))))
        print("from the prompt alone:", json.dumps(measured(picture, x_alone, given, truth)))
    cells, captions = [], []
    more = [codec.decode(x)]
    for k in range(1, DRAWS):
        seeds = range(k * args.number, k * args.number + args.shown)
        more.append(torch.cat(list(generator(values[: args.shown], seeds))))
    for i, value in enumerate(values[: args.shown]):
        known = codec.decode(value.planes[:-1].expand(codec.shape))
        cells += [known, *(some[i] for some in more), rows[i]]
        captions += ["given", str(value), *[""] * (DRAWS - 1), "true"]
    contact_sheet(torch.stack(cells), captions, columns=2 * (DRAWS + 2), side=64).save(args.out)


if __name__ == "__main__":
    main()
