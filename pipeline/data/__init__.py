"""Rows of pictures, signals or vectors, and batches of them."""

from pipeline.data.base import *
from pipeline.data.hub import *
from pipeline.data.openmoji import *
from pipeline.data.pictures import *
from pipeline.data.points import *
from pipeline.data.sequences import *
from pipeline.data.shapes import *
from pipeline.data.stream import *
from pipeline.data.table import *
