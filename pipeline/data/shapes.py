r"""Flat shapes with captions that can be read back from the pixels.

*Shapes* is one object, "a small red circle at the top left": 6 colours × 4 shapes × 2 sizes × 5
positions = 240 combinations. *Relations* is two, "a red circle left of a blue square". A fifth of
all combinations is never trained on (split "unseen"). Which fifth is a Latin pattern on shuffled
attributes, so that every colour, shape, size and position, and every pair of colour and shape, is
seen in training. Captions say what is drawn, and drawing uses a generator of (seed, split) only:
the same bytes in every process.
"""

import io
from abc import abstractmethod
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.conditioning import Conditioning
from pipeline.data.base import Source
from pipeline.data.order import in_rounds
from pipeline.data.pictures import Pictures
from pipeline.errors import UserError

if TYPE_CHECKING:
    import datasets

__all__ = ["Attributes", "Drawings", "Pair", "Relations", "Shapes", "coverage", "draw"]

VERSION = 1  # of the drawing code: raise it when pictures would come out different
SPLITS = ("train", "val", "unseen")
SIDE = 32
BACKGROUND = (255, 255, 255)
COLOURS = {
    "red": (230, 25, 25),
    "green": (20, 165, 50),
    "blue": (35, 60, 235),
    "yellow": (255, 215, 0),
    "purple": (165, 40, 190),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 5.0, "large": 7.5}  # half of the extent, in pixels
