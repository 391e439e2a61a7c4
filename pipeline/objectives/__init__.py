from pipeline.objectives.base import Objective
from pipeline.objectives.contrastive import NCE, ConditionalNCE
from pipeline.objectives.denoising import DSM, Levels, LogNormal, OneLevelDSM, UniformTime
from pipeline.objectives.score_matching import ScoreMatching, SlicedScoreMatching

__all__ = [
    "DSM",
    "NCE",
    "ConditionalNCE",
    "Levels",
    "LogNormal",
    "Objective",
    "OneLevelDSM",
    "ScoreMatching",
    "SlicedScoreMatching",
    "UniformTime",
]
