from pipeline.samplers.base import Sampler
from pipeline.samplers.diffusion import DDIM, Heun

__all__ = ["DDIM", "Heun", "Sampler"]
