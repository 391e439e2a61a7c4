"""Scores while a model trains."""

import time
from typing import Any

import lightning.pytorch as pl

from pipeline.evaluation.features import EfficientNetLite0, Features
from pipeline.evaluation.measure import DISTANCES, FEWEST, Measure
from pipeline.module import ScoreModule

__all__ = ["Evaluation"]


class Evaluation(pl.Callback):
    """Scores the averaged weights at validation, as `python -m pipeline evaluate` does: always the
    same number of pictures with the same seeds, so that scores compare.

    The first validation is always scored, and a later one if what was spent, and what the last
    score cost once more, is within its share of the time spent on all else since training began.
    The clock is that of the first process.

    Logged are the scores of :class:`pipeline.evaluation.measure.Measure`, the distances with the
    length of the features in their name (`eval/frechet_112`, `eval/kernel_112`, …), and so the
    Inception score where the features have classes, the distance of true pictures beside the
    Fréchet distance (`eval/frechet_112_floor`), on the built-in shapes `eval/accuracy`, and what
    it cost, `eval/seconds`. A `ModelCheckpoint` that monitors one of them keeps the best; a
    validation that is not scored does not count for it. Loggers that take tables are given one,
    `evaluation`: each score beside that of true pictures, each attribute beside that of shuffled
    prompts.

    Data that are not pictures are not scored.

    Arguments:
        number: How many pictures, at least 6.
        features: What reads them; EfficientNet-Lite0 with 112 features by default.
        share: The seconds that may be spent for each second of training, positive.
        micro_batch: How many pictures are drawn together.
        seed: The seed of the first picture.
    """

    def __init__(
        self,
        number: int = 256,
        features: Features | None = None,
        share: float = 0.1,
        micro_batch: int = 16,
        seed: int = 0,
    ) -> None:
        if number < FEWEST or micro_batch < 1:
            raise ValueError(
                f"number = {number} must be at least {FEWEST} and micro_batch = {micro_batch} at "
                "least 1."
            )
        if not share > 0:
            raise ValueError(f"share = {share} must be positive; 0.1 is a tenth of the time.")
        self.number, self.share = number, share
        self.features = features or EfficientNetLite0()
        self.micro_batch, self.seed = micro_batch, seed
        self.measure: Measure | None = None
        self.scores: dict[str, Any] = {}
        self.start, self.spent, self.last = time.monotonic(), 0.0, 0.0  # until training begins

    def on_fit_start(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.codec.pictures:
            self.measure = Measure(data, self.features.to(pl_module.device), self.number)
            self.floor = self.measure.floor["frechet"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        self.start, self.spent, self.last = time.monotonic(), 0.0, 0.0

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        if self.measure is None or trainer.sanity_checking:
            return
        start = time.monotonic()
        trained = start - self.start - self.spent
        due = self.spent + self.last <= self.share * trained
        if not trainer.strategy.broadcast(due):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        generator = pl_module.generator(data, together=True)
        scores, _, _ = self.measure(generator, self.seed, self.micro_batch)
        dim = self.features.dim
        names = [name for name in (*DISTANCES, "inception_score") if name in scores]
        said = {f"{name}_{dim}": scores[name] for name in names}
        said[f"frechet_{dim}_floor"] = self.floor
        if "accuracy" in scores:
            said |= {"accuracy": scores["accuracy"]["mean"], "all": scores["accuracy"]["all"]}
        self.last = time.monotonic() - start
        self.spent += self.last
        for name, value in (said | {"seconds": self.last}).items():
            pl_module.log(f"eval/{name}", value, batch_size=1, sync_dist=True)
        self.scores = scores

    def on_validation_end(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        scores, self.scores = self.scores, {}
        if self.measure is None or not scores:
            return
        true, read = self.measure.floor, scores.get("accuracy", {})
        told = [name for name in (*DISTANCES, "inception_score") if name in scores]
        rows = [[name, scores[name], true.get(name), None] for name in told]
        of_true = true.get("accuracy", {})
        rows += [[k, read[k], of_true.get(k), scores["shuffled"][k]] for k in read]
        columns = ["score", "drawn", "true pictures", "prompts shuffled"]
        takers: list[Any] = [one for one in trainer.loggers if hasattr(one, "log_table")]
        for logger in takers:
            logger.log_table("evaluation", columns, rows, step=trainer.global_step)
