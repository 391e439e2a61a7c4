"""Prompt, label, vector or picture → u."""

from pipeline.conditioning.base import *
from pipeline.conditioning.cache import *
from pipeline.conditioning.pictures import *
from pipeline.conditioning.text import *
from pipeline.conditioning.vectors import *
