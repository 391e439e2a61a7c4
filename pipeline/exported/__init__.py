"""A model as it leaves the house: its folder, and the card in it."""

from pipeline.exported.card import *
from pipeline.exported.folder import *
