"""Objects from YAML and JSON: one way for every door, checkpoint and test."""

from pipeline.building.config import Config, Text
from pipeline.building.part import Part, brief, describe, replace
from pipeline.building.plan import OURS, Plan, Resolver, build, dump, explain, make

__all__ = ["OURS", "Config", "Part", "Plan", "Resolver", "Text", "brief", "build", "describe"]
__all__ += ["dump", "explain", "make", "replace"]
