r"""How good the pictures of a model are: the one measure that `evaluate` and training share.

A model is asked for what its data hold out: the combinations of the built-in shapes that training
never saw, else the rows of the split `val`, each once before any twice. What it draws is compared
with a *reference*, features of the training pictures, and so are true pictures of as many held-out
rows: no model can be expected to be nearer than this *floor*, which is far from 0 while pictures
are few. Where there are fewer held-out rows, the floor is that of all of them, and says so.
"""

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pipeline.codec import Pixels
from pipeline.conditioning import Given
from pipeline.data import DataModule
from pipeline.distributed import gather, in_turn, place, total
from pipeline.errors import UserError
from pipeline.evaluation import adherence, distances
from pipeline.evaluation.adherence import CLIP
from pipeline.evaluation.features import Features
from pipeline.evaluation.judge import judge_of
from pipeline.evaluation.reference import reference_of
from pipeline.evaluation.statistics import Statistics, by_class
from pipeline.generator import Generator
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers import Likelihood, State

__all__ = ["DISTANCES", "FEWEST", "Measure", "bits_of_held_out", "read"]

DISTANCES = ("frechet", "kernel", "precision", "recall", "density", "coverage")
FEWEST = 6  # pictures: density and coverage look at the fifth neighbour
TIMES = 10  # training pictures in a reference for each that is drawn
KEPT = 10_000  # pictures whose features are compared one by one
SPLITS = 10  # of the Inception score, as published
BATCH = 64  # pictures read together
LEVELS = (1, 2, 4, 8)  # of noise, in the ladder


class Measure:
    """Draws held-out prompts and scores the pictures.

    Where processes draw together, each reads the features of its share, and all have the scores.

    Arguments:
        number: The number N of pictures, at least `FEWEST`. They are held in memory, as uint8.
        clip: Scores prompts too, where it is given.

    Attributes:
        reference: Of ten times as many training pictures, or of all.
    """

    def __init__(
        self, data: DataModule, features: Features, number: int, clip: CLIP | None = None
    ) -> None:
        self.data, self.features, self.number, self.clip = data, features, number, clip
        taken = min(TIMES * number, len(data.rows("train").x))
        self.reference = in_turn(lambda: reference_of(data, "train", features, taken)[0])
        self.values, self.truth = data.held_out(number)
        self.judge = in_turn(lambda: judge_of(data, features.device))
        rows, labels = data.asked(number), data.labelled("val")
        self.wanted = {name: [column[k] for k in rows] for name, column in labels.items()}
        if len(self.truth) < 2:
            raise UserError(
                "The data hold out one picture, and the distance of true pictures needs at least "
                "2: give --data.val_split a split of its own when training, or more pictures."
            )

    def __call__(
        self,
        generator: Generator,
        seed: int = 0,
        micro_batch: int = 16,
        progress: Callable[[State], object] | None = None,
    ) -> tuple[dict[str, Any], Tensor, list[str]]:
        """Draw picture i with seed `seed` + i, and score.

        Arguments:
            seed: The first seed. On the built-in shapes it decides the order of prompts too.
            progress: Called with the state after each step of the sampler.

        Returns:
            What :meth:`score` says and, where the data can be read back, what
            :func:`pipeline.evaluation.adherence.shapes_adherence` or a judge does; the uint8
            pictures (N, C, H, W); their prompts.
        """
        pictured = isinstance(self.values[0], Given)  # whose prompts are in the order of `truth`
        order = np.random.default_rng(0 if pictured else seed)
        wanted = self.data.wanted(self.number, order)
        values = self.values
        if wanted is not None and not pictured:
            values = [one.caption for one in wanted]
        drawn = generator(values, range(seed, seed + self.number), micro_batch, progress)
        pictures = torch.cat([rows.cpu() for rows in drawn])
        found: dict[str, Any] = {}
        if wanted is not None:
            found = adherence.shapes_adherence(pictures, wanted, order)
        found |= self.judged(pictures, order)
        return found | self.score(pictures, values), pictures, list(map(str, values))

    def judged(self, pictures: Tensor, order: np.random.Generator) -> dict[str, Any]:
        """What the judge reads in pictures of the first prompts, where the data have labels."""
        if self.judge is None:
            return {}
        wanted = {name: column[: len(pictures)] for name, column in self.wanted.items()}
        values = {name: len(known) for name, known in self.judge.values.items()}
        return adherence.adherence(self.judge.read(pictures), wanted, values, order)

    @cached_property
    def floor(self) -> dict[str, Any]:
        """The scores of `number` true held-out pictures, or of as many as there are."""
        n, judged = len(self.truth), self.judged(self.truth, np.random.default_rng(0))
        judged = {"accuracy": judged["accuracy"]} if judged else {}
        return {"number": n} | judged | self.score(self.truth, self.values[:n])

    @cached_property
    def ladder(self) -> dict[str, float]:
        """The Fréchet distances of the floor's pictures, each made worse in one way."""
        x, noise = self.truth.float(), Noise("ladder")
        worse = {}
        for levels in LEVELS:
            name = f"with noise of {levels} grey level{'s' if levels > 1 else ''}"
            worse[name] = x + levels * noise.normal(x)
        worse["blurred, 3 × 3"] = avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        found = {}
        for name, y in worse.items():
            statistics, _ = read(self.features, y.round().clamp(0, 255).byte())
            found[name] = distances.frechet(statistics, self.reference.statistics)
        return found

    def score(self, pictures: Tensor, values: list[Any]) -> dict[str, Any]:
        """Distances of uint8 pictures (N, C, H, W) from the reference: Fréchet, kernel with the
        ends of its 95 % interval, precision, recall, density and coverage; with CLIP, the mean
        score of a picture with its prompt, and the part of them that finds its own among all.

        Kernel to coverage take at most 10,000 pictures, and as many of the reference; precision to
        coverage are left out where these are fewer than 6.

        Where the network of the features has classes, the Inception score: its mean over ten
        splits, and its standard deviation over them. Only that of Inception-v3 may be compared
        with published ones, and these are of 50,000 pictures.

        Where the prompts are classes, the Fréchet distance within each, if each has more pictures
        than a feature has numbers, here and among those whose features the reference keeps.
        """
        statistics, of_all = read(self.features, pictures)
        y = of_all[:KEPT]
        order = Noise("reference").uniform(len(self.reference.features)).argsort()
        x = self.reference.features[order[: len(y)]].to(y.device)
        kernel = distances.kernel_distance(x, y, Noise("resamples"))
        found: dict[str, Any] = {
            "frechet": distances.frechet(statistics, self.reference.statistics),
            "kernel": kernel.value,
            "kernel_low": kernel.low,
            "kernel_high": kernel.high,
        }
        if min(len(x), len(y)) >= FEWEST:  # each needs some neighbours
            found |= distances.precision_recall(x, y)._asdict()
            found |= distances.density_coverage(x, y)._asdict()
        if self.features.classified:
            logits, noise = self.features.logits(of_all), Noise("splits")
            mean, deviation = distances.inception_score(logits, noise, min(SPLITS, len(logits)))
            found |= {"inception_score": mean, "inception_score_deviation": deviation}
        if each := self.within_classes(of_all, values):
            found["frechet_by_class"] = each
        if self.clip is not None:
            prompts, own = adherence.distinct(list(map(str, values)))
            (_, f), g = read(self.clip, pictures), self.clip.embed(prompts)
            scores = adherence.clip_score(f, g[own.to(g.device)])
            found["clip_score"] = scores.mean().item()
            if len(prompts) > 1:
                found["retrieval"] = adherence.retrieval_accuracy(f, g, own)[0]
        return found

    def within_classes(self, features: Tensor, values: list[Any]) -> dict[str, float]:
        """The Fréchet distance within each class, if all have enough pictures; see `score`."""
        known = self.data.rows("train").values
        labels = [] if known is None else [known[row] for row in self.reference.rows.tolist()]
        real, drawn = Counter(labels), Counter(values)
        if len(drawn) < 2 or any(min(real[k], n) <= self.features.dim for k, n in drawn.items()):
            return {}
        of_real = by_class(self.reference.features, labels)
        found = distances.frechet_by_class(of_real, by_class(features, values))
        return {str(label): value for label, value in found.items()}


