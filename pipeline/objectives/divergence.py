"""Contrastive divergence at t = 0: a density is lowered where its own chains go."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.condition import Condition, U
from pipeline.denoisers import Preconditioned
from pipeline.distributed import gather
from pipeline.mcmc.kernels import Kernel
from pipeline.mcmc.targets import Scaled
from pipeline.noise import Noise
from pipeline.objectives.base import Objective, clean
from pipeline.schedules import expand_as_batch

__all__ = ["ContrastiveDivergence"]


class ContrastiveDivergence(Objective):
    r"""Contrastive divergence, and persistent contrastive divergence.

    .. math:: \log p(x^- \mid u^-) - \log p(x \mid u)

    :math:`x^-` is where a chain on the model's own law is after k updates; no gradient goes
    through it. The chains begin at the data (restart = 1: CD-k) or go on from where the last batch
    left them, each with the condition it began with (restart = 0: persistent CD), or a share
    begins anew. There is one for each row of the global batch, and they are in the checkpoint.

    The value says nothing of how good the density is. Chains that began at the data have not left
    their modes, so of the weights of far modes, and of where there are no data, little is learned.

    References:
        | Hinton, 2002; https://doi.org/10.1162/089976602760128018
        | Tieleman, 2008; https://doi.org/10.1145/1390156.1390290

    Arguments:
        kernel: How the chains move, its numbers in the units of x; not NUTS.
        updates: The number k of updates in a training step, at least 1.
        restart: The share of the chains that begins anew at the data, in [0, 1].
    """

    def __init__(self, kernel: Kernel, updates: int = 1, restart: float = 1.0) -> None:
        if updates < 1 or not 0 <= restart <= 1:
            raise ValueError(
                f"updates = {updates} must be at least 1 and restart = {restart} lie in [0, 1]."
            )
        self.kernel, self.updates, self.restart = kernel, updates, restart
        self.held: dict[str, Tensor] = {}  # where this device's chains are, x, and the parts of u

    def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
        goes_on = self.restart < 1 and torch.is_grad_enabled()  # and not in validation
        y, u_y = self._start(x, u, noise) if goes_on else (x, u)
        x_0, t = clean(denoiser, x)
        alpha = expand_as_batch(denoiser.schedule(t)[0], x)
        with torch.no_grad():
            law = Scaled(denoiser.at(t, u_y), alpha)
            chain = self.kernel.init(law, y)
            for _ in range(self.updates):
                chain, _ = self.kernel.step(law, chain, noise)
        if goes_on:
            parts = {"x": chain.x} | ({} if u_y is None else vars(u_y))
            self.held = {name: part for name, part in parts.items() if part is not None}
        both = None if u is None or u_y is None else Condition.stack([u, u_y])
        data, drawn = denoiser.log_prob(torch.cat((x_0, alpha * chain.x)), t, both).chunk(2)
        return drawn - data

    def _start(self, x: Tensor, u: U, noise: Noise) -> tuple[Tensor, U]:
        """Where the chains of these rows begin."""
        n, (start, total) = len(x), noise.rows or (0, len(x))
        anew = noise.uniform(n).to(x.device) < self.restart
        held = {name: part.to(x.device) for name, part in self.held.items()}
        if held and len(held["x"]) == total > n:  # from a checkpoint, those of all devices
            held = {name: part[start : start + n] for name, part in held.items()}
        if not held or len(held["x"]) != n:
            return x, u
        y, u_y = held.pop("x"), Condition(**held)
        return torch.where(expand_as_batch(anew, x), x, y), u and u_y.replaced(u, anew)

    def state(self) -> dict[str, Any]:
        held = dict(self.held)
        if "tokens" in held:  # of one length in all processes
            length = gather(torch.tensor(held["tokens"].shape[1:2], device=held["x"].device)).max()
            held["tokens"] = pad(held["tokens"], (0, 0, 0, int(length) - held["tokens"].shape[1]))
        return {name: gather(part).cpu() for name, part in held.items()}

    def load(self, state: dict[str, Any]) -> None:
        self.held = state