POSITIONS = {
    "top left": (9.0, 9.0),
    "top right": (23.0, 9.0),
    "centre": (16.0, 16.0),
    "bottom left": (9.0, 23.0),
    "bottom right": (23.0, 23.0),
}
RELATIONS = {  # where the first object is, and where the second
    "left of": ((8.5, 16.0), (23.5, 16.0)),
    "right of": ((23.5, 16.0), (8.5, 16.0)),
    "above": ((16.0, 8.5), (16.0, 23.5)),
    "below": ((16.0, 23.5), (16.0, 8.5)),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Attributes(NamedTuple):
    """One object; size or position may be left unsaid ("a red circle")."""

    colour: str
    shape: str
    size: str | None = None
    position: str | None = None

    @property
    def caption(self) -> str:
        place = self.position and f"at the {self.position}"
        return " ".join(filter(None, ["a", self.size, self.colour, self.shape, place]))


class Pair(NamedTuple):
    """Two objects and how the first lies to the second, which may be left unsaid."""

    first: Attributes
    relation: str
    second: Attributes | None

    @property
    def caption(self) -> str:
        other = self.second.caption if self.second else "something"
        return f"{self.first.caption} {self.relation} {other}"


def coverage(
    shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, fine: int = 4
) -> np.ndarray:
    """How much a shape covers of every pixel: (N,) centres and half-extents → (N, 32, 32)."""
    grid = (np.arange(SIDE * fine) + 0.5) / fine
    dx = (grid[None, None, :] - x[:, None, None]) / radius[:, None, None]
    dy = (grid[None, :, None] - y[:, None, None]) / radius[:, None, None]
    inside = INSIDE[shape](dx, dy) & (abs(dx) <= 1) & (abs(dy) <= 1)
    return inside.reshape(-1, SIDE, fine, SIDE, fine).mean((2, 4), dtype=np.float32)


INSIDE = {  # for coordinates from the middle of the bounding box, in half-extents, y downwards
    "circle": lambda dx, dy: dx**2 + dy**2 <= 1,
    "square": lambda dx, dy: np.broadcast_to(True, np.broadcast_shapes(dx.shape, dy.shape)),
    "triangle": lambda dx, dy: 2 * abs(dx) <= dy + 1,
    "cross": lambda dx, dy: (abs(dx) <= 0.4) | (abs(dy) <= 0.4),
}


def draw(
    objects: Sequence[Attributes], x: np.ndarray, y: np.ndarray, radius: np.ndarray
) -> np.ndarray:
    """Objects at given centres → float pictures (N, 3, 32, 32) in [0, 255], on the background."""
    cover = np.zeros((len(objects), SIDE, SIDE), np.float32)
    for shape in SHAPES:
        rows = np.flatnonzero([one.shape == shape for one in objects])
        for some in np.array_split(rows, len(rows) // 256 + 1):
            cover[some] = coverage(shape, x[some], y[some], radius[some])
    colour = np.array([COLOURS[one.colour] for one in objects], np.float32)[:, :, None, None]
    ground = np.array(BACKGROUND, np.float32)[:, None, None]
    return ground + cover[:, None] * (colour - ground)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "png", compress_level=1)
    return file.getvalue()


class Drawings(Pictures):
    """Flat objects on white, and a caption for each; a member says which, and how they are drawn.

    Splits: `train` and `val` (the seen four fifths, other drawings), `unseen` (the other fifth).

    Arguments:
        per_combination: Training drawings of each seen combination; an eighth in `val`, `unseen`.
        seed: What decides the held-out fifth, the drawings and the order.
        more: See :class:`pipeline.data.DataModule`.
    """

    size, channels, fit, autoencoder = SIDE, 3, "crop", None
    jitter: float  # pixels, of the centre, each way

    def __init__(
        self, conditioning: Conditioning | None, per_combination: int = 32, **more: Any
    ) -> None:
        super().__init__(conditioning, SIDE, **more)
        if per_combination < 1:
            raise UserError(f"data.per_combination is {per_combination}; it must be at least 1.")
        self.per_combination = per_combination

    @abstractmethod
    def divide(self, generator: np.random.Generator) -> tuple[list[Any], list[Any]]:
        """Seen and unseen combinations."""

    @abstractmethod
    def render(self, plan: list[Any], generator: np.random.Generator) -> np.ndarray:
        """Combinations → uint8 pictures (N, 3, 32, 32)."""

    def partial(self, one: Any, generator: np.random.Generator) -> Any:
        """What of a combination a training caption says."""
        return one

    def combinations(self, split: str) -> list[Any]:
        """The combinations that a split draws; `train` and `val` share theirs."""
        seen, unseen = self.divide(np.random.default_rng((self.seed, 0)))
        return unseen if known(split) == "unseen" else seen

    def captions(self, split: str) -> list[str]:
        """The complete caption of every combination of a split: the prompts to evaluate."""
        return [one.caption for one in self.combinations(split)]

    def plan(self, split: str) -> tuple[list[Any], np.random.Generator]:
        """What to draw, row by row, and the generator to draw it with."""
        times = self.per_combination if split == "train" else max(1, self.per_combination // 8)
        stream = 1 + SPLITS.index(known(split))
        generator = np.random.default_rng((self.seed, stream))
        return self.combinations(split) * times, generator

    def values(self, split: str) -> list[str]:
        """The captions, row by row."""
        plan, _ = self.plan(split)
        if split == "train":
            generator = np.random.default_rng((self.seed, 4))
            plan = [self.partial(one, generator) for one in plan]
        return [one.caption for one in plan]

    def dataset(self, split: str) -> "datasets.Dataset":
        """The split as a Hugging Face dataset: image, caption and, whole, what was drawn."""
        from datasets import Dataset, Features, Image, Value

        plan, generator = self.plan(split)
        images = [{"bytes": png(pixels), "path": None} for pixels in self.render(plan, generator)]
        words = {"caption": self.values(split)} | columns(plan)
        types = {"image": Image(decode=False)} | {name: Value("string") for name in words}
        return Dataset.from_dict({"image": images} | words, features=Features(types))

    def held_out(self, number: int) -> tuple[list[str], Tensor]:
        """Unseen combinations, and drawings of them, made anew."""
        order = np.random.default_rng(0)
        plan = sampled(self.combinations("unseen"), number, order)
        asked, x = [one.caption for one in plan], self.render(plan, order)
        return self.given(asked, Source(x, None), slice(None)), torch.from_numpy(x)

    def fingerprint(self, split: str) -> str:
        table = (VERSION, COLOURS, SHAPES, SIZES, POSITIONS, RELATIONS, BACKGROUND, self.jitter)
        return f"{type(self).__name__} {split} {self.seed} {self.per_combination} {table}"


class Shapes(Drawings):
    """One flat object on white, and its caption; the arguments are those of `Drawings`.

    Training captions leave out the position in 15 % of the rows and the size in 10 %, so that a
    part of a caption is a prompt too.
    """

    jitter = 0.75
    drop = {"position": 0.15, "size": 0.10}

    def divide(self, generator: np.random.Generator) -> tuple[list[Any], list[Any]]:
        """Seen and unseen: for each colour, shape and size, one position of five is held out."""
        words = COLOURS, SHAPES, SIZES, POSITIONS
        mixed = [enumerate(generator.permutation(list(names)).tolist()) for names in words]
        seen, unseen = [], []
        for (i, colour), (j, shape), (k, size), (m, position) in product(*mixed):
            held_out = (i + 2 * j + k) % len(POSITIONS) == m
            (unseen if held_out else seen).append(Attributes(colour, shape, size, position))
        return sorted(seen), sorted(unseen)

    def render(self, plan: list[Any], generator: np.random.Generator) -> np.ndarray:
        centre = np.array([POSITIONS[one.position] for one in plan])
        centre = centre + generator.uniform(-self.jitter, self.jitter, centre.shape)
        radius = np.array([SIZES[one.size] for one in plan])
        radius = radius * generator.uniform(0.94, 1.06, len(plan))
        return draw(plan, centre[:, 0], centre[:, 1], radius).round().astype(np.uint8)

    def partial(self, one: Any, generator: np.random.Generator) -> Any:
        """The combination with some of its attributes left unsaid."""
        unsaid = generator.random(len(self.drop)) < list(self.drop.values())
        names = [name for name, leave in zip(self.drop, unsaid, strict=True) if leave]
        return one._replace(**dict.fromkeys(names))

    def wanted(self, number: int, order: np.random.Generator) -> list[Attributes]:
        return sampled(self.combinations("unseen"), number, order)


class Relations(Drawings):
    """Two flat objects on white, and a caption that says how they lie. There are 1,768 seen
    captions.

    "A left of B" and "B right of A" are the same picture, so they are held out together.

    Arguments:
        alone: The share of training captions that say one object only, "a red circle left of
            something": what a composition of two is made of.
        more: See `Drawings`.
    """

    jitter = 1.5
    radius = 5.5

    def __init__(
        self,
        conditioning: Conditioning | None,
        per_combination: int = 32,
        alone: float = 0.0,
        **more: Any,
    ) -> None:
        super().__init__(conditioning, per_combination, **more)
        if not 0 <= alone <= 1:
            raise UserError(f"data.alone is {alone}; it must be from 0 to 1.")
        self.alone = alone

    def divide(self, generator: np.random.Generator) -> tuple[list[Any], list[Any]]:
        """Seen and unseen: of what may stand right of an object, or below, a fifth is held out."""
        objects = [Attributes(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
        objects = [objects[i] for i in generator.permutation(len(objects))]
        seen, unseen = [], []
        three = enumerate(objects), enumerate(objects), enumerate(("left of", "above"))
        for (i, a), (j, b), (k, relation) in product(*three):
            if a != b:
                held_out = (i + 2 * j + k) % 5 == 0
                both = Pair(a, relation, b), Pair(b, OPPOSITE[relation], a)
                (unseen if held_out else seen).extend(both)
        return sorted(seen), sorted(unseen)

    def render(self, plan: list[Any], generator: np.random.Generator) -> np.ndarray:
        centre = np.array([RELATIONS[one.relation] for one in plan])  # (N, 2 objects, 2)
        centre = centre + generator.uniform(-self.jitter, self.jitter, centre.shape)
        radius = self.radius * generator.uniform(0.94, 1.06, centre.shape[:2])
        x, y = centre[..., 0], centre[..., 1]
        first = draw([one.first for one in plan], x[:, 0], y[:, 0], radius[:, 0])
        second = draw([one.second for one in plan], x[:, 1], y[:, 1], radius[:, 1])
        return (first + second - np.array(BACKGROUND)[:, None, None]).round().astype(np.uint8)

    def partial(self, one: Any, generator: np.random.Generator) -> Any:
        return one._replace(second=None) if generator.random() < self.alone else one


def known(split: str) -> str:
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}; there are 'train', 'val' and 'unseen'.")
    return split


def sampled(combinations: list[Any], number: int, order: np.random.Generator) -> list[Any]:
    """So many of them in random order, each once before any twice."""
    return [combinations[k] for k in in_rounds(len(combinations), number, order)]


def columns(plan: list[Any]) -> dict[str, list[str]]:
    """Attributes as columns: colour, shape, …; first_colour, …, relation, … for pairs."""
    flat = [one._asdict() if isinstance(one, Attributes) else flatten(one) for one in plan]
    return {name: [one[name] for one in flat] for name in flat[0]}


def flatten(pair: Any) -> dict[str, str]:
    a, b = pair.first, pair.second
    first = {"first_colour": a.colour, "first_shape": a.shape}
    second = {"second_colour": b.colour, "second_shape": b.shape}
    return first | {"relation": pair.relation} | second
