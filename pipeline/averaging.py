r"""Power-function averages of weights, and the ones of other lengths that follow from them.

At step t the average of exponent γ is

.. math:: \hat\theta_\gamma(t) = \int_0^t p_{\gamma, t}(\tau) \, \theta(\tau) \, d\tau, \quad
    p_{\gamma, t}(\tau) = \frac{(\gamma + 1) \, \tau^\gamma}{t^{\gamma + 1}}

Its length is the standard deviation of p as a share of the run,

.. math:: \sigma_\text{rel} = \sqrt{\frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}}

so it forgets the beginning of a run of any length. Averages of two lengths, kept at a few steps,
span enough functions p that another one is a linear combination of them nearly: its weights are
those of the least squares between the functions.

References:
    | Karras et al., 2024, section 3 and appendix C; https://arxiv.org/abs/2312.02696
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import whole

__all__ = ["FOLDER", "LONGEST", "combination", "exponent", "keep", "reconstruct"]

FOLDER = "averages"  # of a run, where the kept ones are
MISSED = 0.1  # of an average's profile at most
LONGEST = 12**-0.5  # of the average in which all steps count the same


def exponent(length: float) -> float:
    """The exponent γ of an average of relative length σ_rel.

    Raises:
        ValueError: The length is not in (0, 0.288): longer than with equal weights there is none.
    """
    if not 0 < length < LONGEST:
        raise ValueError(
            f"length = {length} must lie in (0, {LONGEST:.3f}), as a share of the run; "
            "0.05 and 0.1 are usual."
        )
    # (γ + 1) / ((γ + 2)² (γ + 3)) = σ²: with v = σ⁻², γ³ + 7 γ² + (16 − v) γ + 12 − v = 0
    v = length**-2
    return float(np.roots([1, 7, 16 - v, 12 - v]).real.max())


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    r"""The integral of :math:`p_{\gamma_a, t_a} \, p_{\gamma_b, t_b}`, of pairs (t, γ)."""
    (t_a, g_a), (t_b, g_b) = a, b
    least = min(t_a, t_b)
    # powers of ratios, since t to the power of γ leaves float64
    shrink = (least / t_a) ** g_a * (least / t_b) ** g_b
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * shrink * least / (t_a * t_b)


def combination(
    kept: Sequence[tuple[float, float]], wanted: tuple[float, float]
) -> tuple[list[float], float]:
    r"""The weights of kept averages, pairs (t, length), that are nearest to a wanted one, and how
    much of it they miss, :math:`\|p - \sum_i w_i p_i\| / \|p\|`.
    """
    have = [(t, exponent(length)) for t, length in kept]
    want = (wanted[0], exponent(wanted[1]))
    matrix = np.array([[overlap(a, b) for b in have] for a in have])
    target, square = np.array([overlap(a, want) for a in have]), overlap(want, want)
    weights = np.linalg.lstsq(matrix, target)[0]
    missed = square - 2 * weights @ target + weights @ matrix @ weights
    return weights.tolist(), float(max(missed, 0.0) / square) ** 0.5


def keep(folder: Path, step: int, averages: dict[str, dict[str, Tensor]]) -> None:
    """Keep the averages of a step, for each length the weights by name, in the run's folder."""
    from safetensors.torch import save_file

    named = {f"{length}/{name}": w for length, of in averages.items() for name, w in of.items()}
    named = {name: w.detach().cpu().contiguous() for name, w in named.items()}
    with whole(folder / FOLDER / f"{step:08d}.safetensors") as part:
        save_file(named, part)


def reconstruct(
    folder: Path, step: int, length: float, own: Mapping[float, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The average of another relative length σ_rel at a step t, from what a run kept before it.

    Arguments:
        own: The averages at step t itself, by their length: without them what came after the
            last kept step would be missing.

    Raises:
        UserError: The run kept too little for a length like this, or a file of it is damaged.
    """
    kept = [(float(step), one) for one in own]
    parts: list[tuple[Path | None, float]] = [(None, one) for one in own]
    for file in sorted((folder / FOLDER).glob("*.safetensors")):
        if file.stem.isdecimal() and int(file.stem) < step:
            kept += [(float(file.stem), one) for one in own]
            parts += [(file, one) for one in own]
    weights, missed = combination(kept, (step, length))
    if missed > MISSED:
        raise UserError(
            f"--ema {length:g} cannot be made of what {folder} kept: lengths "
            f"{' and '.join(f'{one:g}' for one in own)} at {len(kept) // len(own)} steps. Ask for "
            "a length nearer to these."
        )
    found: dict[str, Tensor] = {}
    for weight, (file, one) in zip(weights, parts, strict=True):
        for name, w in (own[one] if file is None else _read(file, one)).items():
            part = weight * w.double()
            found[name] = found[name] + part if name in found else part
    return {name: w.to(torch.float32) for name, w in found.items()}


def _read(file: Path, length: float) -> dict[str, Tensor]:
    """The average of one length in a file."""
    from safetensors import SafetensorError, safe_open

    prefix = f"{length:g}/"
    try:
        with safe_open(file, "pt") as opened:
            names = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118
            found = {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to do without.") from error
    if not found:
        raise UserError(f"{file} holds no average of length {length:g}; remove it.")
    return found
