"""Many chains of a kernel on a target: warm-up, draws, and what went wrong."""

import copy
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.mcmc.adaptation import DualAveraging, Moments, windows
from pipeline.mcmc.kernels import Kernel, State
from pipeline.mcmc.targets import Scaled, Target, said, unbounded
from pipeline.noise import Noise
from pipeline.schedules import expand_as_batch

__all__ = ["Draws", "run", "sample"]


@dataclass
class Draws:
    """What a run has drawn.

    Attributes:
        x: The points, with shape (draws, chains, *).
        acceptance: The probability of acceptance in each step, with shape (draws, chains); `None`
            for an unadjusted kernel.
        diverged: Where a step met a non-finite density or lost its energy, with the same shape.
        gradients: The evaluations of the target for the draws, of all chains together; those of
            chains that wait for others are counted.
        warmup_gradients: Those of the warm-up.
        kernel: The kernel of the draws, with the step size that was found.
        scale: The units of the coordinates that were found, with the shape of one x (where it is
            bounded, of its unbounded coordinates), or `None`.
    """

    x: Tensor
    acceptance: Tensor | None
    diverged: Tensor | None
    gradients: int
    warmup_gradients: int
    kernel: Kernel
    scale: Tensor | None


@torch.inference_mode()
def run(
    target: Target,
    kernel: Kernel,
    x: Tensor,
    draws: int,
    warmup: int,
    noise: Noise,
    progress: Callable[[], object] | None = None,
    compile: bool = False,
) -> Draws:
    """Run chains from x, with shape (chains, *), and keep what they visit in `draws` steps, at
    least 1, after the warm-up. `progress` is called after each step. With `compile` the step of
    the draws, not of the warm-up, is `compiled`.

    Where the kernel accepts or rejects, the warm-up finds its step size and the unit of each
    coordinate, both frozen for the draws; else it only lets the chains forget where they started.
    The kernel that was given is left as it was. Where the target has bounds, the chains walk in
    its unbounded coordinates.

    Raises:
        UserError: A chain starts where the density is not finite, an unadjusted chain leaves the
            finite numbers, or the kernel needs a density and the target has none.

    Warns:
        UserWarning: A step of the draws diverged.
    """
    if draws < 1 or warmup < 0:
        raise UserError(f"draws is {draws} and warmup {warmup}; at least 1 and 0 are needed.")
    bounds, target, z = target.bounds, unbounded(target), _unbounded_start(target, x)
    kernel, state = copy.copy(kernel), kernel.init(target, z)
    _check_start(state, x)
    scale, spent = None, 0
    if kernel.aim is not None:
        target, state, scale, spent = _adapt(target, kernel, state, warmup, noise, progress)
    elif warmup:
        state, path, info = kernel.draw(target, state, warmup, noise, progress)
        _check_finite(kernel, path, z, 0)
        spent = info.gradients
    start = state.x
    state, z, info = kernel.draw(target, state, draws, noise, progress, compile)
    _check_finite(kernel, z, start, warmup)
    z = z if scale is None else scale * z
    z, n = z if bounds is None else bounds(z), len(x)
    found = info.acceptance, info.diverged, n * info.gradients, n * spent
    result = Draws(z, *found, kernel, scale)
    _warn_diverged(result, warmup)
    return result


def _adapt(
    target: Target,
    kernel: Kernel,
    state: State,
    warmup: int,
    noise: Noise,
    progress: Callable[[], object] | None,
) -> tuple[Target, State, Tensor | None, int]:
    """The target and the state in the units that were found, and the evaluations made; the
    kernel's step size is set.
    """
    scale, spent, ends = None, 0, windows(warmup)
    scaled, averaging = target, DualAveraging(kernel.aim or 0.5)
    step, moments = averaging.init(kernel.step_size), Moments.empty(state.x)
    for i in range(1, warmup + 1):
        kernel.step_size = math.exp(step.log_step)
        state, info = kernel.step(scaled, state, noise)
        step = averaging.update(step, info.acceptance.mean().item())
        x = state.x if scale is None else scale * state.x
        moments, spent = moments.update(x), spent + info.gradients
        if i in ends:
            scale = moments.scale().to(x)
            scaled, moments = Scaled(target, scale), Moments.empty(x)
            state, spent = kernel.init(scaled, x / scale), spent + 1
            step = averaging.init(math.exp(step.log_average))
        if progress is not None:
            progress()
    if warmup:
        kernel.step_size = math.exp(step.log_average)
    return scaled, state, scale, spent


