r"""The no-U-turn sampler, one leapfrog step of every chain at a time.

A transition grows a trajectory by doubling: at depth d a subtree of :math:`2^d` leaves is added at
a random end, until the trajectory, or a balanced subtree of it, makes a U-turn. The next point is
a leaf drawn with probability :math:`\propto e^{\log p(x) - |p|^2 / 2}`.

Nothing here is recursive. Leaves are counted from the start, m = 1, 2, …, so that those of depth d
are :math:`2^d, …, 2^{d + 1} - 1` and the binary digits of m say where it stands in the tree: an
odd leaf with k trailing ones ends k balanced trees, whose first leaves are the last k that were
kept, and an even leaf begins one and is kept, in the slot that is the number of ones in
:math:`\lfloor m / 2 \rfloor`. The whole trajectory is the tree of slot 0.

Every chain is in its own leaf of its own tree, and begins its next transition as soon as one ends:
no chain waits for the longest trajectory of the others, except at the end of the last.

References:
    | The No-U-Turn Sampler (Hoffman & Gelman, 2014); https://arxiv.org/abs/1111.4246
    | A Conceptual Introduction to Hamiltonian Monte Carlo (Betancourt, 2017), appendix A:
    |   multinomial weights, biased progression, the criterion
    | https://arxiv.org/abs/1701.02434
    | Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro (Phan,
    |   Pradhan & Jankowiak, 2019), appendix A: the iterative form
    | https://arxiv.org/abs/1912.11554
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from pipeline.mcmc.compiled import compiled
from pipeline.mcmc.kernels import LOST, Info, Kernel, State, dot, positive
from pipeline.mcmc.targets import Target
from pipeline.noise import Noise

__all__ = ["NUTS"]

BETWEEN_LOOKS = 8  # leaves between two looks at whether all is drawn


class NUTS(Kernel):
    r"""The no-U-turn sampler with multinomial weights.

    With :math:`\rho` the sum of the momenta from the middle of a tree's first leaf to the middle
    of its last, the tree turns where :math:`\rho \cdot p \le 0` for the momentum p of either.

    `step` is a transition of every chain, which takes the longest trajectory; `draw` lets each
    chain go on at once, and takes the longest sum of trajectories.

    Arguments:
        step_size: The step ε of the leapfrog, positive.
        max_depth: The number of doublings, at least 1, after which a trajectory ends.
        aim: The mean acceptance that adaptation brings about, in (0, 1): nearer to 1 where a law
            has narrow places and chains diverge.
    """

    def __init__(self, step_size: float = 0.1, max_depth: int = 10, aim: float = 0.8) -> None:
        if max_depth < 1:
            raise ValueError(f"max_depth is {max_depth}; it must be at least 1.")
        self.step_size, self.max_depth = positive(step_size, "step_size"), max_depth
        self.aim = aim

    def step(self, target: Target, state: State, noise: Noise) -> tuple[State, Info]:
        state, _, info = self.draw(target, state, 1, noise)
        return state, Info(info.gradients, info.acceptance[0], info.diverged[0])

    def draw(
        self,
        target: Target,
        state: State,
        draws: int,
        noise: Noise,
        progress: Callable[[], object] | None = None,
        compile: bool = False,
    ) -> tuple[State, Tensor, Info]:
        forest = Forest(state, self.step_size, self.max_depth, draws, noise)
        grow = forest.grower(target, compile)
        leaves, done = 0, 0
        while done < draws:
            for _ in range(BETWEEN_LOOKS):
                grow(noise)
            leaves += BETWEEN_LOOKS
            before, done = done, int(forest.drawn.min())
            if progress is not None:
                for _ in range(done - before):
                    progress()
        return (
            forest.state(),
            forest.x[:draws].unflatten(2, state.x.shape[1:]),
            Info(leaves, forest.acceptance[:draws], forest.diverged[:draws]),
        )


class Forest:
    """The trees of all chains, one a row, and what was drawn with them.

    A leaf is one row of numbers, x, φ(x), log p(x), p, with shape (B, 3 D + 1). All that follows
    is done to every row at every leaf, and `torch.where` decides where it counts: a look at the
    values would wait for the device.

    Attributes:
        near, far: The leaf at the end that grows, and that at the other end.
        sample, weight: A leaf drawn from the tree, and the logarithm of the tree's weight,
            relative to its start.
        candidate, subweight: The same of the subtree that grows.
        energy: The log-weight of the start.
        gained: The sum over leaves of min(1, weight).
        momentum: The sum of the momenta of all leaves.
        m: The number of leaves beside the start.
        kept: The first leaf of each balanced tree, by slot: its momentum, and the sum of all
            momenta up to the middle of it, with shape (B, slots, 2, D).
        drawn: The number of finished transitions, of `draws` for each chain.
    """

    def __init__(
        self, state: State, step_size: float, max_depth: int, draws: int, noise: Noise
    ) -> None:
        self.shape, self.draws = state.x.shape, draws
        x = state.x.flatten(1)
        b, d = x.shape
        self.columns = d, d, 1, d
        self.step_size = step_size * x.new_ones(b, 1)  # negative in a tree that grows backwards
        self.sample = torch.cat((x, state.score.flatten(1), state.log_prob[:, None], x), dim=1)
        self.candidate = self.far = self.sample
        self.weight = self.subweight = self.energy = self.gained = x.new_zeros(b)
        self.momentum = x
        self.kept = x.new_zeros(b, max_depth + 1, 2, d)  # the last slot is for what is not kept
        self._number_leaves(max_depth)
        self.m = torch.zeros(b, dtype=torch.long, device=x.device)

        self.rows = torch.arange(b, device=x.device)
        self.drawn = torch.zeros_like(self.rows)
        # one more draw, for the chains that go on while others finish
        self.x = x.new_empty(draws + 1, b, d)
        self.acceptance = x.new_empty(draws + 1, b)
        self.diverged = torch.empty(draws + 1, b, dtype=torch.bool, device=x.device)
        everywhere = torch.ones_like(self.rows, dtype=torch.bool)
        first = self.plant(everywhere, self.sample, noise)
        self.turn_over(first, everywhere, ~everywhere)

    def _number_leaves(self, max_depth: int) -> None:
        """What the digits of each m say: the slots of the trees that end there, whether a doubling
        does, and the last one; and the slot where the leaf is kept.
        """
        device = self.kept.device
        m, slots = (torch.arange(n, device=device) for n in (2**max_depth, max_depth))
        bits = (m[:, None] >> slots) & 1
        ones, trailing = bits[:, 1:].sum(dim=1), bits.cumprod(dim=1).sum(dim=1)
        ends = (slots > ones[:, None] - trailing[:, None]) & (slots <= ones[:, None])
        whole, last = trailing == bits.sum(dim=1), m == 2**max_depth - 1
        self.kinds = torch.cat((ends, whole[:, None], last[:, None]), dim=1)
        self.slots = torch.where(bits[:, 0] == 1, max_depth, ones)

    def state(self) -> State:
        x, score, log_prob, _ = self.sample.split(self.columns, dim=1)
        return State(x.reshape(self.shape), log_prob[:, 0], score.reshape(self.shape))

    def grower(self, target: Target, compile: bool) -> Callable[[Noise], None]:
        """`grow` on one target; `compiled`, if it is to be."""
        if not compile:
            return partial(self.grow, target)
        own, fixed = vars(self), {"rows", "kinds", "slots"}
        written = ["kept", "x", "acceptance", "diverged"]  # in place
        moved = [n for n, part in own.items() if isinstance(part, Tensor)]
        moved = [n for n in moved if n not in fixed and n not in written]

        def grown(parts: Sequence[Any], noise: Noise) -> Sequence[Any]:
            own.update(zip(moved + written, parts, strict=True))
            self.grow(target, noise)
            return [own[name] for name in moved]

        program = compiled(grown)

        def grow(noise: Noise) -> None:
            parts = [own[name] for name in moved + written]
            own.update(zip(moved, program(parts, noise), strict=True))
            own.update(zip(written, parts[len(moved) :], strict=True))

        return grow

    def uniform(self, noise: Noise) -> list[Tensor]:
        """The numbers that decide within a subtree, between it and the tree, and on a side."""
        return [noise.uniform(len(self.rows)).to(self.rows.device) for _ in range(3)]

    def grow(self, target: Target, noise: Noise) -> None:
        """Add a leaf to every tree; where that ends a trajectory, begin the next one."""
        chance, share, side = self.uniform(noise)
        leaf, p, gain = self.leap(target)
        diverged = ~(gain > -LOST)
        gain = gain.masked_fill(diverged, -torch.inf)
        self.gained = self.gained + gain.clamp(max=0).exp()
        self.m = self.m + 1
        turned, whole, last = self.turned(p)
        broken = diverged | turned[:, 1:].any(dim=1)
        merged = whole & ~broken
        ended = broken | merged & (turned[:, 0] | last)

        # within a subtree a leaf is drawn by its weight; a subtree's is preferred to the tree's
        subweight = torch.logaddexp(self.subweight, gain)
        chosen = chance.log() < gain - subweight
        self.candidate = torch.where(chosen[:, None], leaf, self.candidate)
        better = merged & (share.log() < subweight - self.weight)
        better = better & (self.drawn < self.draws)
        self.sample = torch.where(better[:, None], self.candidate, self.sample)
        self.weight = torch.where(merged, torch.logaddexp(self.weight, subweight), self.weight)
        self.subweight = subweight.masked_fill(merged, -torch.inf)

        self.record(ended, diverged)
        flip = merged & ~ended & (side < 0.5)
        self.turn_over(self.plant(ended, leaf, noise), ended, flip)

    def leap(self, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """A leapfrog step from the near end: the leaf, its momentum, its log-weight relative to
        the start.
        """
        x, score, _, p = self.near.split(self.columns, dim=1)
        half = 0.5 * self.step_size
        p = p + half * score
        x = x + self.step_size * p
        log_prob, score = target.log_prob_and_score(x.reshape(self.shape))
        score = score.flatten(1)
        p = p + half * score
        gain = log_prob - 0.5 * dot(p, p) - self.energy
        return torch.cat((x, score, log_prob[:, None], p), dim=1), p, gain

    def turned(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which trees that end at this leaf have turned, by slot; whether it ends a doubling, and
        the last one.
        """
        kinds = self.kinds.index_select(0, self.m)
        ends, whole, last = kinds[:, :-2], kinds[:, -2], kinds[:, -1]
        self.momentum = self.momentum + p
        middle = self.momentum - 0.5 * p  # the sum up to the middle of this leaf
        flat = self.rows * self.kept.shape[1] + self.slots.index_select(0, self.m)
        self.kept.flatten(0, 1).index_copy_(0, flat, torch.stack((p, middle), dim=1))
        first, start = self.kept[:, :-1, 0], self.kept[:, :-1, 1]  # (B, depth, D)
        rho = middle[:, None] - start
        forward = torch.minimum(vecdot(rho, first), vecdot(rho, p[:, None]))
        return ends & (forward <= 0), whole, last

    def record(self, ended: Tensor, diverged: Tensor) -> None:
        """Write the current draw of every chain; where its trajectory ended, go on to the next."""
        flat = self.drawn * len(self.rows) + self.rows
        self.x.flatten(0, 1).index_copy_(0, flat, self.sample[:, : self.columns[0]])
        self.acceptance.flatten().index_copy_(0, flat, self.gained / self.m)
        self.diverged.flatten().index_copy_(0, flat, diverged)
        self.drawn = torch.clamp(self.drawn + ended, max=self.draws)

    def plant(self, ended: Tensor, leaf: Tensor, noise: Noise) -> Tensor:
        """The leaf, and where a trajectory ended the first one of the next: the sample with a
        fresh momentum.
        """
        x, score, log_prob, _ = self.sample.split(self.columns, dim=1)
        p = noise.normal(self.momentum)
        row, energy = ended[:, None], log_prob[:, 0] - 0.5 * dot(p, p)
        self.energy = torch.where(ended, energy, self.energy)
        self.momentum = torch.where(row, p, self.momentum)
        self.weight = self.weight.masked_fill(ended, 0.0)
        self.subweight = self.subweight.masked_fill(ended, -torch.inf)
        self.gained = self.gained.masked_fill(ended, 0.0)
        self.m = self.m.masked_fill(ended, 0)
        return torch.where(row, torch.cat((x, score, log_prob, p), dim=1), leaf)

    def turn_over(self, leaf: Tensor, ended: Tensor, flip: Tensor) -> None:
        """Set both ends of every trajectory: it goes on from this leaf or, with the other sign of
        the step, from its far end. What ended is a single leaf now.
        """
        row = flip[:, None]
        self.near = torch.where(row, self.far, leaf)
        self.far = torch.where((flip | ended)[:, None], leaf, self.far)
        self.step_size = torch.where(row, -self.step_size, self.step_size)
        p = self.far[:, -self.columns[3] :]
        self.kept[:, 0, 0], self.kept[:, 0, 1] = p, 0.5 * p  # the tree of slot 0 begins there
