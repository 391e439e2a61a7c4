"""Samplers that follow the reverse of a diffusion."""

import torch
from torch import Tensor

from pipeline.denoisers import Denoiser
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers.base import Sampler

__all__ = ["DDIM", "Heun"]


class DDIM(Sampler):
    r"""Denoising diffusion implicit models.

    .. math:: x_s = \alpha_s D + \sigma_s \left( \sqrt{1 - \eta^2 \tau} \,
        \frac{x_t - \alpha_t D}{\sigma_t} + \eta \sqrt{\tau} \, n \right), \quad
        \tau = 1 - \frac{\alpha_t^2 \sigma_s^2}{\alpha_s^2 \sigma_t^2}

    η = 0 is Euler's method on the probability-flow equation, of order 1; η = 1 is DDPM, the
    reverse of the lecture's equation (7), whose step is the exact posterior of :math:`x_s` given
    :math:`x_t` and x = D.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), equations (12), (16)
        | https://arxiv.org/abs/2010.02502
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), equation (7)
        | https://arxiv.org/abs/2006.11239

    Arguments:
        steps: The number of times, which is the number of evaluations.
        eta: The stochasticity η in [0, 1].
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 50, eta: float = 0.0, rho: float = 7.0) -> None:
        super().__init__(steps, rho)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta} must lie between 0 (deterministic) and 1 (DDPM).")
        self.eta = eta

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        u: Tensor | None,
        noise: Noise | PictureNoise,
    ) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        d = denoiser(x_t, t, u)
        n = (x_t - alpha_t * d) / sigma_t
        if self.eta:
            tau = 1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
            n = torch.sqrt(1 - self.eta**2 * tau) * n + self.eta * torch.sqrt(tau) * noise.normal(
                x_t
            )
        return alpha_s * d + sigma_s * n


class Heun(Sampler):
    r"""Heun's method on the probability-flow equation, of order 2.

    With :math:`y = x_t / \alpha_t`, r the noise ratio and :math:`f(y, r) = (y - D) / r`, a step
    from :math:`r_t` to
    :math:`r_s` is

    .. math:: \tilde y = y_t + (r_s - r_t) \, f(y_t, r_t), \quad
        y_s = y_t + \tfrac{r_s - r_t}{2} \big( f(y_t, r_t) + f(\tilde y, r_s) \big)

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models
        |   (Karras et al., 2022), algorithm 1
        | https://arxiv.org/abs/2206.00364

    Arguments:
        steps: The number of times N; 2 N − 1 evaluations.
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 18, rho: float = 7.0) -> None:
        super().__init__(steps, rho)

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        u: Tensor | None,
        noise: Noise | PictureNoise,
    ) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        r_t, r_s = sigma_t / alpha_t, sigma_s / alpha_s
        y = x_t / alpha_t
        slope = (y - denoiser(x_t, t, u)) / r_t
        ahead = y + (r_s - r_t) * slope
        slope_ahead = (ahead - denoiser(alpha_s * ahead, s, u)) / r_s
        return alpha_s * (y + (r_s - r_t) / 2 * (slope + slope_ahead))
