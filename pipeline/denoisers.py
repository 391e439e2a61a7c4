r"""Denoisers: the conditional mean D, and the score it is worth.

A denoiser estimates :math:`D(x_t, t, u) = E[x \mid x_t, u]` for :math:`x_t = \alpha_t x + \sigma_t
n`. Among all the ways to write a score it is the one whose scale is the same at every noise level,
and the score follows from it (Tweedie–Miyasawa):

.. math:: \phi(x_t \mid u) = \nabla_{x_t} \log p(x_t \mid u)
    = \frac{\alpha_t D(x_t, t, u) - x_t}{\sigma_t^2}

That identity stands here once in each direction, `Denoiser.score` and `FromScore`, and nowhere
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

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.building import Part
from pipeline.condition import U
from pipeline.errors import UserError
from pipeline.mcmc.targets import GaussianMixture, NoDensity, Scaled, Target
from pipeline.networks import Network
from pipeline.networks.layers import pool, zero
from pipeline.schedules import Scale, Schedule

__all__ = ["EDM", "Clean", "Denoiser", "Energy", "Epsilon", "Extrapolated", "Flow", "FromScore"]
__all__ += ["Preconditioned", "ScoreDenoiser", "V", "check_twice_differentiable"]


class Denoiser(Part, nn.Module, ABC):
    r"""A conditional mean :math:`D(x_t, t, u) = E[x \mid x_t, u]` under a noise schedule.

    Arguments:
        schedule: The noise schedule.

    Attributes:
        jumps: The noise ratios at which D is not continuous, but for a guidance that begins or
            ends: none.
    """

    jumps: tuple[float, ...] = ()

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        r"""The conditional mean D, with the shape of x_t.

        Arguments:
            x_t: A noisy tensor :math:`x_t`, with shape :math:`(B, *)`.
            t: The time, with shape () or (B,).
            u: The condition, or `None`.
        """

    def score(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        r"""The score :math:`\phi(x_t \mid u) = (\alpha_t D - x_t) / \sigma_t^2`, with the shape of
        x_t.
        """
        alpha_t, sigma_t = self.schedule.scales(t, x_t)
        return (alpha_t * self(x_t, t, u) - x_t) / sigma_t**2

    def log_prob(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        r"""The log-density :math:`\log p(x_t \mid u)`, with shape (B,), up to a constant that
        depends on t and u.

        Raises:
            NoDensity: The denoiser has a score only.
        """
        raise NoDensity(
            f"{type(self).__name__} has a score and no density; use pipeline.denoisers.Energy."
        )

    def log_prob_and_score(self, x_t: Tensor, t: Tensor, u: U = None) -> tuple[Tensor, Tensor]:
        """Both, with shapes (B,) and that of x_t; what they share is computed once."""
        return self.log_prob(x_t, t, u), self.score(x_t, t, u)

    def at(self, t: Tensor, u: U = None) -> Target:
        """The noisy conditional law at one time, as a target; it has a density where the denoiser
        has one.
        """
        return _AtTime(self, t, u)


class _AtTime(Target):
    def __init__(self, denoiser: Denoiser, t: Tensor, u: U) -> None:
        self.denoiser, self.t, self.u = denoiser, t, u

    def score(self, x: Tensor) -> Tensor:
        return self.denoiser.score(x, self.t, self.u)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.denoiser.log_prob(x, self.t, self.u)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.denoiser.log_prob_and_score(x, self.t, self.u)


class Extrapolated(Target):
    r"""The law of clean x, extrapolated from its noisy laws at a few noise ratios.

    The score of :math:`y = x_t / \alpha_t = x + s n` is smooth in :math:`s^2` where the law of x
    is. The polynomial in :math:`s^2` through its values at :math:`s_1, …, s_K` is at zero

    .. math:: \phi_0(y) \approx \sum_k w_k \, \phi_{s_k}(y), \quad
        w_k = \prod_{j \neq k} \frac{s_j^2}{s_j^2 - s_k^2}

    with an error of the order of :math:`\prod_k s_k^2`: from two ratios it is :math:`(s_2^2
    \phi_1 - s_1^2 \phi_2) / (s_2^2 - s_1^2)`, and one ratio stands for itself, the noisy law. The
    weights sum to one and alternate in sign, so errors of the scores grow by :math:`\sum_k |w_k|`;
    the nearer the ratios, the more.

    The log-density is the same combination, where the denoiser has one.

    References:
        | Richardson & Gaunt, 1927; https://doi.org/10.1098/rsta.1927.0008

    Arguments:
        denoiser: The denoiser, guided or not.
        ratios: The noise ratios :math:`s_k`, different, each within the schedule's.
        u: The condition, or `None`.

    Raises:
        ValueError: There are no ratios, two are equal, or the schedule does not reach one.
    """

    def __init__(self, denoiser: Denoiser, ratios: Sequence[float], u: U = None) -> None:
        s = torch.tensor(ratios, dtype=torch.float64)
        if not len(s) or len(s.unique()) < len(s):
            raise ValueError(f"ratios = {list(ratios)} must hold at least one, all different.")
        self.denoiser, self.u, self.times = denoiser, u, denoiser.schedule.time(s)
        if not torch.allclose(denoiser.schedule.ratio(self.times), s, rtol=1e-6, atol=0):
            low, high = denoiser.schedule.ratio(torch.tensor([0.0, 1.0]).double()).tolist()
            raise ValueError(
                f"ratios = {list(ratios)} must lie between {low:.3g} and {high:.3g}, the noise "
                f"ratios of the schedule."
            )
        self.weights = [math.prod(b**2 / (b**2 - a**2) for b in ratios if b != a) for a in ratios]

    def _laws(self, y: Tensor) -> Iterator[tuple[float, Target]]:
        """The law of y at each ratio, and its weight."""
        for weight, t in zip(self.weights, self.times, strict=True):
            alpha_t, _ = self.denoiser.schedule.at(t)
            yield weight, Scaled(self.denoiser.at(t, self.u), alpha_t)

    def score(self, x: Tensor) -> Tensor:
        return torch.stack([w * law.score(x) for w, law in self._laws(x)]).sum(dim=0)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density up to a constant, with shape (B,)."""
        return torch.stack([w * law.log_prob(x) for w, law in self._laws(x)]).sum(dim=0)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = x.new_zeros(len(x)), torch.zeros_like(x)
        for w, law in self._laws(x):
            one, slope = law.log_prob_and_score(x)
            log_prob, score = log_prob + w * one, score + w * slope
        return log_prob, score


