"""Rows of pictures or vectors, and batches of them."""

from pipeline.data.base import Batch, DataModule
from pipeline.data.hub import Hub
from pipeline.data.pictures import Pictures
from pipeline.data.points import Points
from pipeline.data.shapes import Attributes, Pair, Relations, Shapes

__all__ = [
    "Attributes",
    "Batch",
    "DataModule",
    "Hub",
    "Pair",
    "Pictures",
    "Points",
    "Relations",
    "Shapes",
]
