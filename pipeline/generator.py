"""Prompts to pictures, without Lightning.

A `Generator` is what is left of a training run when training is taken away: the denoiser with its
averaged weights, the conditioning, and what is drawn with. `generate`, sample sheets and
evaluation all draw through it.
"""

import importlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.conditioning import Conditioning
from pipeline.denoisers import Denoiser
from pipeline.errors import UserError
from pipeline.guidance import Guidance
from pipeline.noise import PictureNoise
from pipeline.samplers import Sampler, State

__all__ = ["Generator", "build", "place", "read_checkpoint"]


class Generator:
    r"""Draws from :math:`p(x \mid u)`.

    Picture i is a function of its seed, its condition and the settings: its noise bit for bit
    whatever is drawn beside it and on whatever device; the picture bit for bit at a fixed
    micro-batch, which is why the last one is filled up.

    Several processes draw `together` by taking turns at the micro-batches, one each in a round.
    Every process makes the same number of network calls, with a micro-batch that is thrown away
    where none is left, and is given the x of all.

    Arguments:
        denoiser: The denoiser.
        conditioning: Turns prompts, classes or vectors into u; `None` for an unconditional model.
        shape: The shape of one x: (C, H, W) or (D,).
        sampler: How to draw.
        guidance: How to guide; `None` leaves the conditional denoiser as it is.
        together: Whether all processes of `torch.distributed` draw together. Each of them then
            has to make the same calls.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioning: Conditioning | None,
        shape: Sequence[int],
        sampler: Sampler,
        guidance: Guidance | None = None,
        together: bool = False,
    ) -> None:
        self.denoiser, self.conditioning, self.shape = denoiser, conditioning, tuple(shape)
        self.sampler, self.guidance, self.together = sampler, guidance, together

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: torch.device | str = "cpu", trust: Sequence[str] = ()
    ) -> "Generator":
        """The generator that a training run wrote into its checkpoint, with the averaged weights
        where there are any.

        Arguments:
            path: A checkpoint written by `python -m pipeline fit`.
            device: Where to draw.
            trust: Packages beside our own whose classes the checkpoint may name.

        Raises:
            UserError: The file is not such a checkpoint, or its text encoder was changed since.
        """
        checkpoint = read_checkpoint(path)
        about = checkpoint["pipeline"]
        parts = {
            name: build(about[name], trust)
            for name in ("denoiser", "conditioning", "sampler", "guidance")
        }
        denoiser, conditioning = parts["denoiser"], parts["conditioning"]
        if conditioning is not None and conditioning.fingerprint() != about["fingerprint"]:
            raise UserError(
                f"{path} was trained with another {type(conditioning).__name__} than is here now: "
                f"put back what {about['conditioning'].get('init_args')} named then."
            )
        weights = checkpoint["state_dict"] | checkpoint.get("ema", {})
        denoiser.load_state_dict(
            {name.removeprefix("denoiser."): w for name, w in weights.items()}
        )
        denoiser.to(device).eval().requires_grad_(False)
        return cls(denoiser, conditioning, about["shape"], parts["sampler"], parts["guidance"])

    @property
    def device(self) -> torch.device:
        """The device of the denoiser's weights."""
        return next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))

    def embed(self, values: Sequence[Any]) -> Tensor | None:
        """u for each value, with shape (B, L, E).

        Each distinct value is embedded by itself: to the last bit, a picture must not depend on
        its neighbours.
        """
        if self.conditioning is None:
            return None
        known = {value: self.conditioning.embed([value])[0] for value in dict.fromkeys(values)}
        u = torch.nn.utils.rnn.pad_sequence([known[value] for value in values], batch_first=True)
        return u.to(self.device)

    def __call__(
        self,
        values: Sequence[Any],
        seeds: Sequence[int],
        micro_batch: int = 16,
        progress: Callable[[State], object] | None = None,
    ) -> Iterator[Tensor]:
        """Draw one x for each value.

        Arguments:
            values: What to condition on: prompts, class names, vectors as tuples; ignored by an
                unconditional model.
            seeds: The seed of each.
            micro_batch: How many are drawn together. Memory grows with it.
            progress: Called with the state after each step of the sampler, `sampler.steps` times
                in each of the :meth:`rounds`.

        Yields:
            The x of each micro-batch in turn, with shape (up to micro_batch, \\*shape), in about
            [-1, 1].
        """
        denoiser, (rank, world) = self.denoiser, self.place()
        index = {value: k for k, value in enumerate(dict.fromkeys(values))}
        table = self.embed(list(index))
        if self.guidance is not None and self.conditioning is not None:
            denoiser = self.guidance(denoiser, self.conditioning.null().to(self.device))
        training = self.denoiser.training
        self.denoiser.eval()
        for start in range(0, len(values), micro_batch * world):
            own = start + rank * micro_batch
            rows = [min(i, len(values) - 1) for i in range(own, own + micro_batch)]
            like = torch.empty(micro_batch, *self.shape, device=self.device)
            u = None if table is None else table[[index[values[i]] for i in rows]]
            noise = PictureNoise([seeds[i] for i in rows])
            x = self.sampler(denoiser, like, u, noise, progress).contiguous()
            drawn = [x]
            if world > 1:
                drawn = [torch.empty_like(x) for _ in range(world)]
                torch.distributed.all_gather(drawn, x)
            for turn, x in enumerate(drawn):
                left = len(values) - start - turn * micro_batch
                if left > 0:
                    yield x[:left]
        self.denoiser.train(training)

    def place(self) -> tuple[int, int]:
        """The rank of this process among those that draw together, and their number."""
        return place() if self.together else (0, 1)

    def rounds(self, number: int, micro_batch: int = 16) -> int:
        """How often the sampler runs, in each process, to draw so many."""
        return -(-number // (micro_batch * self.place()[1]))


def place() -> tuple[int, int]:
    """The rank of this process in the group of `torch.distributed`, and the number of processes;
    without a group, 0 and 1.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A training run's checkpoint, read without executing anything in it.

    Raises:
        UserError: There is no such file, it is damaged, or it was not written by `python -m
            pipeline fit`.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no checkpoint {path}; `make train` makes one in runs/, or name another."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint; it may be cut short or another kind of file."
        ) from error
    if not isinstance(checkpoint, dict) or "denoiser" not in checkpoint.get("pipeline", {}):
        raise UserError(
            f"{path} does not say how to build its model, so it was not written by `python -m "
            f"pipeline fit`; "
            "build a Generator from your own denoiser instead."
        )
    return checkpoint


def build(node: Any, trust: Sequence[str] = ()) -> Any:
    """The object that a description names: {"class_path": …, "init_args": {…}}, at any depth.

    Arguments:
        node: The description; what is not one is returned as it is.
        trust: Packages beside our own whose classes may be named.

    Raises:
        UserError: It names anything but a class of ours or of a trusted package.
    """
    if isinstance(node, list):
        return [build(item, trust) for item in node]
    if not isinstance(node, dict):
        return node
    if "class_path" not in node:
        return {key: build(value, trust) for key, value in node.items()}
    path = node["class_path"]
    allowed = ("pipeline", *trust)
    if path.split(".")[0] not in allowed:
        raise UserError(
            f"The checkpoint names {path}, which is not in a trusted package "
            f"({', '.join(allowed)})."
        )
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    if not isinstance(found, type) or found.__module__.split(".")[0] not in allowed:
        raise UserError(f"The checkpoint names {path}, which is not a class of a trusted package.")
    return found(**build(node.get("init_args") or {}, trust))
