from pipeline.mcmc.targets import GaussianMixture, Target

__all__ = ["GaussianMixture", "Target"]