class FromScore(Denoiser):
    r"""A denoiser whose score comes first.

    .. math:: D(x_t, t, u) = \frac{x_t + \sigma_t^2 \, \phi(x_t \mid u)}{\alpha_t}
    """

    @abstractmethod
    def score(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        """The score, from which D follows."""

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        alpha_t, sigma_t = self.schedule.scales(t, x_t)
        return (x_t + sigma_t**2 * self.score(x_t, t, u)) / alpha_t


class ScoreDenoiser(FromScore):
    r"""The denoiser of a law whose score at every noise level is known.

    Arguments:
        target: The law of clean x.
        schedule: The noise schedule.
    """

    def __init__(self, target: GaussianMixture, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.target = target

    def score(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self.at(t, u).score(x_t)

    def log_prob(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self.at(t, u).log_prob(x_t)

    def at(self, t: Tensor, u: U = None) -> GaussianMixture:
        """The noisy conditional law at one time, in closed form: with a density."""
        return self.target.diffuse(*self.schedule(t), u)


class Preconditioned(Denoiser):
    r"""A denoiser made of a network F between scales that depend on the noise ratio s.

    .. math:: D = c_\text{skip}(s) \, y
        + c_\text{out}(s) \, F\big(c_\text{in}(s) \, y, \log s, u\big),
        \quad y = x_t / \alpha_t, \quad s = \sigma_t / \alpha_t

    The sum is computed in the type of x_t, at least float32, and so are the scales of a time for
    each row; those of one time for all are numbers. The network may run in a lower type.

    Arguments:
        network: The network F(x, level, u), whose output has the shape of x.
        schedule: The noise schedule.
    """

    def __init__(self, network: Network, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.network = network
        self.precision: torch.dtype | None = (
            None  # the type the network is autocast to; set by callbacks.Precision
        )
        self.compiled: Callable | None = None  # stands for it in training; by callbacks.Compile

    @abstractmethod
    def scales(self, s: Scale) -> tuple[Scale, Scale, Scale]:
        r"""The scales :math:`c_\text{in}, c_\text{skip}, c_\text{out}` at noise ratio s: numbers,
        or with the shape of s.
        """

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        alpha_t, sigma_t = self.schedule.scales(t, x_t)
        s = sigma_t / alpha_t
        c_in, c_skip, c_out = self.scales(s)
        if isinstance(c_out, float):  # one operation before the network, two behind it
            f = self.output(x_t * (c_in / alpha_t), s, u)
            return torch.add(x_t * (c_skip / alpha_t), f, alpha=c_out) if c_skip else c_out * f
        y = x_t / alpha_t
        return c_skip * y + c_out * self.output(c_in * y, s, u)

    def output(self, z: Tensor, s: Scale, u: U) -> Tensor:
        r"""The network's output :math:`F(z, \log s, u)`, in the type of z."""
        if isinstance(s, Tensor):
            level = torch.log(s).reshape(-1).expand(len(z))
        else:
            level = z.new_full((len(z),), math.log(s))
        network = self.compiled if self.compiled and self.training else self.network
        if self.precision is None and not torch.is_autocast_enabled(z.device.type):
            return network(z, level, u).to(z.dtype)
        with torch.autocast(z.device.type, self.precision, enabled=self.precision is not None):
            return network(z, level, u).to(z.dtype)

    def weight(self, t: Tensor) -> Tensor:
        r"""The weight :math:`1 / c_\text{out}^2` that puts the error of D in units of the
        network's output.
        """
        return self.scales(self.schedule.ratio(t))[2] ** -2  # type: ignore[return-value]


class EDM(Preconditioned):
    r"""Scales that keep the network's input and target at unit variance at every noise level.

    .. math:: c_\text{in} = \frac{1}{\sqrt{s^2 + \sigma_d^2}}, \quad
        c_\text{skip} = \frac{\sigma_d^2}{s^2 + \sigma_d^2}, \quad
        c_\text{out} = \frac{s \, \sigma_d}{\sqrt{s^2 + \sigma_d^2}}

    With :math:`\sigma_d = 1` this is `V` up to a sign.

    References:
        | Karras et al., 2022, table 1; https://arxiv.org/abs/2206.00364

    Arguments:
        network: The network F(x, level, u), whose output has the shape of x.
        schedule: The noise schedule.
        sigma_data: The standard deviation :math:`\sigma_d` of the data.
    """

    def __init__(self, network: Network, schedule: Schedule, sigma_data: float = 0.5) -> None:
        super().__init__(network, schedule)
        if not 0 < sigma_data < 1e6:
            raise ValueError(
                f"sigma_data = {sigma_data} must be positive and below 1e6: it is a standard "
                "deviation of the data."
            )
        self.sigma_data = sigma_data

    def scales(self, s: Scale) -> tuple[Scale, Scale, Scale]:
        total = s**2 + self.sigma_data**2
        return total**-0.5, self.sigma_data**2 / total, s * self.sigma_data * total**-0.5


class Flow(Preconditioned):
    r"""A network that gives the velocity :math:`v = n - x` of the straight path.

    On the straight path :math:`\bar x = (1 - \bar t) \, x + \bar t \, n` the mean is :math:`\bar x
    - \bar t \, v`. At noise ratio s that path is at :math:`\bar t = s / (1 + s)`, :math:`\bar x =
    y / (1 + s)`, so

    .. math:: c_\text{in} = c_\text{skip} = \frac{1}{1 + s}, \quad c_\text{out} = -\frac{s}{1 + s}

    References:
        | Lipman et al., 2023; https://arxiv.org/abs/2210.02747
    """

    def scales(self, s: Scale) -> tuple[Scale, Scale, Scale]:
        share = 1 / (1 + s)
        return share, share, -s * share


class Epsilon(Preconditioned):
    r"""A network that gives the noise :math:`\epsilon = n`.

    It sees :math:`x_t` as a variance-preserving schedule has it at noise ratio s, and
    :math:`D = y - s \, \epsilon`:

    .. math:: c_\text{in} = \frac{1}{\sqrt{1 + s^2}}, \quad c_\text{skip} = 1, \quad
        c_\text{out} = -s

    Its own weight is the paper's simple loss. At high noise an error of ε counts s times in D.

    References:
        | Ho et al., 2020, equations (11), (14); https://arxiv.org/abs/2006.11239
    """

    def scales(self, s: Scale) -> tuple[Scale, Scale, Scale]:
        return (1 + s**2) ** -0.5, s**0, -s


class V(Preconditioned):
    r"""A network that gives :math:`v = \alpha n - \sigma x`, the velocity on the circle.

    It sees :math:`x_t = \alpha x + \sigma n` as a variance-preserving schedule has it at noise
    ratio s, where :math:`\alpha = 1 / \sqrt{1 + s^2}` and :math:`\sigma = s \alpha`, and
    :math:`D = \alpha x_t - \sigma v`:

    .. math:: c_\text{in} = \frac{1}{\sqrt{1 + s^2}}, \quad c_\text{skip} = \frac{1}{1 + s^2},
        \quad c_\text{out} = -\frac{s}{\sqrt{1 + s^2}}

    That is `EDM` with :math:`\sigma_d = 1` and the other sign.

    References:
        | Salimans & Ho, 2022, section 4 and appendix D; https://arxiv.org/abs/2202.00512
    """

    def scales(self, s: Scale) -> tuple[Scale, Scale, Scale]:
        alpha = (1 + s**2) ** -0.5
        return alpha, alpha**2, -s * alpha


class Clean(EDM):
    r"""EDM's input, and a network that gives clean x itself.

    .. math:: c_\text{in} = \frac{1}{\sqrt{s^2 + \sigma_d^2}}, \quad c_\text{skip} = 0, \quad
        c_\text{out} = 1

    Of noise the network must pass on nothing: clean pictures lie on few dimensions and noise on
    all, so a narrow network gives flat ground where one that is asked for noise leaves some of
    it. At low noise nothing of y is passed beside the network either: fine texture costs it
    width. Train it with the weight of the velocity (`objectives.Velocity`).

    References:
        | Li & He, 2025; https://arxiv.org/abs/2511.13720

    Arguments:
        network: The network F(x, level, u), whose output has the shape of x.
        schedule: The noise schedule.
        sigma_data: The standard deviation :math:`\sigma_d` of the data.
    """

    def scales(self, s: Scale) -> tuple[Scale, Scale, Scale]:
        return super().scales(s)[0], 0 * s, s**0


class Energy(FromScore, EDM):
    r"""A denoiser that is the gradient of a density: an energy head.

    The network's output f, which has the shape of x, becomes one number. At
    :math:`z = c_\text{in} \, y`, whose variance is 1,

    .. math:: \log p(x_t \mid u) = -\tfrac{1}{2} \| z \|^2
        + \frac{\sigma_d}{s} \big\langle z, f(z, \log s, u) \big\rangle - \log Z(s, u), \quad
        \phi = \nabla_{x_t} \log p

    by autograd. With :math:`h = \langle z, f \rangle` that score makes :math:`D = c_\text{skip} \,
    y + c_\text{out} \nabla_z h`: EDM with a gradient for its network, so what keeps input and
    target at unit variance there does so here, and with f = 0 the law is the normal one of
    variance :math:`\sigma_d^2` with the noise added.

    Without `normalised` Z is left out. With it, log Z is the normal law's own constant plus a
    learned function of s and the averaged tokens of u, so that densities can be compared between
    conditions. Only NCE learns it: leave it out elsewhere, for DDP refuses weights without use.

    Attention is computed by the kernel that has second derivatives. Keep the network in float32
    where the density is used: it is multiplied by :math:`\sigma_d / s`.

    References:
        | Salimans & Ho, 2021; https://openreview.net/forum?id=9AS-TF2jRNb
        | Du et al., 2023; https://arxiv.org/abs/2302.11552

    Arguments:
        network: The network f(x, level, u), whose output has the shape of x.
        schedule: The noise schedule.
        sigma_data: The standard deviation :math:`\sigma_d` of the data.
        normalised: Whether log Z is learned.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        sigma_data: float = 0.5,
        normalised: bool = False,
    ) -> None:
        super().__init__(network, schedule, sigma_data)
        self.normaliser = None
        if normalised:
            last = nn.Linear(64, 1)
            zero(last)
            width = 1 + network.u_dim
            self.normaliser = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), last)

    def log_prob(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        alpha_t, sigma_t = self.schedule.scales(t, x_t)
        s = sigma_t / alpha_t
        c = self.scales(s)[0] / alpha_t
        z = c * x_t
        with sdpa_kernel(SDPBackend.MATH):
            f = self.output(z, s, u)
        log_p = (z * (self.sigma_data / s * f - z / 2)).flatten(1).sum(dim=1)
        if self.normaliser is None:
            return log_p
        log_s, log_c = (
            torch.as_tensor(v, dtype=x_t.dtype, device=x_t.device).log() for v in (s, c)
        )
        tokens = [] if u is None or u.tokens is None else [pool(u.tokens)]
        parts = torch.cat([log_s.reshape(-1, 1).expand(len(x_t), 1), *tokens], dim=1)
        log_norm = x_t[0].numel() * (log_c.reshape(-1) - math.log(2 * math.pi) / 2)
        return log_p + log_norm - self.normaliser(parts)[:, 0]

    def score(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self.log_prob_and_score(x_t, t, u)[1]

    def log_prob_and_score(self, x_t: Tensor, t: Tensor, u: U = None) -> tuple[Tensor, Tensor]:
        """Both, by one pass forward and one back; where gradients are recorded, in training, they
        can be differentiated again.

        Raises:
            UserError: Gradients are recorded and the network is sharded.
        """
        record = torch.is_grad_enabled()
        if record:
            check_twice_differentiable(self.network)
        with torch.inference_mode(False), torch.enable_grad():
            # what was made in inference mode cannot be differentiated, its copy can
            x_t, t, u = x_t.clone().requires_grad_(), t.clone(), None if u is None else u.clone()
            log_p = self.log_prob(x_t, t, u)
            (score,) = torch.autograd.grad(log_p.sum(), x_t, create_graph=record)
        return (log_p if record else log_p.detach()), score


def check_twice_differentiable(network: nn.Module) -> None:
    """Raise `UserError` if a network is sharded by FSDP2, which frees its weights after the first
    of two backward passes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in network.modules()):
        raise UserError(
            "An energy or a score matched by its derivative is trained through a second backward "
            "pass, which a network sharded by FSDP2 does not survive: train with strategy ddp, or "
            "with pipeline.denoisers.EDM and DSM."
        )
