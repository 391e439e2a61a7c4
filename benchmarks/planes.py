"""Whether what is drawn from a picture obeys it, and a sheet: given, drawn three times, true.

For held-out pictures, A(x) of the drawn x is compared with what was given, where it is known: root
mean square of the difference, in grey levels; beside it the same with what another picture gave
(each row the next one's), and for pictures drawn from the prompt alone. Then how far the drawn
pictures are from the true ones, and these from the true ones of other rows.

A model that is given no picture, such as the default, draws by moment matching, from the prompt
and what is known of the picture, and from the latter alone.

    python benchmarks/planes.py --checkpoint runs/super_resolution/TIME --out super_resolution.png
    python benchmarks/planes.py --checkpoint runs/shapes/TIME --task masked
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.checkpoint import Checkpoint
from pipeline.composition import MomentMatching
from pipeline.conditioning import Downsampled, Given, Masked, Picture
from pipeline.data import DataModule
from pipeline.generator import Generator
from pipeline.noise import Noise
from pipeline.png import contact_sheet

DRAWS = 3  # of each picture in the sheet
TASKS = {"masked": Masked, "downsampled": Downsampled}


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


def matched(
    generator: Generator, picture: Picture, values: Sequence[Given], truth: Tensor, scale: float
) -> Tensor:
    """Draws of a model of prompts alone, by moment matching, given what is known of each picture;
    with `scale` 0 the prompt is not.
    """
    drawn = []
    for i, value in enumerate(values):
        y = torch.where(value.planes[-1:] == 1, truth[i], torch.nan)
        if isinstance(picture, Downsampled):
            y = avg_pool2d(truth[i], picture.factor)
        generator.guidance = MomentMatching(y, scale=scale)
        drawn += generator.draw([value.prompt], [i], micro_batch=1)
    return torch.cat(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--number", type=int, default=48, help="held-out pictures")
    parser.add_argument("--shown", type=int, default=12, help="pictures of the sheet")
    parser.add_argument("--path", help="where the data are now, if they have moved")
    parser.add_argument("--task", choices=TASKS, help="for a model that is given no picture")
    parser.add_argument("--out", default="planes.png")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.checkpoint)
    generator = Generator.from_checkpoint(args.checkpoint)
    picture, codec = generator.conditioning, generator.codec
    if args.path:
        checkpoint.about["data"]["init_args"]["path"] = args.path
    values, rows = checkpoint.data(DataModule).held_out(args.number)
    truth = codec.encode(rows)
    if isinstance(picture, Picture):
        given = torch.stack([value.planes for value in values])
        x = torch.cat(list(generator.draw(values, range(args.number))))
        print("from picture and prompt:", json.dumps(measured(picture, x, given, truth)))
        if picture.prompt is not None:
            alone = [str(value) for value in values]
            x_alone = torch.cat(list(generator.draw(alone, range(args.number))))
            print("from the prompt alone:", json.dumps(measured(picture, x_alone, given, truth)))
        more = [codec.decode(x)]
        for k in range(1, DRAWS):
            seeds = range(k * args.number, k * args.number + args.shown)
            more.append(torch.cat(list(generator(values[: args.shown], seeds))))
    else:
        picture = TASKS[args.task or "masked"]()
        picture.see(codec.shape)
        given = picture(truth, picture.known(truth, Noise("known")))
        values = [Given(prompt, planes) for prompt, planes in zip(values, given, strict=True)]
        more = []
        for scale, name in ((1.0, "picture and prompt"), (0.0, "the picture alone")):
            x = matched(generator, picture, values, truth, scale)
            print(f"from {name}:", json.dumps(measured(picture, x, given, truth)), flush=True)
            more.append(codec.decode(x))
    cells, captions = [], []
    for i, value in enumerate(values[: args.shown]):
        known = codec.decode(value.planes[:-1].expand(codec.shape))
        cells += [known, *(some[i] for some in more), rows[i]]
        captions += ["given", str(value), *[""] * (len(more) - 1), "true"]
    contact_sheet(torch.stack(cells), captions, columns=2 * (len(more) + 2), side=64).save(
        args.out
    )


if __name__ == "__main__":
    main()
