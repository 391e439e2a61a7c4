"""Prompt, label or vector → u, one tensor (B, L, E) whose padded rows are exactly zero."""

from .base import Conditioning
from .cache import embed_distinct
from .text import TextEncoder
from .vectors import Classes, Vectors

__all__ = ["Classes", "Conditioning", "TextEncoder", "Vectors", "embed_distinct"]
