"""Pictures → features: what a distance between two sets of pictures is measured in."""

from pipeline.evaluation.features.base import Features, Own
from pipeline.evaluation.features.efficientnet import EfficientNetLite0
from pipeline.evaluation.features.inception import Inception
from pipeline.evaluation.features.vision import Vision

__all__ = ["EfficientNetLite0", "Features", "Inception", "Own", "Vision"]