def read(features: Features, pictures: Tensor) -> tuple[Statistics, Tensor]:
    """The statistics of the features of all pictures, and the features, with shape (N, D).

    Each process reads its share of the same uint8 pictures (N, C, H, W), and has the whole. What
    is read together does not depend on how many they are, so neither does a feature.
    """
    rank, world = place()
    statistics = Statistics(features.dim, features.device)
    kept = [torch.empty(0, features.dim, device=features.device)]
    rows = [torch.empty(0, dtype=torch.int64, device=features.device)]
    for start in range(rank * BATCH, len(pictures), world * BATCH):
        found = features(pictures[start : start + BATCH])
        statistics.update(found)
        kept.append(found)
        rows.append(start + torch.arange(len(found), device=features.device))
    order = gather(torch.cat(rows)).argsort()
    return statistics.reduce(), gather(torch.cat(kept))[order]


def bits_of_held_out(
    generator: Generator,
    data: DataModule,
    number: int,
    likelihood: Likelihood,
    seed: int = 0,
    micro_batch: int = 16,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    r"""Bits for each value of true pictures x given their conditions u, by the likelihood
    :math:`p(x \mid u)` of the denoiser as it was trained.

    Guidance has no part in it: unless its scale is 0 or 1, what it aims at is no normalised law.
    Where processes work together, each takes its share, and all have the bits of all. Picture k is
    dequantised, and its probes are drawn, with seed `seed` + k. `progress` is called after each
    micro-batch.

    Returns:
        What :meth:`pipeline.codec.Pixels.bits` says of each, with shape (K,) for `number` K.

    Raises:
        UserError: The data hold out fewer pictures.
    """
    values, truth = data.held_out(number)
    if len(truth) < number:
        raise UserError(
            f"--likelihood {number} is more than the {len(truth)} pictures that were held out of "
            "training; ask for no more than these."
        )
    codec, (rank, world) = generator.codec, place()
    assert isinstance(codec, Pixels)  # nothing else is measured
    bits = torch.zeros(number, device=generator.device)
    for start in range(rank * micro_batch, number, world * micro_batch):
        some = slice(start, min(start + micro_batch, number))
        noise = PictureNoise(range(seed + some.start, seed + some.stop))
        x = codec.dequantise(truth[some], noise).to(generator.device)
        log_prob = likelihood(generator.denoiser, x, generator.embed(values[some]), noise)
        bits[some] = codec.bits(log_prob)
        if progress is not None:
            progress()
    return total(bits)
