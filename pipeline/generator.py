"""Prompts to rows, without Lightning.

A `Generator` is what is left of a training run when training is taken away: the denoiser with its
averaged weights, the conditioning, the codec, and what is drawn with. `generate`, sample sheets
and evaluation all draw through it.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipeline import exported
from pipeline.checkpoint import Checkpoint, about
from pipeline.codec import Codec
from pipeline.condition import Condition
from pipeline.conditioning import Conditioning, Given, Picture
from pipeline.denoisers import Denoiser
from pipeline.distributed import gather, place
from pipeline.errors import UserError
from pipeline.guidance import Guidance
from pipeline.noise import PictureNoise
from pipeline.samplers import Sampler, State

__all__ = ["Bar", "Generator"]

ABSURD = 1e6  # x is about in [-1, 1]


class Generator:
    r"""Draws from :math:`p(x \mid u)`.

    Picture i is a function of its seed, its condition and the settings: its noise bit for bit
    whatever is drawn beside it and on whatever device; the picture bit for bit at a fixed
    micro-batch, which is why the last one is filled up, and one length of the longest prompt of a
    call, to which the tokens of the others are padded.

    Several processes draw `together` by taking turns at the micro-batches, one each in a round.
    Every process makes the same number of network calls, with a micro-batch that is thrown away
    where none is left, and is given the rows of all.

    Arguments:
        denoiser: The denoiser.
        conditioning: Turns prompts, classes or vectors into u; `None` for an unconditional model.
        codec: Makes rows of x.
        sampler: How to draw.
        guidance: How to guide; `None` leaves the conditional denoiser as it is.
        together: Whether all processes of `torch.distributed` draw together. Each of them then
            has to make the same calls.
        prompts: What to draw where nothing else is said.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioning: Conditioning | None,
        codec: Codec,
        sampler: Sampler,
        guidance: Guidance | None = None,
        together: bool = False,
        prompts: Sequence[str] = (),
    ) -> None:
        self.denoiser, self.conditioning, self.codec = denoiser, conditioning, codec
        if isinstance(conditioning, Picture):
            conditioning.see(codec.shape)
        network = getattr(denoiser, "network", None)
        of_u = {name: getattr(conditioning, name, 0) for name in ("dim", "planes")}
        have = {**codec.sizes, "u_dim": of_u["dim"], "planes": of_u["planes"]}
        for name, size in have.items():
            if getattr(network, name, size) != size:
                raise UserError(
                    f"The network takes {name} = {getattr(network, name)}, and codec and "
                    f"conditioning give {size}: they are of different models."
                )
        self.sampler, self.guidance, self.together = sampler, guidance, together
        self.prompts = prompts

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        trust: Sequence[str] = (),
        average: str | None = None,
    ) -> "Generator":
        """The generator of a model, as its checkpoint says.

        Arguments:
            path: A checkpoint, or the folder of a run.
            device: Where to draw.
            trust: Packages beside our own whose classes the checkpoint may name.
            average: The name of an average of the weights; the first by default.

        Raises:
            UserError: The file is no checkpoint of ours, or its text encoder was changed since.
        """
        checkpoint = Checkpoint(path, trust)
        conditioning = checkpoint.conditioning()
        denoiser = checkpoint.denoiser(average, device)
        sampler = checkpoint.part("sampler", Sampler)
        guidance, codec = (
            checkpoint.optional("guidance", Guidance),
            checkpoint.part("codec", Codec),
        )
        said = checkpoint.prompts
        return cls(denoiser, conditioning, codec, sampler, guidance, prompts=said)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: torch.device | str = "cpu", trust: Sequence[str] = ()
    ) -> "Generator":
        """The generator of an exported model: a folder, or OWNER/NAME on the Hugging Face hub.

        Raises:
            UserError: It is none of ours, was changed or is of a later version, or its text
                encoder is not the one it was trained with.
        """
        return cls.from_checkpoint(exported.find(name), device, trust)

    def save_pretrained(self, folder: str | Path) -> None:
        """Export the model into a folder that holds none, with its parts as they were made: set
        another sampler or guidance, and not an attribute of it.

        Raises:
            UserError: The folder holds a model, or a part cannot be described.
        """
        parts = self.denoiser, self.codec, self.conditioning, self.sampler, self.guidance
        said = about(*parts, prompts=self.prompts)
        exported.save(folder, said, self.denoiser.state_dict())

    def push_to_hub(self, repo_id: str, private: bool = True, token: str | None = None) -> str:
        """Upload the model to the Hugging Face hub as OWNER/NAME; returns its address there.

        Raises:
            UserError: The hub cannot be reached, or refuses it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return exported.push(folder, repo_id, private, token)

    @property
    def device(self) -> torch.device:
        """The device of the denoiser's weights."""
        return next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))

    def embed(self, values: Sequence[Any]) -> Condition | None:
        """u for each value, on the device.

        Each distinct value is embedded by itself: to the last bit, a picture must not depend on
        its neighbours.
        """
        if self.conditioning is None:
            return None
        known = {value: self.conditioning.embed([value]) for value in dict.fromkeys(values)}
        return Condition.stack([known[value] for value in values]).to(self.device)

    def __call__(
        self,
        values: Sequence[Any],
        seeds: Sequence[int],
        micro_batch: int = 16,
        progress: Callable[[State], object] | None = None,
    ) -> Iterator[Tensor]:
        """Draw one row for each value.

        Arguments:
            values: What to condition on: prompts, class names, vectors as tuples, each with a
                picture as a `Given`; ignored by an unconditional model.
            seeds: The seed of each.
            micro_batch: How many are drawn together. Memory grows with it.
            progress: Called with the state after each step of the sampler, `sampler.steps` times
                in each of the :meth:`rounds`.

        Yields:
            The rows of each micro-batch in turn, up to micro_batch of them.
        """
        return map(self.codec.decode, self.draw(values, seeds, micro_batch, progress))

    def draw(
        self,
        values: Sequence[Any],
        seeds: Sequence[int],
        micro_batch: int = 16,
        progress: Callable[[State], object] | None = None,
    ) -> Iterator[Tensor]:
        """Draw as `__call__` does, and yield x itself, (up to micro_batch, \\*shape)."""
        if isinstance(values, str) or len(values) != len(seeds):
            told = f"the text {values!r}" if isinstance(values, str) else f"{len(values)} values"
            raise UserError(
                f"A Generator was given {told} and {len(seeds)} seeds; give a list of values, "
                'such as ["a cat"], and a seed for each.'
            )
        denoiser, (rank, world) = self.guided(), self.place()
        index = {value: k for k, value in enumerate(dict.fromkeys(values))}
        table = self.embed(list(index))
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            for start in range(0, len(values), micro_batch * world):
                own = start + rank * micro_batch
                rows = [min(i, len(values) - 1) for i in range(own, own + micro_batch)]
                like = torch.empty(micro_batch, *self.codec.shape, device=self.device)
                u = None if table is None else table[[index[values[i]] for i in rows]]
                noise = PictureNoise([seeds[i] for i in rows])
                x = self.sampler(denoiser, like, u, noise, progress)
                drawn = gather(x) if world > 1 else x
                if not (drawn.abs() < ABSURD).all():  # or no number, in any process
                    raise UserError(self.not_finite())
                yield from drawn[: len(values) - start].split(micro_batch)
        finally:
            self.denoiser.train(training)

    def guided(self) -> Denoiser:
        """The denoiser as it is guided; whatever the guidance refuses is said here."""
        guidance, conditioning = self.guidance, self.conditioning
        if guidance is None or (conditioning is None and guidance.needs_condition):
            return self.denoiser
        if conditioning is None:
            return guidance(self.denoiser, None)
        no, guidance.blocks = guidance.negative, conditioning.blocks
        null = conditioning.null() if no is None else conditioning.embed([no])
        others = [conditioning.embed([one]) for one in guidance.others]
        return guidance(self.denoiser, Condition.stack([null, *others]).to(self.device))

    def given(self, prompt: Any, picture: Image.Image) -> Given:
        """What is drawn from, of a prompt and a person's picture in RGBA; `ValueError` where the
        model takes none, or not this one.
        """
        if not isinstance(self.conditioning, Picture):
            raise ValueError("the model was trained without a picture as its condition")
        rows, known = self.conditioning.read(picture)
        return Given(prompt, self.conditioning(self.codec.encode(rows), known)[0])

    def sheet(
        self, rows: Iterable[Tensor], values: Sequence[Any], columns: int
    ) -> Image.Image | None:
        """Rows at one look, before those of a picture what is known of it, and grey."""
        cells, last = list[tuple[Tensor, str]](), None
        for row, value in zip(rows, values, strict=True):
            if isinstance(value, Given) and value is not last:
                known = self.codec.decode(value.planes[:-1].expand(self.codec.shape))
                cells.append((known, "given"))
            cells.append((row.cpu(), str(value)))
            last = value
        pictures, captions = zip(*cells, strict=True)
        return self.codec.sheet(torch.stack(pictures), captions, columns)

    def not_finite(self) -> str:
        scale = getattr(self.guidance, "scale", None)
        guided = "" if scale is None else f", or its guidance scale {scale:g} is too large"
        return (
            f"{type(self.sampler).__name__} gave numbers that are not finite, or absurdly large, "
            f"and nothing is made of them: the model has diverged in training{guided}; draw from "
            f"an earlier checkpoint{'' if scale is None else ', or with a smaller --scale'}."
        )

    def place(self) -> tuple[int, int]:
        """The rank of this process among those that draw together, and their number."""
        return place() if self.together else (0, 1)

    def rounds(self, number: int, micro_batch: int = 16) -> int:
        """How often the sampler runs, in each process, to draw so many."""
        return -(-number // (micro_batch * self.place()[1]))


class Bar(tqdm):
    """A bar over the steps of a sampler, which notes what they accept; only the first process
    shows one.
    """

    steps: int
    accepted: list[Tensor | None]

    @classmethod
    def over(cls, generator: Generator, number: int, micro_batch: int) -> "Bar":
        """A bar for so many rows."""
        rounds, steps = generator.rounds(number, micro_batch), generator.sampler.steps
        bar = cls(
            total=rounds * steps,
            desc="Drawing",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log wants few lines
            disable=generator.place()[0] > 0,
        )
        bar.steps, bar.accepted = steps, []
        return bar

    def watch(self, state: State) -> None:
        self.update()
        self.accepted.append(None if state.acceptance is None else state.acceptance.mean())

    def acceptance(self) -> dict[str, Any]:
        """The mean acceptance of each step that proposes, for the manifest."""
        of_each = [self.accepted[i :: self.steps] for i in range(self.steps)]
        known = [[a for a in one if a is not None] for one in of_each]
        means = [round(torch.stack(one).mean().item(), 4) for one in known if one]
        return {"acceptance": means} if means else {}
