"""A sweep: every model with every way to draw from it, each point measured once."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.checkpoint import Checkpoint
from pipeline.data import DataModule
from pipeline.distributed import first, place
from pipeline.errors import UserError
from pipeline.evaluation.adherence import CLIP
from pipeline.evaluation.features import Features
from pipeline.evaluation.measure import FEWEST, Measure, bits_of_held_out
from pipeline.evaluation.store import Store
from pipeline.files import digest
from pipeline.generator import Bar, Generator
from pipeline.samplers import Likelihood

__all__ = ["Model", "Protocol", "Sweep", "over"]

VERSION = 2  # of what a result says: raise it when the same pictures would score otherwise


@dataclass(frozen=True)
class Protocol:
    """How models are measured.

    Arguments:
        number: The number N of pictures, at least 6.
        seed: The seed of the first picture.
        seeds: How often N pictures are drawn, each time with the next N seeds.
        micro_batch: How many are drawn together.
        likelihood: How many true pictures' likelihood is taken, at least 2; `None` for none.
        ladder: Whether true pictures made worse are measured too.

    Raises:
        UserError: A number is too small.
    """

    number: int
    seed: int = 0
    seeds: int = 1
    micro_batch: int = 16
    likelihood: int | None = None
    ladder: bool = False

    def __post_init__(self) -> None:
        if self.number < FEWEST or self.seeds < 1:
            raise UserError(
                f"--number {self.number} must be at least {FEWEST}, and --seeds {self.seeds} at "
                "least 1."
            )
        if self.likelihood is not None and self.likelihood < 2:
            raise UserError(
                f"--likelihood {self.likelihood} must be at least 2: one picture shows no error."
            )


class Sweep:
    """What all points share, and the measures of the data that were opened."""

    def __init__(
        self, protocol: Protocol, features: Features, clip: CLIP | None, store: Store, command: str
    ) -> None:
        self.protocol, self.features, self.clip = protocol, features, clip
        self.store, self.command, self.likelihood = store, command, Likelihood()
        self.measures: dict[str, Measure] = {}

    def measure(self, checkpoint: Checkpoint) -> Measure:
        """What measures models of the data of a checkpoint; made once for each data."""
        about = checkpoint.about
        key = digest(about["data"], about["conditioning"])
        if key not in self.measures:
            data = checkpoint.data(DataModule)  # type: ignore[type-abstract]
            if not data.codec.pictures:
                raise UserError(
                    f"The model was trained on {type(data).__name__}, whose rows are "
                    f"{data.codec.plural} of {math.prod(data.shape)} numbers, and evaluate "
                    "measures pictures."
                )
            self.measures[key] = Measure(data, self.features, self.protocol.number, self.clip)
        return self.measures[key]

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """All that decides the results of a model, but how it is drawn from."""
        told = asdict(self.protocol)
        found = {"sha256": checkpoint.sha256, "pictures": told["number"]}
        found |= {key: told[key] for key in ("seed", "seeds", "micro_batch")}
        found["features"] = self.features.fingerprint()
        found["clip"] = self.clip and self.clip.fingerprint()
        found["version"] = VERSION
        if self.protocol.ladder:
            found["ladder"] = True
        if self.protocol.likelihood is not None:
            found["likelihood"] = {
                "pictures": self.protocol.likelihood,
                "steps": self.likelihood.path.steps,
                "probes": self.likelihood.probes,
            }
        return found


class Model:
    """A model in a sweep.

    Arguments:
        generator: What draws from it; sampler and guidance may change between points.
    """

    def __init__(self, checkpoint: Checkpoint, generator: Generator, sweep: Sweep) -> None:
        self.checkpoint, self.generator, self.sweep = checkpoint, generator, sweep
        self.settings = sweep.settings(checkpoint)

    def point(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The result as the model is drawn from now; from its file where it was finished."""
        store, settings = self.sweep.store, chosen | self.settings
        result = first(lambda: store.find(settings))
        if result is None:
            of_true = self.bits  # first, for it may ask for more pictures than there are
            scores, pictures, prompts = self.scores()
            result = {"key": digest(settings), "checkpoint": str(self.checkpoint.path)}
            result |= {**settings, **scores, **of_true, "device": str(self.generator.device)}
            result["command"] = self.sweep.command
            if place()[0] == 0:
                sheet = self.generator.codec.sheet(pictures[:64], prompts[:64], 8)
                store.keep(settings, result, sheet)
        return result

    def scores(self) -> tuple[dict[str, Any], Tensor, list[str]]:
        """The scores, their mean where there are several seeds; the last pictures and prompts."""
        protocol, measure = self.sweep.protocol, self.sweep.measure(self.checkpoint)
        number, b, sampler = protocol.number, protocol.micro_batch, self.generator.sampler
        floor = measure.floor  # first: what cannot be scored is not drawn
        start, repeats, pictures, prompts = time.perf_counter(), [], torch.empty(0), []
        with counted(self.generator) as calls:
            for k in range(protocol.seeds):
                seed = protocol.seed + k * number
                with Bar.over(self.generator, number, b) as bar:
                    bar.set_description(f"{type(sampler).__name__} {sampler.steps}, seed {seed}")
                    scores, pictures, prompts = measure(self.generator, seed, b, bar.watch)
                repeats.append(scores)
        drawn = protocol.seeds * self.generator.rounds(number, b) * b
        result = over(repeats, statistics.fmean) | {
            "spread": over(repeats, statistics.stdev) if protocol.seeds > 1 else None,
            "repeats": repeats,
            "evaluations": sum(calls) / drawn,
            "seconds": time.perf_counter() - start,
            "floor": floor,
            "reference": measure.reference.about,
        }
        if protocol.ladder:
            result["ladder"] = measure.ladder
        return result, pictures, prompts

    @cached_property
    def bits(self) -> dict[str, float]:
        """If asked for, the bits for each value of true pictures: mean and its standard error."""
        protocol, generator = self.sweep.protocol, self.generator
        if protocol.likelihood is None:
            return {}
        data, n = self.sweep.measure(self.checkpoint).data, protocol.likelihood
        b, seed = protocol.micro_batch, protocol.seed
        rounds, silent = generator.rounds(n, b), True if generator.place()[0] > 0 else None
        with tqdm(total=rounds, desc="Likelihood", unit="batch", disable=silent) as bar:
            bits = bits_of_held_out(generator, data, n, self.sweep.likelihood, seed, b, bar.update)
        error = bits.std().item() / math.sqrt(n)
        return {"bits_per_dim": bits.mean().item(), "bits_per_dim_error": error}


def over(trees: list[Any], what: Callable[[list[float]], float]) -> Any:
    """A statistic of each number of equal dictionaries, at any depth; `None` where one is."""
    if isinstance(trees[0], dict):
        return {key: over([tree[key] for tree in trees], what) for key in trees[0]}
    if None in trees:  # what could not be told once is not told
        return None
    return what(trees)


@contextmanager
def counted(generator: Generator) -> Iterator[list[int]]:
    """How many rows the network is given in each call."""
    calls: list[int] = []
    network: Any = generator.denoiser.network
    hook = network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    try:
        yield calls
    finally:
        hook.remove()
