"""An optimizer of two rules: torch's own have one, and its Muon takes no convolutions."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed import assembled, local, parted
from pipeline.errors import UserError

__all__ = ["MuonAdamW", "orthogonal"]

LEAST = 32  # the channels on both sides from which on Muon takes a weight
ROUNDS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic: steep at 0, between 0.6 and 1.3 near 1
OLD = "allow_tf32", False  # how torch before 2.9 is told to leave TF32 out


def orthogonal(m: Tensor) -> Tensor:
    r"""Nearly :math:`U V^\top` of each matrix :math:`M = U S V^\top` of a stack (…, a, b): its
    singular values become about 1, from 0.5 to 1.5.

    Five rounds of :math:`X \leftarrow P X`, :math:`P = a I + b G + c G^2`, :math:`G = X X^\top`
    (Jordan et al., 2024). All P are polynomials of the first G, so that a round is
    :math:`Q \leftarrow P Q`, :math:`G \leftarrow P G P`, of the short side alone, and X is met at
    the beginning and at the end. In float32: noise in G of bfloat16's or TF32's size grows
    twelvefold a round where G is 0, past all bounds.
    """
    x = m.float()
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    with torch.autocast(x.device.type, enabled=False), exact_products():
        gram = x @ x.mT
        p = q = polynomial(gram)
        for _ in range(ROUNDS - 1):
            gram = p @ gram @ p
            p = polynomial(gram)
            q = p @ q
        x = q @ x
    return x.mT if m.shape[-2] > m.shape[-1] else x


def polynomial(gram: Tensor) -> Tensor:
    r""":math:`a I + b G + c G^2`."""
    p = B * gram + C * gram @ gram
    p.diagonal(dim1=-2, dim2=-1).add_(A)
    return p


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 without TF32, whatever was set for the networks."""
    matmul: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else OLD
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class MuonAdamW(torch.optim.Optimizer):
    r"""Muon for the matrices and convolutions of hidden layers, AdamW for all other weights.

    .. math:: W \leftarrow W - \eta \, \Big( 0.2 \sqrt{\max(a, b)} \; U V^\top + \lambda W \Big),
        \quad M = U S V^\top

    for a matrix W (a, b), M its gradient averaged, with Nesterov's look ahead: a move by the
    nearest orthogonal matrix, scaled so that its root mean square is that of AdamW's. One learning
    rate serves both. A convolution (a, c, h, w) is the matrix (a, c·h·w). A weight is of a hidden
    layer where it has at least 32 channels on both sides, as the layers from pixels and to pixels
    have not, but for patches of 4; all others are left to AdamW.

    Weights in parts are put together for their move, one shape at a time, in every process.

    As with torch's fused optimizers, gradients are divided by the tensor `grad_scale`, and nothing
    moves where the tensor `found_inf` is 1, on the device and without a word to the host.

    References:
        | Jordan et al., 2024; https://kellerjordan.github.io/posts/muon
        | Liu et al., 2025: the scale; https://arxiv.org/abs/2502.16982
        | Loshchilov & Hutter, 2019; https://arxiv.org/abs/1711.05101

    Arguments:
        params: The weights.
        lr: The learning rate.
        betas: The two rates of AdamW's averages.
        weight_decay: The decay of both, decoupled.
        momentum: The rate of Muon's average.

    Raises:
        UserError: No weight is of a hidden layer.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        hidden, rest = [], []
        for p in params:
            (hidden if p.ndim > 1 and min(p.shape[:2]) >= LEAST else rest).append(p)
        if not hidden:
            raise UserError(
                f"MuonAdamW found no matrix or convolution with {LEAST} channels on both sides: "
                "use torch.optim.AdamW for this network."
            )
        b1, b2 = betas  # a YAML has a list
        group = {"params": hidden, "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        groups = [group]
        if rest:
            self.adamw = torch.optim.AdamW(
                rest, lr, (b1, b2), weight_decay=weight_decay, fused=True
            )
            groups += self.adamw.param_groups
        super().__init__(groups, {"fused": True})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move(self.param_groups[0])
        if len(self.param_groups) > 1:
            # a loaded state has groups of its own
            adamw: Any = self.adamw
            adamw.param_groups, adamw.state = self.param_groups[1:], self.state
            adamw.grad_scale, adamw.found_inf = self.grad_scale, self.found_inf
            adamw.step()
        return loss

    def move(self, group: dict[str, Any]) -> None:
        """A step of Muon, matrices of one shape together."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [local(self.state[p]["momentum_buffer"]) for p in params]
        gradients, lr = [local(p.grad) for p in params if p.grad is not None], group["lr"]
        # on a CPU a look at a number waits for nothing, and spares what would change nothing
        host = bool(params) and params[0].device.type == "cpu"
        if self.grad_scale is not None and not (host and self.grad_scale == 1):
            gradients = torch._foreach_div(gradients, self.grad_scale)  # type: ignore
        if self.found_inf is not None:
            # an average that is its own gradient stays as it is, and a rate of 0 moves nothing
            bad = self.found_inf > 0
            if not host or bad:
                pairs = zip(averages, gradients, strict=True)
                gradients = [torch.where(bad, average, gradient) for average, gradient in pairs]
            lr = lr * ~bad
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])  # type: ignore
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # type: ignore
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for k, p in enumerate(params):
            alike[len(p), p.numel() // len(p)].append(k)
        if group["weight_decay"]:
            torch._foreach_mul_([local(p) for p in params], 1 - lr * group["weight_decay"])  # type: ignore
        for shape, places in alike.items():
            whole = [assembled(ahead[k], params[k]).reshape(shape) for k in places]
            for k, u in zip(places, orthogonal(torch.stack(whole)), strict=True):
                u = u.reshape(params[k].shape) * (lr * 0.2 * max(shape) ** 0.5)
                params[k].sub_(parted(u, params[k]))
