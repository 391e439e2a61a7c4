from pipeline.samplers.base import Sampler, State
from pipeline.samplers.diffusion import DDIM, DPMSolver, Heun
from pipeline.samplers.langevin import AnnealedLangevin, Langevin, PredictorCorrector
from pipeline.samplers.likelihood import Likelihood

__all__ = [
    "DDIM",
    "AnnealedLangevin",
    "DPMSolver",
    "Heun",
    "Langevin",
    "Likelihood",
    "PredictorCorrector",
    "Sampler",
    "State",
]
