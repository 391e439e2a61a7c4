"""Whether a picture shows what its prompt asks for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.shapes import Relations, Shapes
from pipeline.errors import UserError
from pipeline.evaluation.shapes import accuracy
from pipeline.generator import Generator
from pipeline.png import to_uint8

__all__ = ["shapes_adherence"]


def shapes_adherence(
    generator: Generator,
    data: Any,
    number: int,
    seed: int = 0,
    micro_batch: int = 16,
    progress: Callable[[], object] | None = None,
) -> tuple[dict[str, Any], Tensor, list[str]]:
    """Draw unseen combinations of `Shapes` and read the attributes back from the pixels.

    The combinations are taken in a random order that `seed` decides, each once before any twice;
    picture i is drawn with seed `seed` + i.

    Arguments:
        generator: What draws.
        data: The data module the model was trained on.
        number: The number N of pictures.
        seed: Decides the order of the prompts, the pictures, and how prompts are shuffled.
        micro_batch: How many are drawn together.
        progress: Called after each step of the sampler.

    Returns:
        A result of plain numbers: "accuracy" of each attribute, of their "mean" and of "all"
        together; the same for the prompts in another order, "shuffled", which shows that the
        prompt decided; and "chance". Then the uint8 pictures (N, 3, 32, 32), and their prompts.

    Raises:
        UserError: The data are not the built-in shapes.
    """
    if not isinstance(data, Shapes) or isinstance(data, Relations):
        raise UserError(
            f"The model was trained on {type(data).__name__}; attributes can be read back from "
            "the built-in Shapes only."
        )
    order = np.random.default_rng(seed)
    unseen = data.combinations("unseen")
    rounds = [order.permutation(len(unseen)) for _ in range(-(-number // len(unseen)))]
    wanted = [unseen[k] for k in np.concatenate(rounds)[:number]]
    prompts = [one.caption for one in wanted]
    seeds = range(seed, seed + number)
    x = torch.cat([x.cpu() for x in generator(prompts, seeds, micro_batch, progress)])
    pictures = to_uint8(x)
    right = accuracy(pictures, wanted)
    wrong = accuracy(pictures, [wanted[k] for k in order.permutation(number)])
    names = ("colour", "shape", "size", "position", "mean", "all")
    result = {
        "pictures": number,
        "seed": seed,
        "read": right["read"],
        "accuracy": {name: right[name] for name in names},
        "shuffled": {name: wrong[name] for name in names},
        "chance": {name: right[f"chance_{name}"] for name in names},
    }
    return result, pictures, prompts
