r"""Denoisers: the conditional mean D, and the score it is worth.

A denoiser estimates :math:`D(x_t, t, u) = E[x \mid x_t, u]` for :math:`x_t = \alpha_t x + \sigma_t
n`. Among all the ways to write a score it is the one whose scale is the same at every noise level,
and the score follows from it (Tweedie–Miyasawa):

.. math:: \phi(x_t \mid u) = \nabla_{x_t} \log p(x_t \mid u)
    = \frac{\alpha_t D(x_t, t, u) - x_t}{\sigma_t^2}

That identity stands here once in each direction, `Denoiser.score` and `ScoreDenoiser`, and nowhere
else.

A network does not see :math:`x_t` but a scaled copy, and its output is scaled and added to
another: the members here differ in those scales alone. They are functions of the noise ratio
:math:`s = \sigma_t / \alpha_t` and act on
:math:`y = x_t / \alpha_t = x + s n`, so a denoiser is the same function of (y, s) under every
schedule.

References:
    | An Empirical Bayes Estimator of the Mean of a Normal Population (Miyasawa, 1961)
    | Tweedie's Formula and Selection Bias (Efron, 2011)
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pipeline.mcmc.targets import GaussianMixture, Target
from pipeline.schedules import Schedule, expand_as_batch

__all__ = ["EDM", "Denoiser", "Flow", "Preconditioned", "ScoreDenoiser"]


class Denoiser(nn.Module, ABC):
    r"""A conditional mean :math:`D(x_t, t, u) = E[x \mid x_t, u]` under a noise schedule.

    Arguments:
        schedule: The noise schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        r"""The conditional mean D, with the shape of x_t.

        Arguments:
            x_t: A noisy tensor :math:`x_t`, with shape :math:`(B, *)`.
            t: The time, with shape () or (B,).
            u: The condition, with shape (B, L, E), or `None`.
        """

    def score(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        r"""The score :math:`\phi(x_t \mid u) = (\alpha_t D - x_t) / \sigma_t^2`, with the shape of
        x_t.
        """
        alpha_t, sigma_t = (expand_as_batch(s, x_t) for s in self.schedule(t))
        return (alpha_t * self(x_t, t, u) - x_t) / sigma_t**2

    def at(self, t: Tensor, u: Tensor | None = None) -> Target:
        """The noisy conditional law at one time, as a target that has a score and no density."""
        return _AtTime(self, t, u)


class _AtTime(Target):
    def __init__(self, denoiser: Denoiser, t: Tensor, u: Tensor | None) -> None:
        self.denoiser, self.t, self.u = denoiser, t, u

    def score(self, x: Tensor) -> Tensor:
        return self.denoiser.score(x, self.t, self.u)


class ScoreDenoiser(Denoiser):
    r"""The denoiser of a law whose score at every noise level is known.

    .. math:: D(x_t, t, u) = \frac{x_t + \sigma_t^2 \, \phi(x_t \mid u)}{\alpha_t}

    Arguments:
        target: The law of clean x.
        schedule: The noise schedule.
    """

    def __init__(self, target: GaussianMixture, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.target = target

    def forward(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        alpha_t, sigma_t = self.schedule(t)
        phi = self.target.diffuse(alpha_t, sigma_t, u).score(x_t)
        alpha_t, sigma_t = expand_as_batch(alpha_t, x_t), expand_as_batch(sigma_t, x_t)
        return (x_t + sigma_t**2 * phi) / alpha_t


class Preconditioned(Denoiser):
    r"""A denoiser made of a network F between scales that depend on the noise ratio s.

    .. math:: D = c_\text{skip}(s) \, y
        + c_\text{out}(s) \, F\big(c_\text{in}(s) \, y, \log s, u\big),
        \quad y = x_t / \alpha_t, \quad s = \sigma_t / \alpha_t

    The scales and the sum are computed in the type of x_t, at least float32; the network may run
    in a lower one.

    Arguments:
        network: The network F(x, level, u), whose output has the shape of x.
        schedule: The noise schedule.
    """

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.network = network
        self.precision: torch.dtype | None = (
            None  # the type the network is autocast to; set by callbacks.Precision
        )

    @abstractmethod
    def scales(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The scales :math:`c_\text{in}, c_\text{skip}, c_\text{out}` at noise ratio s, with the
        shape of s.
        """

    def forward(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        alpha_t, sigma_t = self.schedule(t)
        s = sigma_t / alpha_t
        c_in, c_skip, c_out = (expand_as_batch(c, x_t) for c in self.scales(s))
        y = x_t / expand_as_batch(alpha_t, x_t)
        with torch.autocast(x_t.device.type, self.precision, enabled=self.precision is not None):
            f = self.network(c_in * y, torch.log(s).expand(len(x_t)), u)
        return c_skip * y + c_out * f.to(x_t.dtype)

    def weight(self, t: Tensor) -> Tensor:
        r"""The weight :math:`1 / c_\text{out}^2` that puts the error of D in units of the
        network's output.
        """
        return self.scales(self.schedule.ratio(t))[2] ** -2


class EDM(Preconditioned):
    r"""Scales that keep the network's input and target at unit variance at every noise level.

    .. math:: c_\text{in} = \frac{1}{\sqrt{s^2 + \sigma_d^2}}, \quad
        c_\text{skip} = \frac{\sigma_d^2}{s^2 + \sigma_d^2}, \quad
        c_\text{out} = \frac{s \, \sigma_d}{\sqrt{s^2 + \sigma_d^2}}

    With :math:`\sigma_d = 1` this is v-prediction up to a sign.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models
        |   (Karras et al., 2022), table 1
        | https://arxiv.org/abs/2206.00364

    Arguments:
        network: The network F(x, level, u), whose output has the shape of x.
        schedule: The noise schedule.
        sigma_data: The standard deviation :math:`\sigma_d` of the data.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, sigma_data: float = 0.5) -> None:
        super().__init__(network, schedule)
        if not sigma_data > 0:
            raise ValueError(
                f"sigma_data = {sigma_data} must be positive: it is a standard deviation of "
                f"the data."
            )
        self.sigma_data = sigma_data

    def scales(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s**2 + self.sigma_data**2
        return total**-0.5, self.sigma_data**2 / total, s * self.sigma_data * total**-0.5


class Flow(Preconditioned):
    r"""A network that gives the velocity :math:`v = n - x` of the straight path.

    On the straight path :math:`\bar x = (1 - \bar t) \, x + \bar t \, n` the mean is :math:`\bar x
    - \bar t \, v`. At noise ratio s that path is at :math:`\bar t = s / (1 + s)`, :math:`\bar x =
    y / (1 + s)`, so

    .. math:: c_\text{in} = c_\text{skip} = \frac{1}{1 + s}, \quad c_\text{out} = -\frac{s}{1 + s}

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023)
        | https://arxiv.org/abs/2210.02747

    Arguments:
        network: The network F(x, level, u), whose output has the shape of x.
        schedule: The noise schedule.
    """

    def scales(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share = 1 / (1 + s)
        return share, share, -s * share