def _unbounded_start(target: Target, x: Tensor) -> Tensor:
    """Where the chains start in unbounded coordinates; no number for a point out of bounds."""
    if target.bounds is None:
        return x
    z = target.bounds.inv(x)
    inside = torch.isclose(target.bounds(z), x).flatten(1).all(dim=1)
    return torch.where(expand_as_batch(inside, z), z, torch.nan)


def _check_start(state: State, x: Tensor) -> None:
    known = [part for part in state if part is not None]
    finite = torch.stack([part.reshape(len(part), -1).isfinite().all(dim=1) for part in known])
    wrong = (~finite.all(dim=0)).nonzero().flatten().tolist()
    if wrong:
        raise UserError(
            f"Chain {wrong[0]} starts at x = {said(x[wrong[0]])}, where the density or the score "
            "is not finite; start it where they are, and give a bounded density as the log_prob "
            "of an object of torch.distributions."
        )


def _check_finite(kernel: Kernel, path: Tensor, start: Tensor, first: int) -> None:
    """No chain of a path, (steps, chains, *), that begins with step `first`, has left the finite
    numbers.
    """
    if not path[-1].isfinite().all():  # what is not finite stays so
        wrong = (~path.flatten(2).isfinite().all(dim=2)).nonzero()
        step, chain = wrong[0].tolist()
        before = path[step - 1, chain] if step else start[chain]
        raise UserError(
            f"{type(kernel).__name__} left the finite numbers in chain {chain} at step "
            f"{first + step}, from x = {said(before)}; a smaller step is needed."
        )


def _warn_diverged(draws: Draws, warmup: int) -> None:
    if draws.diverged is None or not draws.diverged.any():
        return
    wrong = draws.diverged.nonzero()
    step, chain = wrong[0].tolist()
    warnings.warn(
        f"{type(draws.kernel).__name__} diverged in {len(wrong)} of {draws.diverged.numel()} "
        f"steps, first in chain {chain} at step {warmup + step}, near x = "
        f"{said(draws.x[step, chain])}: the draws avoid what lies there; use a smaller step, or "
        "other coordinates.",
        stacklevel=3,
    )


def sample(
    target: Target,
    kernel: Kernel,
    dim: int | None = None,
    chains: int = 16,
    draws: int = 1000,
    warmup: int = 500,
    spread: float = 1.0,
    seed: int = 0,
    compile: bool = False,
) -> Draws:
    """Run a kernel on a target, from points around 0 (of its unbounded coordinates, if it has
    bounds).

    Arguments:
        target: The law to draw from.
        kernel: The step of the chains.
        dim: The number of coordinates, where the target does not say.
        chains: The number of chains.
        draws: The steps of each chain that are kept.
        warmup: The steps before them, in which step size and units are found.
        spread: The standard deviation of the points around 0 at which the chains start.
        seed: What decides the draws.
        compile: Whether their step is compiled first, in some seconds: of a quick density HMC and
            NUTS then take a third of their time or less.

    Raises:
        UserError: A number is too small, or dim is not that of the target; see also `run`.
    """
    own = getattr(target, "dim", None) or dim
    if own is None or (dim is not None and dim != own):
        said = "does not say its number of coordinates" if own is None else f"has {own}"
        raise UserError(f"dim is {dim}, and {type(target).__name__} {said}; correct --dim.")
    if chains < 1:
        raise UserError(f"chains is {chains}; at least 1 is needed.")
    noise = Noise("sample", seed)
    x = torch.empty(chains, own, dtype=torch.float64)
    if target.bounds is None:
        x = spread * noise.normal(x)
    else:
        z = x.new_empty(target.bounds.inverse_shape(x.shape))
        x = target.bounds(spread * noise.normal(z))
    interval = 0.5 if sys.stderr.isatty() else 15.0  # a log wants few lines
    with tqdm(total=warmup + draws, desc="Sampling", unit="step", mininterval=interval) as bar:
        return run(target, kernel, x, draws, warmup, noise, bar.update, compile)
