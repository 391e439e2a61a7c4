r"""Reads a flat shape back from the pixels: a detector that is not the model.

A picture is taken apart as ground + a · (colour − ground), with a in [0, 1] how much of each pixel
the object covers:

1. the *ground* must be there: most pixels near white;
2. *colour*: the palette colour nearest to the mean of the pixels that are clearly not ground, if
   it is near enough and, mixed with the ground by a, explains the whole picture;
3. *shape*: each shape is laid over the object with the area and centroid of a, and the shape is
   the one whose overlap :math:`\sum \min(a, b) / \sum \max(a, b)` is largest, if it is large:
   holes, noise, a second object all lower it; and the edge, :math:`\sum 4 a (1 - a)` for each
   pixel of half-extent, must be sharp;
4. *size* from that shape's extent, *position* from its middle, where such ones exist nearby.

What fails a test is read as None: not a picture of one object. The thresholds let through noise of
±20 grey levels and edges softened by half a pixel.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from pipeline.data import Attributes, coverage
from pipeline.data.shapes import BACKGROUND, COLOURS, POSITIONS, SHAPES, SIZES

__all__ = ["VALUES", "columns", "grain", "read"]

GROUND = 0.4  # the least part of the picture that is ground
COLOUR = 70.0  # RGB distance of the object's mean colour from its palette colour
RESIDUAL = 32.0  # root mean square difference from ground + a (colour − ground), in grey levels
OVERLAP = 0.75  # of the object and its shape
MARGIN = 0.03  # by which the best shape's overlap exceeds the next
SIZE = 0.22  # relative distance from the nearest size
POSITION = 3.7  # pixels from the nearest position
EDGE = 10.0  # half-covered pixels per pixel of half-extent: drawn up to 7.5, blurred by 2 px 14
GAP = 2  # pixels between the object and what counts as ground: edges are softened by one
AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 2.56}  # of a half-extent of 1
SINK = {"triangle": 1 / 3}  # how far the centroid lies below the middle, in half-extents
WHITE = np.array(BACKGROUND, np.float32)[:, None, None]
VALUES = dict(zip(Attributes._fields, map(len, (COLOURS, SHAPES, SIZES, POSITIONS)), strict=True))
PALETTE = np.array(list(COLOURS.values()), np.float32)  # (K, 3)


def read(pictures: Tensor | np.ndarray, batch: int = 256) -> list[Attributes | None]:
    """What each of uint8 pictures (N, 3, 32, 32) shows, or None; `batch` are read at a time."""
    pixels = torch.as_tensor(pictures).cpu().numpy().astype(np.float32)
    if pixels.ndim != 4 or pixels.shape[1:] != (3, 32, 32):
        raise ValueError(f"Pictures have shape {tuple(pixels.shape)}; expected (N, 3, 32, 32).")
    parts = np.array_split(pixels, len(pixels) // batch + 1)
    return [one for some in parts for one in read_some(some)]


def read_some(x: np.ndarray) -> list[Attributes | None]:
    if not len(x):
        return []
    fine = (np.linalg.norm(x - WHITE, axis=1) < 60).mean((1, 2)) > GROUND
    colour, good = read_colour(x)
    a, good_mix = cover(x, colour)
    shape, x_middle, y_middle, radius, good_shape = read_shape(a)
    off = abs(np.log(radius[:, None] / np.array(list(SIZES.values()))))
    size, good_size = nearest(off, SIZE)
    places = np.array(list(POSITIONS.values()))
    off = np.hypot(x_middle[:, None] - places[:, 0], y_middle[:, None] - places[:, 1])
    position, good_position = nearest(off, POSITION)
    sharp = (4 * a * (1 - a)).sum((1, 2)) < EDGE * radius
    fine &= good & good_mix & good_shape & sharp & good_size & good_position
    names = (list(COLOURS), SHAPES, list(SIZES), list(POSITIONS))
    index = np.stack([colour, shape, size, position], 1)
    return [
        Attributes(*(of[i] for of, i in zip(names, row, strict=True))) if ok else None
        for row, ok in zip(index, fine, strict=True)
    ]


def read_colour(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The palette colour nearest to the object's mean (N,), and whether it is near."""
    away = np.linalg.norm(x - WHITE, axis=1)  # (N, H, W)
    core = away >= 0.8 * np.quantile(away, 0.985, axis=(1, 2))[:, None, None]
    mean = (x * core[:, None]).sum((2, 3)) / core.sum((1, 2))[:, None]
    return nearest(np.linalg.norm(mean[:, None] - PALETTE, axis=2), COLOUR)


