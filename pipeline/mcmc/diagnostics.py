"""Diagnostics: whether chains have met, and what their draws are worth.

References:
    | Vehtari, Gelman, Simpson, Carpenter & Bürkner, 2021; https://arxiv.org/abs/1903.08008
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.mcmc.run import Draws

__all__ = ["Summary", "summarise", "table"]

RHAT = 1.01  # above it chains have not met, as the reference has it


@dataclass
class Summary:
    """What the draws say of each coordinate, and how well: arrays with shape (D,).

    Attributes:
        low, high: The quantiles 0.05 and 0.95.
        ess_bulk: The effective sample size of the rank-normalised draws.
        ess_tail: The least effective sample size of the quantiles 0.05 and 0.95.
        r_hat: The rank-normalised split R̂; no number for one chain, or where a chain never moved.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    r_hat: np.ndarray


def summarise(x: Tensor) -> Summary:
    """The summary of draws with shape (draws, chains, *), at least 4 draws.

    Warns:
        UserWarning: R̂ is above 1.01 for some coordinate, or is no number, and why.
    """
    from arviz_stats.base.array import array_stats  # it takes a second to import

    if len(x) < 4:
        raise ValueError(f"{len(x)} draws say nothing of convergence; at least 4 are needed.")
    chains = x.flatten(2).permute(2, 1, 0).double().cpu().numpy()  # (D, chains, draws)
    with np.errstate(all="ignore"), warnings.catch_warnings():  # all draws of a chain may be one
        warnings.simplefilter("ignore", RuntimeWarning)
        summary = Summary(
            mean=chains.mean(axis=(1, 2)),
            std=chains.std(axis=(1, 2)),
            low=np.quantile(chains, 0.05, axis=(1, 2)),
            high=np.quantile(chains, 0.95, axis=(1, 2)),
            ess_bulk=np.asarray(array_stats.ess(chains, method="bulk")),
            ess_tail=np.asarray(array_stats.ess(chains, method="tail", prob=(0.05, 0.95))),
            r_hat=np.asarray(array_stats.rhat(chains)),
        )
    for reason in _doubts(chains, summary.r_hat):
        warnings.warn(reason, stacklevel=2)
    return summary


def _doubts(chains: np.ndarray, r_hat: np.ndarray) -> Iterator[str]:
    """Why not to trust draws with shape (D, chains, draws)."""
    moved = (chains != chains[:, :, :1]).any(axis=2)
    if not moved.all():
        i = int(moved.all(axis=1).argmin())
        yield (
            f"{(~moved[i]).sum()} of {len(moved[i])} chains never moved in coordinate {i}: no "
            "step was accepted; use a smaller step or a longer warm-up, or start them elsewhere."
        )
    if chains.shape[1] == 1:
        yield "R-hat needs at least two chains, and there is one; run more to see if they meet."
    elif np.nanmax(r_hat, initial=0) > RHAT:
        yield (
            f"R-hat is {np.nanmax(r_hat):.3f} in coordinate {np.nanargmax(r_hat)}, above {RHAT}: "
            "the chains have not met; run them longer, or start them elsewhere."
        )


def table(draws: Draws, most: int = 20) -> str:
    """The summary of a run as text: its coordinates (where there are many, those with the least
    effective sample size), and what they cost.
    """
    summary = summarise(draws.x)
    shown = np.argsort(np.minimum(summary.ess_bulk, summary.ess_tail))[:most]
    names = ("mean", "std", "5 %", "95 %", "ESS bulk", "ESS tail")
    lines = [" " * 6 + "".join(f" {name:>9}" for name in names) + "   R-hat"]
    for i in sorted(shown):
        mean, std, low, high, bulk, tail, r_hat = (column[i] for column in vars(summary).values())
        lines.append(
            f"{f'x_{i}':>6} {mean:9.4g} {std:9.4g} {low:9.4g} {high:9.4g} {bulk:9.0f} {tail:9.0f} "
            + f"{r_hat:7.4f}".replace("nan", "  -")
        )
    if len(shown) < len(summary.mean):
        lines.append(f"and {len(summary.mean) - len(shown)} coordinates with more ESS")
    least = min(summary.ess_bulk.min(), summary.ess_tail.min())
    rate = 1000 * least / draws.gradients
    cost = f"{rate:.3g} least ESS per 1,000 of {draws.gradients} gradients"
    if draws.acceptance is not None and draws.diverged is not None:
        cost += f"; acceptance {draws.acceptance.mean():.3f}, divergences {draws.diverged.sum()}"
    return "\n".join([*lines, cost])
