r"""Targets: laws that can be evaluated, up to a constant.

What a sampler needs of a law is its score :math:`\nabla_x \log p(x)` and, to correct its own
errors, the density up to a constant. `Density` makes both of any function with a gradient. The
`Law` members are known in full and can be drawn from: they are the truth against which everything
that learns or samples is tested. Among them the Gaussian mixture keeps its closed form when noise
is added, and its components can be classes.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from pipeline.building import Part
from pipeline.condition import U
from pipeline.errors import UserError
from pipeline.noise import Noise

__all__ = ["Banana", "Density", "Funnel", "Gaussian", "GaussianMixture", "Laplace", "Law"]
__all__ += ["NoDensity", "Scaled", "StudentT", "Target", "said", "unbounded"]


def said(x: Tensor) -> str:
    """A point in a sentence."""
    values = ", ".join(f"{value:.4g}" for value in x.flatten()[:8].tolist())
    return f"[{values}, …]" if x.numel() > 8 else f"[{values}]"


class NoDensity(UserError):
    """A density was asked of a target that has a score only."""


class Target(Part, ABC):
    """A law with a score and, where it has one, a log-density up to a constant.

    Attributes:
        bounds: The map from all of space onto the support of x; `None` where that is all of it.
    """

    bounds: Any = None  # a Transform of torch, whose annotations are none

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        r"""The score :math:`\nabla_x \log p(x)`, with the shape of x, :math:`(B, *)`."""

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density up to a constant, with shape (B,).

        Raises:
            NoDensity: The target has a score only.
        """
        raise NoDensity(f"{type(self).__name__} has a score and no density.")

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, with shapes (B,) and :math:`(B, *)`; what they share is computed once."""
        return self.log_prob(x), self.score(x)


class Density(Target):
    r"""The law of a log-density that torch can differentiate: a function, or the `log_prob` of an
    object of `torch.distributions`.

    Kernels walk in all of space. A law of `torch.distributions` that is bounded, such as Gamma,
    Beta, Uniform or Dirichlet, is known by its `log_prob`: `run` walks in the unbounded
    coordinates that torch has for its support (see `unbounded`) and gives x in the support. Of a
    function the support is not known: let it be all of space, or add
    :math:`\log |\det \partial T / \partial z|` of a map x = T(z) yourself.

    Arguments:
        function: A function of x, with shape :math:`(B, *)`, that gives :math:`\log p(x)` up to a
            constant with shape (B,); more dimensions, such as those of independent coordinates,
            are summed. Row i of its value must depend on row i of x alone.

    Raises:
        UserError: The support is one that torch does not map; later, the function fails, or gives
            anything but a number for each row that depends on x.
    """

    def __init__(self, function: Callable[[Tensor], Tensor] | Distribution) -> None:
        if isinstance(function, Distribution):
            function = function.log_prob
        self.function, self.dim = function, None
        law = getattr(function, "__self__", None)
        if isinstance(law, Distribution) and function == law.log_prob:
            self.function = _trusting(law).log_prob
            self.bounds, shape = _bounds(law), law.batch_shape + law.event_shape
            self.dim = shape[0] if len(shape) == 1 else None

    @property
    def name(self) -> str:
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"{named.__module__}.{named.__qualname__}"

    def log_prob(self, x: Tensor) -> Tensor:
        try:
            value = self.function(x)
        except (UserError, NoDensity):
            raise
        except Exception as error:  # whatever a function of the user's does
            raise self._failed(x, error) from error
        is_real = isinstance(value, Tensor) and value.is_floating_point()
        if not is_real or value.shape[:1] != x.shape[:1]:
            raise self._wrong(x, value)
        return value.reshape(len(x), -1).sum(dim=1)

    def score(self, x: Tensor) -> Tensor:
        return self.log_prob_and_score(x)[1]

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().detach().requires_grad_()
            log_prob, score = self.log_prob(x), None
            try:
                if log_prob.requires_grad:
                    (score,) = torch.autograd.grad(log_prob.sum(), x, allow_unused=True)
            except RuntimeError as error:
                raise self._failed(x, error) from error
        if score is None:
            raise self._wrong(x, log_prob)
        return log_prob.detach(), score

    def _wrong(self, x: Tensor, value: object) -> UserError:
        came = f"{type(value).__name__} {value!r:.60}"
        if isinstance(value, Tensor):
            is_fixed = x.requires_grad and not value.requires_grad
            fixed = " that does not depend on x" if is_fixed else ""
            came = f"a tensor of {value.dtype} with shape {tuple(value.shape)}{fixed}"
        return UserError(
            f"The density {self.name} gave {came} for x with shape {tuple(x.shape)}; expected log "
            f"p of each row of x: real numbers with shape ({len(x)},), made of x by torch alone."
        )

    def _failed(self, x: Tensor, error: Exception) -> UserError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return UserError(
            f"The density {self.name} failed at x with shape {tuple(x.shape)}{self._first(x)} "
            f"({reason:.300}); it must take any real x, or be the log_prob of an object of "
            "torch.distributions, whose bounds are known."
        )

    def _first(self, x: Tensor) -> str:
        """The first chain at whose point it fails by itself, in words."""
        for i, row in enumerate(x.detach().split(1)):
            try:
                self.function(row)
            except Exception:
                return f", in chain {i} at {said(row)}"
        return ""


def _trusting(law: Distribution) -> Distribution:
    """A law that takes any x: where a long step leaves the numbers, its density is none, and the
    step is refused.
    """
    law = copy.copy(law)
    law._validate_args = False
    for name, part in vars(law).items():
        if isinstance(part, Distribution):
            setattr(law, name, _trusting(part))
    return law


def _bounds(law: Distribution) -> Any:
    """The map from all of space onto the support of a law."""
    support: Any = law.support
    base = support
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    if base is constraints.real:
        return None
    try:
        return biject_to(support)
    except NotImplementedError:
        raise UserError(
            f"{type(law).__name__} has the support {support}, onto which torch maps no real "
            "numbers; give a function of unbounded coordinates instead."
        ) from None


def unbounded(target: Target) -> Target:
    r"""The law of z, where x = T(z) and T are the target's `bounds`.

    .. math:: \log p_z(z) = \log p(T(z)) + \log \Big| \det \frac{\partial T}{\partial z} \Big|
    """
    bounds = target.bounds
    if bounds is None:
        return target

    def log_prob(z: Tensor) -> Tensor:
        x = bounds(z)
        stretch = bounds.log_abs_det_jacobian(z, x).reshape(len(z), -1)
        return target.log_prob(x) + stretch.sum(dim=1)

    return Density(log_prob)


class Scaled(Target):
    r"""The law of :math:`z = x / c`, a change of units of each coordinate.

    .. math:: \log p_z(z) = \log p(c z) + \text{const}, \quad \nabla_z \log p_z(z) = c \, \phi(c z)

    A kernel on z is the kernel on x with the diagonal mass matrix :math:`c^{-2}`.

    References:
        | Neal, 2011, section 4.1; https://arxiv.org/abs/1206.1901

    Arguments:
        target: The law of x.
        scale: The units c, positive, with the shape of one x, or a number.
    """

    def __init__(self, target: Target, scale: Tensor | float) -> None:
        self.target, self.scale = target, scale

    def score(self, x: Tensor) -> Tensor:
        return self.scale * self.target.score(self.scale * x)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(self.scale * x)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, score = self.target.log_prob_and_score(self.scale * x)
        return log_prob, self.scale * score


class Law(Target):
    """A target known in full: its density is there, and exact independent draws.

    Attributes:
        dim: The number D of coordinates of x, (B, D).
    """

    dim: int

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density, with shape (B,)."""

    @abstractmethod
    def draw(self, noise: Noise, n: int) -> Tensor:
        """n independent points, with shape (n, D)."""


