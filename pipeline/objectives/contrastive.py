r"""Noise-contrastive estimation: a density is learned by telling data from noise.

A classifier whose only freedom is the log-density of the data is right most often when that
density is. As in score matching the data are taken as they are, at t = 0 with no noise added: what
is learned is the density of clean x,

.. math:: \log p(x \mid u) = \log p(x_0 \mid u) + d \log \alpha_0, \quad x_0 = \alpha_0 x, \quad
    d = \dim x

and no other time is trained. The schedule's noise ratio at t = 0 sets nothing but the network's
scales: let it be near the finest detail of the law.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline.condition import U
from pipeline.denoisers import Preconditioned
from pipeline.mcmc.targets import Law
from pipeline.noise import Noise
from pipeline.objectives.base import Objective, clean

__all__ = ["NCE", "ConditionalNCE"]


def _log_prob(denoiser: Preconditioned, points: list[Tensor], u: U) -> Tensor:
    """log p(x | u) up to a constant, of several points each, in one pass, (points, B)."""
    x_0, t = clean(denoiser, torch.cat(points))
    u = None if u is None else u.repeat(len(points))
    log_alpha = torch.log(denoiser.schedule(t)[0])
    log_p = denoiser.log_prob(x_0, t, u) + x_0[0].numel() * log_alpha
    return log_p.unflatten(0, (len(points), -1))


class NCE(Objective):
    r"""Noise-contrastive estimation: data against a stated law.

    .. math:: -\log h(x) - \sum_{k=1}^{\nu} \log \big( 1 - h(y_k) \big), \quad
        h(x) = \operatorname{sigmoid} \Big( \log \frac{p(x \mid u)}{\nu \, p_c(x)} \Big), \quad
        y_k \sim p_c

    The least value is reached by the law of clean x given u, *with* its constant: the energy must
    have a learned one. Where :math:`p_c` has no mass nothing is learned, and far from the data,
    where a point is noise beyond doubt, little: the density is small but its slope may be wrong.

    References:
        | Gutmann & Hyvärinen, 2012; https://jmlr.org/papers/v13/gutmann12a.html

    Arguments:
        contrast: The law :math:`p_c` of the noise points, in the units of x.
        draws: The number ν of noise points for each data point.

    Raises:
        ValueError: The denoiser has no normalised density.
    """

    def __init__(self, contrast: Law, draws: int = 1) -> None:
        if draws < 1:
            raise ValueError(f"draws = {draws} must be at least 1.")
        self.contrast, self.draws = contrast, draws

    def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
        if getattr(denoiser, "normaliser", None) is None:
            raise ValueError(
                "NCE learns a density with its constant: set model.denoiser to "
                "pipeline.denoisers.Energy with normalised: true."
            )
        drawn = [self.contrast.draw(noise, len(x)).to(x) for _ in range(self.draws)]
        points = [x, *(y.reshape(x.shape) for y in drawn)]
        log_contrast = self.contrast.log_prob(torch.cat(points).flatten(1))
        log_ratio = _log_prob(denoiser, points, u) - log_contrast.unflatten(0, (len(points), -1))
        log_odds = log_ratio - torch.log(x.new_tensor(self.draws))
        return softplus(-log_odds[0]) + softplus(log_odds[1:]).sum(dim=0)


class ConditionalNCE(Objective):
    r"""Conditional noise-contrastive estimation: each data point against itself with noise.

    .. math:: \frac{2}{\kappa} \sum_{k=1}^{\kappa} \log \Big( 1
        + \frac{p(y_k \mid u)}{p(x \mid u)} \Big), \quad y_k = x + \sigma n_k

    The noise being symmetric, its own density cancels, and so does every constant of the model:
    the least is reached by the law of clean x given u up to one. For small σ it is score matching.

    References:
        | Ceylan & Gutmann, 2018; https://arxiv.org/abs/1806.03664

    Arguments:
        sigma: The standard deviation σ of the noise, in the units of x.
        draws: The number κ of noise points for each data point.
    """

    def __init__(self, sigma: float, draws: int = 1) -> None:
        if not sigma > 0 or draws < 1:
            raise ValueError(f"sigma = {sigma} must be positive and draws = {draws} at least 1.")
        self.sigma, self.draws = sigma, draws

    def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
        noisy = [x + self.sigma * noise.normal(x) for _ in range(self.draws)]
        log_p = _log_prob(denoiser, [x, *noisy], u)
        return 2 * softplus(log_p[1:] - log_p[0]).mean(dim=0)
