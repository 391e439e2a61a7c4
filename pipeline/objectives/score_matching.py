r"""Score matching without noise: the score of clean data, through its derivative.

Integration by parts makes :math:`\tfrac{1}{2} E \| \phi - \nabla \log p \|^2`, in which p is not
known, into

.. math:: J = E \Big[ \tfrac{1}{2} \| \phi(x) \|^2 + \operatorname{tr} \nabla \phi(x) \Big] +
    \text{const}

The data are taken as they are, :math:`x_0 = \alpha_0 x` at t = 0 with no noise added, since that
needs none is the point of the method: what is learned is the score of the law of
:math:`\alpha_0 x`, where denoising score matching learns that of noisy data. All other times are
not trained. The schedule's noise ratio at t = 0 then sets nothing but the network's scales: let it
be near the finest detail of the law.

References:
    | Hyvärinen, 2005; https://jmlr.org/papers/v6/hyvarinen05a.html
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.condition import U
from pipeline.denoisers import Preconditioned, check_twice_differentiable
from pipeline.noise import Noise
from pipeline.objectives.base import Objective, clean

__all__ = ["ScoreMatching", "SlicedScoreMatching"]


class ScoreMatching(Objective):
    r"""Score matching with the exact trace, for data of few dimensions d.

    .. math:: \tfrac{1}{2} \| \phi(x_0, 0, u) \|^2
        + \sum_{i=1}^{d} \frac{\partial \phi_i}{\partial x_i}, \quad x_0 = \alpha_0 x

    The trace costs d backward passes.

    References:
        | Hyvärinen, 2005, theorem 1; https://jmlr.org/papers/v6/hyvarinen05a.html
    """

    def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
        check_twice_differentiable(denoiser.network)
        record = torch.is_grad_enabled()
        # the kernel of attention that has second derivatives
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x_0, t = clean(denoiser, x.clone())  # a copy: nothing made in inference mode
            phi = denoiser.score(x_0.requires_grad_(), t, None if u is None else u.clone())
            trace = self.trace(phi, x_0, noise, record)
        return phi.square().flatten(1).sum(dim=1) / 2 + trace

    def trace(self, phi: Tensor, x_0: Tensor, noise: Noise, record: bool) -> Tensor:
        r"""The trace of :math:`\nabla \phi` at x_0, or an unbiased estimate, with shape (B,): phi
        was recorded as a function of x_0, and `record` is whether the trace is to be in turn.
        """
        trace = x_0.new_zeros(len(x_0))
        for i, phi_i in enumerate(phi.flatten(1).unbind(dim=1)):
            # ∂φ_i / ∂x, with the shape of x
            (row,) = torch.autograd.grad(phi_i.sum(), x_0, create_graph=record, retain_graph=True)
            trace = trace + row.flatten(1)[:, i]
        return trace


class SlicedScoreMatching(ScoreMatching):
    r"""Score matching along one random direction v, at the cost of one more backward pass.

    .. math:: \tfrac{1}{2} \| \phi(x_0, 0, u) \|^2 + v^\top \nabla \phi \, v, \quad
        v_i = \pm 1 \text{ with equal odds}

    The signs have :math:`E \, v v^\top = I`, so its mean is that of `ScoreMatching`; of all such v
    with independent entries they give the quadratic form the least variance, none where
    :math:`\nabla \phi` is diagonal.
    The first term stands for :math:`(v^\top \phi)^2 / 2`: the variance-reduced form.

    References:
        | Song et al., 2019; https://arxiv.org/abs/1905.07088
    """

    def trace(self, phi: Tensor, x_0: Tensor, noise: Noise, record: bool) -> Tensor:
        v = noise.normal(phi).sign()
        (slope,) = torch.autograd.grad((v * phi).sum(), x_0, create_graph=record)
        return (v * slope).flatten(1).sum(dim=1)
