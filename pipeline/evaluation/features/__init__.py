"""Pictures → features: what a distance between two sets of pictures is measured in."""

from pipeline.evaluation.features.base import *
from pipeline.evaluation.features.efficientnet import *
from pipeline.evaluation.features.inception import *
from pipeline.evaluation.features.vision import *
