"""An optimizer of two kinds: torch's own have one rule for all weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

__all__ = ["MuonAdamW"]

LEAST = 64  # the sides of a matrix from which on Muon takes it


class MuonAdamW(torch.optim.Optimizer):
    r"""Muon for the matrices of hidden layers, AdamW for all other weights.

    .. math:: W \leftarrow W - \eta \, \Big( 0.2 \sqrt{\max(a, b)} \; U V^\top + \lambda W \Big),
        \quad M = U S V^\top

    for a matrix W (a, b), M its gradient averaged, with Nesterov's look ahead: a move by the
    nearest orthogonal matrix, scaled so that its root mean square is that of AdamW's. One learning
    rate serves both. A matrix is of a hidden layer where each of its sides is at least 64; small
    patches, single numbers and the weights of convolutions are left to AdamW.

    Orthogonal is to be had by five rounds of matrix products in bfloat16, dear on a processor
    without it.

    References:
        | Muon: An Optimizer for Hidden Layers in Neural Networks (Jordan et al., 2024)
        | https://kellerjordan.github.io/posts/muon
        | Muon is Scalable for LLM Training (Liu et al., 2025): the scale
        | https://arxiv.org/abs/2502.16982
        | Decoupled Weight Decay Regularization (Loshchilov & Hutter, 2019)
        | https://arxiv.org/abs/1711.05101

    Arguments:
        params: The weights.
        lr: The learning rate.
        betas: The two rates of AdamW's averages.
        weight_decay: The decay of both, decoupled.
        momentum: The rate of Muon's average.

    Raises:
        UserError: No weight is a matrix of a hidden layer.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        matrices, rest = [], []
        for p in params:
            hidden = p.ndim == 2 and min(p.shape) >= LEAST
            (matrices if hidden else rest).append(p)
        if not matrices:
            raise UserError(
                f"MuonAdamW found no matrix whose sides are both at least {LEAST}: use "
                "torch.optim.AdamW for this network."
            )
        b1, b2 = betas  # a YAML has a list
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        ]
        if rest:
            adamw = torch.optim.AdamW(rest, lr, (b1, b2), weight_decay=weight_decay, fused=True)
            self.parts.append(adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            # a loaded state has groups of its own
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss
