"""Pictures of bytes to PNG files."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

__all__ = ["contact_sheet", "save"]


def _image(picture: Tensor) -> Image.Image:
    array = picture.cpu().numpy()  # (C, H, W)
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def save(picture: Tensor, path: Path, text: dict[str, str] | None = None) -> None:
    """Write a uint8 picture (C, H, W), C = 1 or 3, with words in its text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    _image(picture).save(path, pnginfo=info)


def contact_sheet(
    pictures: Tensor, captions: Sequence[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """A sheet of uint8 pictures (N, C, H, W), each with its caption below.

    Small pictures are enlarged by a whole factor without smoothing, so that pixels are seen.

    Arguments:
        pictures: The pictures.
        captions: A caption for each; an empty one leaves its place blank.
        columns: The number of pictures in a row.
        side: The width that a picture is enlarged towards, in pixels.
    """
    height, width = pictures.shape[-2:]
    zoom = max(round(side / width), 1)
    font = ImageFont.load_default(11)
    lines = [textwrap.wrap(caption, max(zoom * width // 6, 8))[:3] for caption in captions]
    text = 14 * max((len(line) for line in lines), default=0)
    cell_w, cell_h = zoom * width + 8, zoom * height + 8 + text
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_w + 8, rows * cell_h + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, line) in enumerate(zip(pictures, lines, strict=True)):
        left, top = 8 + i % columns * cell_w, 8 + i // columns * cell_h
        large = _image(picture).resize((zoom * width, zoom * height), Image.Resampling.NEAREST)
        sheet.paste(large, (left, top))
        below = left, top + zoom * height + 1
        draw.multiline_text(below, "\n".join(line), fill="black", font=font, spacing=1)
    return sheet