def nearest(off: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Of distances (N, K) the place of the least (N,), and whether it is less than the most."""
    return off.argmin(1), off.min(1) < most


def cover(x: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel is covered (N, H, W), and whether that explains the picture."""
    toward, off = PALETTE[colour] - WHITE[:, 0, 0], x - WHITE  # (N, 3), (N, 3, H, W)
    a = np.einsum("nchw,nc->nhw", off, toward) / (toward**2).sum(1)[:, None, None]
    a = a.clip(0, 1)
    rest = off - a[:, None] * toward[:, :, None, None]
    everywhere = np.sqrt((rest**2).mean((1, 2, 3)))
    inside = np.sqrt(((rest**2).mean(1) * a).sum((1, 2)) / a.sum((1, 2)).clip(1))
    return steepen(a), (everywhere < RESIDUAL) & (inside < 1.5 * RESIDUAL)


def steepen(a: np.ndarray) -> np.ndarray:
    """Sets faint noise to 0 and 1: a thousand pixels of it would outweigh the object."""
    return ((a - 0.2) / 0.6).clip(0, 1)


def read_shape(a: np.ndarray) -> tuple[np.ndarray, ...]:
    """The best shape, the middle and half-extent of it (N,), and whether it is good."""
    area = a.sum((1, 2)).clip(1)
    grid = np.arange(a.shape[-1]) + 0.5
    x, y = (a.sum(1) * grid).sum(1) / area, (a.sum(2) * grid).sum(1) / area
    radius = np.stack([np.sqrt(area / AREA[shape]) for shape in SHAPES])  # (4, N)
    y_middle = np.stack([y - SINK.get(s, 0) * r for s, r in zip(SHAPES, radius, strict=True)])
    each = zip(SHAPES, y_middle, radius, strict=True)
    overlap = np.stack([iou(a, steepen(coverage(s, x, *y_and_r))) for s, *y_and_r in each])
    best, rows = overlap.argmax(0), np.arange(len(a))
    ranked = np.sort(overlap, 0)
    good = (ranked[-1] > OVERLAP) & (ranked[-1] - ranked[-2] > MARGIN)
    return best, x, y_middle[best, rows], radius[best, rows], good


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(a, b).sum((1, 2)) / np.maximum(a, b).sum((1, 2)).clip(1)


def columns(rows: Sequence[Attributes | None]) -> dict[str, list[str | None]]:
    """The attributes of all, one by one; None where nothing was read or asked."""
    return {name: [getattr(one, name, None) for one in rows] for name in Attributes._fields}


def grain(pictures: Tensor | np.ndarray, found: Sequence[Attributes | None]) -> float | None:
    r"""How far the ground is from flat, in grey levels: the root of the mean square difference
    from the ground's colour, over channels and all pixels more than two from the object.

    White is the end of the range: noise of standard deviation σ around it, cut off there, has a
    grain of :math:`\sigma / \sqrt{2}`. It is `None` where none of the uint8 pictures
    (N, 3, 32, 32) shows one object, by what was found in them.
    """
    shown = np.array([one is not None for one in found])
    pixels, square, count = torch.as_tensor(pictures).cpu().numpy()[shown], 0.0, 0
    for some in np.array_split(pixels, len(pixels) // 256 + 1):
        x = some.astype(np.float32)
        if len(x):
            a, _ = cover(x, read_colour(x)[0])
            near = max_pool2d(torch.from_numpy(a).float()[:, None], 2 * GAP + 1, 1, GAP)[:, 0] > 0
            ground = ((x - WHITE) ** 2).mean(1)[~near.numpy()]
            square, count = square + float(ground.sum(dtype=np.float64)), count + ground.size
    return (square / count) ** 0.5 if count else None