def _floats(values: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    values = torch.as_tensor(values)
    return values if values.is_floating_point() else values.to(torch.get_default_dtype())


class Gaussian(Law):
    r"""A Gaussian with any covariance.

    .. math:: \log p(x) = - \tfrac{1}{2} (x - m)^T C^{-1} (x - m) - \tfrac{1}{2} \log |2 \pi C|

    Arguments:
        mean: The mean m, with shape (D,).
        covariance: The covariance C, with shape (D, D), or the variances, with shape (D,).
    """

    def __init__(
        self,
        mean: Tensor | Sequence[float],
        covariance: Tensor | Sequence[float] | Sequence[Sequence[float]],
    ) -> None:
        self.mean = _floats(mean)
        self.covariance = _floats(covariance).to(self.mean)
        self.dim = d = len(self.mean)
        if self.covariance.shape not in ((d,), (d, d)):
            raise ValueError(
                f"covariance has shape {tuple(self.covariance.shape)}; with {d} means it must be "
                f"({d}, {d}), or ({d},) for variances."
            )
        full = self.covariance.diag() if self.covariance.ndim == 1 else self.covariance
        factor, failed = torch.linalg.cholesky_ex(full)
        if failed or (full != full.mT).any():
            raise ValueError(
                f"covariance {self.covariance.tolist()} must be symmetric and positive definite."
            )
        inverse = torch.cholesky_inverse(factor)
        self.factor = factor
        self.precision = inverse.diagonal().clone() if self.covariance.ndim == 1 else inverse
        self.log_norm = -factor.diagonal().log().sum() - d / 2 * math.log(2 * math.pi)

    def _offset_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset, precision = self.mean.to(x) - x, self.precision.to(x)
        return offset, offset * precision if precision.ndim == 1 else offset @ precision

    def score(self, x: Tensor) -> Tensor:
        return self._offset_and_score(x)[1]

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_score(x)[0]

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset, score = self._offset_and_score(x)
        square = torch.linalg.vecdot(offset, score)
        return torch.sub(self.log_norm.to(x), square, alpha=0.5), score

    def draw(self, noise: Noise, n: int) -> Tensor:
        return self.mean + noise.normal(self.mean.expand(n, -1)) @ self.factor.mT


class Laplace(Law):
    r"""Independent coordinates of the lecture's Laplace law, of unit variance.

    .. math:: p(x) = \prod_i \tfrac{1}{\sqrt{2}} \exp(- \sqrt{2} |x_i|),
        \quad \phi_i(x) = - \sqrt{2} \, \text{sign}(x_i)

    Arguments:
        dim: The number D of coordinates.
    """

    def __init__(self, dim: int = 1) -> None:
        if dim < 1:
            raise ValueError(f"dim is {dim}; it must be at least 1.")
        self.dim = dim

    def log_prob(self, x: Tensor) -> Tensor:
        return -math.sqrt(2) * x.abs().sum(dim=-1) - self.dim / 2 * math.log(2)

    def score(self, x: Tensor) -> Tensor:
        return -math.sqrt(2) * x.sign()

    def draw(self, noise: Noise, n: int) -> Tensor:
        # (a² + b²) / 2 is exponential, and the difference of two exponentials is Laplace
        a, b, c, d = noise.normal(torch.empty(n, 4, self.dim)).unbind(dim=1)
        return (a**2 + b**2 - c**2 - d**2) / math.sqrt(8)


class Banana(Law):
    r"""A Gaussian bent along a parabola.

    .. math:: x_1 \sim N(0, s^2), \quad x_2 \mid x_1 \sim N\big(b (x_1^2 - s^2), 1\big)

    Its mean is 0 and its variances are :math:`s^2` and :math:`1 + 2 b^2 s^4`.

    References:
        | Haario, Saksman & Tamminen, 1999, section 4; https://doi.org/10.1007/s001800050022

    Arguments:
        curvature: The curvature b.
        std: The standard deviation s of the first coordinate, positive.
    """

    dim = 2

    def __init__(self, curvature: float = 0.03, std: float = 10.0) -> None:
        if not std > 0:
            raise ValueError(f"std is {std}; it must be positive.")
        self.curvature, self.std = curvature, std

    def _straight(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two independent Gaussian coordinates of which x is the bent image."""
        return x[:, 0], x[:, 1] - self.curvature * (x[:, 0] ** 2 - self.std**2)

    def log_prob(self, x: Tensor) -> Tensor:
        a, b = self._straight(x)
        return -0.5 * ((a / self.std) ** 2 + b**2) - math.log(2 * math.pi * self.std)

    def score(self, x: Tensor) -> Tensor:
        a, b = self._straight(x)
        return torch.stack((2 * self.curvature * a * b - a / self.std**2, -b), dim=-1)

    def draw(self, noise: Noise, n: int) -> Tensor:
        a, b = noise.normal(torch.empty(n, 2)).unbind(dim=1)
        a = self.std * a
        return torch.stack((a, b + self.curvature * (a**2 - self.std**2)), dim=-1)


class Funnel(Law):
    r"""Neal's funnel: the scale of the other coordinates is the exponential of the first.

    .. math:: x_1 \sim N(0, s^2), \quad x_i \mid x_1 \sim N(0, e^{x_1}), \quad i = 2, …, D

    No fixed step suits both its mouth and its neck.

    References:
        | Slice Sampling (Neal, 2003), section 8; https://doi.org/10.1214/aos/1056562461

    Arguments:
        dim: The number D of coordinates, at least 2.
        std: The standard deviation s of the first coordinate, positive.
    """

    def __init__(self, dim: int = 10, std: float = 3.0) -> None:
        if dim < 2 or not std > 0:
            raise ValueError(f"dim = {dim} must be at least 2 and std = {std} positive.")
        self.dim, self.std = dim, std

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_score(x)[0]

    def score(self, x: Tensor) -> Tensor:
        return self.log_prob_and_score(x)[1]

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, rest, others = x[:, :1], x[:, 1:], self.dim - 1
        pull = -rest * torch.exp(-v)
        square = -(rest * pull).sum(dim=-1, keepdim=True)  # |rest|² / eᵛ
        score = torch.cat((0.5 * (square - others) - v / self.std**2, pull), dim=-1)
        log_norm = -math.log(self.std) - self.dim / 2 * math.log(2 * math.pi)
        log_prob = -0.5 * ((v / self.std) ** 2 + others * v + square)[:, 0] + log_norm
        return log_prob, score

    def draw(self, noise: Noise, n: int) -> Tensor:
        x = noise.normal(torch.empty(n, self.dim))
        v = self.std * x[:, :1]
        return torch.cat((v, torch.exp(v / 2) * x[:, 1:]), dim=-1)


class StudentT(Law):
    r"""A multivariate Student t, whose tails are a power of the distance.

    .. math:: p(x) = \frac{\Gamma((\nu + D) / 2)}{\Gamma(\nu / 2) \, (\nu \pi)^{D / 2}}
        \Big( 1 + \frac{|x|^2}{\nu} \Big)^{- (\nu + D) / 2},
        \quad \phi(x) = - \frac{(\nu + D) \, x}{\nu + |x|^2}

    Arguments:
        dim: The number D of coordinates.
        freedom: The degrees of freedom ν, a whole number of at least 1. The variance is
            :math:`\nu / (\nu - 2)` and is finite above 2.
    """

    def __init__(self, dim: int = 1, freedom: int = 5) -> None:
        if dim < 1 or freedom < 1:
            raise ValueError(f"dim = {dim} and freedom = {freedom} must be at least 1.")
        self.dim, self.freedom = dim, freedom

    def log_prob(self, x: Tensor) -> Tensor:
        nu, d = self.freedom, self.dim
        log_norm = math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - d / 2 * math.log(nu * math.pi)
        return log_norm - (nu + d) / 2 * torch.log1p(x.square().sum(dim=-1) / nu)

    def score(self, x: Tensor) -> Tensor:
        square = x.square().sum(dim=-1, keepdim=True)
        return -(self.freedom + self.dim) * x / (self.freedom + square)

    def draw(self, noise: Noise, n: int) -> Tensor:
        x = noise.normal(torch.empty(n, self.dim + self.freedom))
        chi_square = x[:, self.dim :].square().sum(dim=-1, keepdim=True)
        return x[:, : self.dim] * torch.sqrt(self.freedom / chi_square)


class GaussianMixture(Law):
    r"""A mixture of spherical Gaussians, whose components may be classes.

    .. math:: p(x) = \sum_k w_k \, N(x; m_k, s_k^2 I), \qquad p(x \mid u = k) = N(x; m_k, s_k^2 I)

    Noise keeps it a mixture: :math:`x_t = \alpha_t x + \sigma_t n` has means :math:`\alpha_t m_k`
    and variances
    :math:`\alpha_t^2 s_k^2 + \sigma_t^2`.

    Arguments:
        means: The means :math:`m_k`, with shape (K, D), or (B, K, D) to give each example a
            mixture of its own.
        stds: The standard deviations :math:`s_k`, with shape (K,) or (B, K).
        weights: The weights :math:`w_k`, with shape (K,) or (B, K), summing to one; equal by
            default.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds: Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        self.means = _floats(means)
        self.dim = self.means.shape[-1]
        kind = {"dtype": self.means.dtype, "device": self.means.device}
        self.stds = torch.as_tensor(stds, **kind)
        if weights is None:
            weights = torch.full_like(self.stds, 1 / self.stds.shape[-1])
        self.weights = torch.as_tensor(weights, **kind)
        if self.means.shape[:-1] != self.stds.shape or (self.stds <= 0).any():
            raise ValueError(
                f"means {tuple(self.means.shape)} need one positive standard deviation each, "
                f"and stds is {self.stds.tolist()}."
            )

    def _log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k N(x; m_k, s_k² I), (B, K), and m_k - x, (B, K, D)."""
        offset = self.means.to(x) - x[:, None, :]
        variance = self.stds.to(x) ** 2
        log_norm = self.weights.to(x).log() - x.shape[-1] / 2 * torch.log(2 * torch.pi * variance)
        return log_norm - offset.square().sum(dim=-1) / (2 * variance), offset

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density, normalised, with shape (B,)."""
        return torch.logsumexp(self._log_joint(x)[0], dim=-1)

    def score(self, x: Tensor) -> Tensor:
        log_joint, offset = self._log_joint(x)
        share = torch.softmax(log_joint, dim=-1) / self.stds.to(x) ** 2  # (B, K)
        return torch.einsum("bk,bkd->bd", share, offset)

    def diffuse(self, alpha_t: Tensor, sigma_t: Tensor, u: U = None) -> "GaussianMixture":
        r"""The law of :math:`x_t` given u.

        Arguments:
            alpha_t: The signal scale, with shape () or (B,).
            sigma_t: The noise scale, with shape () or (B,).
            u: The class of each example as one one-hot token (B, 1, K). A row of zeros, the null
                condition, means the whole mixture, as does `None`.
        """
        alpha, sigma = alpha_t.reshape(-1, 1), sigma_t.reshape(-1, 1)  # (B or 1, 1)
        means = alpha[..., None] * self.means.to(alpha)
        stds = torch.sqrt((alpha * self.stds.to(alpha)) ** 2 + sigma**2)
        weights = self.weights.to(alpha).expand(stds.shape)
        if u is not None and u.tokens is not None:
            classes = u.tokens[:, 0]
            null = (classes == 0).all(dim=-1, keepdim=True)
            weights = torch.where(null, weights, classes.to(weights))
            means, stds = means.expand(len(u), -1, -1), stds.expand(len(u), -1)
        return GaussianMixture(means, stds, weights)

    def sample(self, noise: Noise, n: int) -> tuple[Tensor, Tensor]:
        """n points, with shape (n, D), and the component of each, with shape (n,)."""
        edges = self.weights.cumsum(dim=-1)[:-1].contiguous()
        k = torch.bucketize(noise.uniform(n).to(edges), edges, right=True)
        means = self.means[k]
        return means + self.stds[k, None] * noise.normal(means), k

    def draw(self, noise: Noise, n: int) -> Tensor:
        return self.sample(noise, n)[0]
