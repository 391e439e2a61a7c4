"""`sample`: from a target and a kernel named in YAML to draws, a table and plots."""

import sys
import time
import warnings
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.mcmc import Draws, Kernel, Law, Target, run
from pipeline.mcmc.diagnostics import table
from pipeline.noise import Noise

__all__ = ["draw", "sample"]

PLOTTED = 4  # coordinates, the first ones


def sample(argv: list[str], line: str) -> int:
    """Draw, print the table, and write the draws, how they were made, and their plots.

    Arguments:
        argv: The arguments of the command.
        line: The whole command, to be written beside the draws.
    """
    parser = ArgumentParser(prog="python -m pipeline sample", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="a YAML file; several merge")
    parser.add_argument("--out", type=str | None, default=None, help="where to write")
    parser.add_function_arguments(draw, sub_configs=True)
    try:
        config = parser.parse_args(argv)
        text = parser.dump(config, skip_unset=False)
        parts = parser.instantiate(config).as_dict()
    except ArgumentError as error:
        raise UserError(f"sample: {error}") from error
    out = _make_folder(parts.pop("out"))
    del parts["config"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        draws = draw(**parts)
        print(table(draws))
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    numbers = {"x": draws.x, "acceptance": draws.acceptance, "diverged": draws.diverged}
    tensors = {name: value.contiguous() for name, value in numbers.items() if value is not None}
    save_file(tensors, out / "draws.safetensors", {"command": line, "config": text})
    (out / "config.yaml").write_text(text, encoding="utf-8")
    _plot_traces(draws.x, out / "trace.png")
    _plot_pairs(draws.x, out / "pairs.png")
    print(f"draws.safetensors, config.yaml, trace.png and pairs.png are in {out}")
    return 0


def draw(
    target: Target,
    kernel: Kernel,
    dim: int | None = None,
    chains: int = 16,
    draws: int = 1000,
    warmup: int = 500,
    spread: float = 1.0,
    seed: int = 0,
) -> Draws:
    """Run a kernel on a target.

    Args:
        target: The law to draw from.
        kernel: The step of the chains.
        dim: The number of coordinates, where the target does not say.
        chains: The number of chains.
        draws: The steps of each chain that are kept.
        warmup: The steps before them, in which step size and units are found.
        spread: The standard deviation of the points around 0 at which the chains start.
        seed: What decides the draws.
    """
    own = target.dim if isinstance(target, Law) else dim
    if own is None or (dim is not None and dim != own):
        said = "does not say its number of coordinates" if own is None else f"has {own}"
        raise UserError(f"dim is {dim}, and {type(target).__name__} {said}; correct --dim.")
    if chains < 1:
        raise UserError(f"chains is {chains}; at least 1 is needed.")
    noise = Noise("sample", seed)
    x = spread * noise.normal(torch.empty(chains, own, dtype=torch.float64))
    interval = 0.5 if sys.stderr.isatty() else 15.0  # a log wants few lines
    with tqdm(total=warmup + draws, desc="Sampling", unit="step", mininterval=interval) as bar:
        return run(target, kernel, x, draws, warmup, noise, bar.update)


def _make_folder(out: str | None) -> Path:
    folder = Path(out) if out else Path("outputs") / time.strftime("%Y%m%d-%H%M%S")
    if (folder / "draws.safetensors").exists():
        raise UserError(f"--out {folder} holds draws already; name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written to: {error.strerror}; name another folder."
        ) from error
    return folder


def _plot_traces(x: Tensor, file: Path) -> None:
    """Each coordinate against the step, a line for each chain."""
    columns = x.flatten(2)[:, :, :PLOTTED].cpu().unbind(dim=2)
    figure = Figure(figsize=(9, 1.8 * len(columns)), layout="constrained")
    axes = figure.subplots(len(columns), squeeze=False, sharex=True)[:, 0]
    for i, (axis, column) in enumerate(zip(axes, columns, strict=True)):
        axis.plot(column.numpy(), linewidth=0.4, alpha=0.7)
        axis.set_ylabel(f"x_{i}")
    axes[-1].set_xlabel("step")
    figure.savefig(file, dpi=120)


def _plot_pairs(x: Tensor, file: Path) -> None:
    """Each coordinate's histogram, and each pair's points: 4,000 of all draws, evenly spaced."""
    points = x.flatten(2)[:, :, :PLOTTED].flatten(0, 1).cpu()
    points = points[torch.linspace(0, len(points) - 1, min(len(points), 4000)).long()].numpy()
    n = points.shape[1]
    figure = Figure(figsize=(2.2 * n + 1, 2.2 * n + 1), layout="constrained")
    axes = figure.subplots(n, n, squeeze=False)
    for i in range(n):
        for j in range(n):
            if i == j:
                axes[i, i].hist(points[:, i], bins=60)
            elif j < i:
                axes[i, j].plot(points[:, j], points[:, i], ".", markersize=1, alpha=0.5)
            else:
                axes[i, j].axis("off")
        axes[i, 0].set_ylabel(f"x_{i}")
        axes[n - 1, i].set_xlabel(f"x_{i}")
    figure.savefig(file, dpi=120)
