"""Prompt, label or vector → u, one tensor (B, L, E) whose padded rows are exactly zero."""

from pipeline.conditioning.base import Conditioning, align
from pipeline.conditioning.cache import embed_distinct
from pipeline.conditioning.text import TextEncoder
from pipeline.conditioning.vectors import Classes, Vectors

__all__ = ["Classes", "Conditioning", "TextEncoder", "Vectors", "align", "embed_distinct"]
