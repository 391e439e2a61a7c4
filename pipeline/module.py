"""Training: a batch, an objective, an optimizer."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from pipeline.checkpoint import about
from pipeline.data import Batch, DataModule
from pipeline.denoisers import Preconditioned
from pipeline.distributed import assembled, share
from pipeline.errors import UserError
from pipeline.generator import Generator
from pipeline.guidance import Guidance
from pipeline.noise import Noise, mix
from pipeline.objectives import Objective
from pipeline.samplers import Sampler

__all__ = ["Diverged", "ScoreModule"]

MOST_SKIPPED = 20  # steps in a row whose loss or gradient is not finite


class Diverged(UserError):
    """A run whose numbers are not finite any more."""


class ScoreModule(pl.LightningModule):
    r"""Trains a denoiser, and so the conditional score :math:`\phi(x \mid u)`.

    The noise, the levels and the condition dropout of a step are functions of (seed, batches seen,
    index in the global batch): a resumed run is the same run, and two devices draw what one would.

    A step whose loss or gradient is not finite, on any device, moves nothing; such steps are
    counted ("train/skipped"), and 20 in a row end the run.

    Arguments:
        denoiser: The denoiser that is trained.
        objective: What is minimised.
        sampler: How samples are drawn while training, and by default afterwards. It is not part of
            the model.
        guidance: How those samples are guided, likewise.
        optimizer: Makes the optimizer from the parameters.
        condition_dropout: The share of examples whose tokens of u are replaced by those of the
            null condition, in [0, 1). Of a condition of several parts so many also lose each part
            by itself.
        planes_dropout: The share whose planes of u are, likewise and independently.
        warmup: The number of steps over which the learning rate rises from 0; it then falls to 0
            as half a cosine over the steps of the run, or stays where it is if the run has no end.
        seed: Decides all that is drawn in training.
    """

    def __init__(
        self,
        denoiser: Preconditioned,
        objective: Objective,
        sampler: Sampler,
        guidance: Guidance | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
        condition_dropout: float = 0.1,
        planes_dropout: float = 0.1,
        warmup: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (0 <= condition_dropout < 1 and 0 <= planes_dropout < 1):
            raise ValueError(
                f"condition_dropout = {condition_dropout} and planes_dropout = {planes_dropout} "
                "must lie in [0, 1): they are shares of examples."
            )
        self.denoiser, self.objective = denoiser, objective
        self.sampler, self.guidance = sampler, guidance
        self.optimizer = optimizer
        self.dropout = {"tokens": condition_dropout, "planes": planes_dropout}
        self.warmup, self.seed = warmup, seed
        self.blocks: Sequence[slice] = ()  # of the parts of a condition of several
        self.begun = False
        self.skipped = torch.zeros(2, dtype=torch.int64)  # steps: in a row until now, and in all
        self.length = torch.zeros(())  # of the gradient
        self.description: dict[str, Any] = {}  # what checkpoints say of the model

    @property
    def batches_seen(self) -> int:
        """The number of batches whose step is complete, accumulated ones counted one by one."""
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed

    def noise(self, *key: int | str, n: int) -> Noise:
        """The randomness of this device's n rows of a global batch."""
        rank, world = share(self.trainer)
        return Noise(self.seed, *key, device=self.device, rows=(rank * n, world * n))

    def configure_model(self) -> None:
        """Share the weights out where the strategy is `pipeline.engines.FSDP`."""
        if self.device_mesh is not None:
            from pipeline.engines import shard

            shard(self.denoiser, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Check that x and u are what the network takes, and find what checkpoints will say."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, DataModule):
            return  # whoever trains on batches of their own writes checkpoints of their own
        for name, have in data.sizes().items():
            want = getattr(self.denoiser.network, name, have)
            if want != have:
                raise UserError(
                    f"The network takes {name} = {want} and the data give {have}: set "
                    f"model.denoiser.network.{name} to {have}, or to null."
                )
        parts = (self.denoiser, data.codec, data.conditioning, self.sampler, self.guidance)
        self.description = about(*parts, data=data, prompts=data.prompts())
        self.blocks = [*data.conditioning.blocks.values()] if data.conditioning else []

    def on_train_start(self) -> None:
        """Let a run that goes on do so with the optimizer it is told, and count anew."""
        self.begun, self.skipped = True, self.skipped.to(self.device)
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            for group, told, factor in zip(
                schedule.optimizer.param_groups, self.told, schedule.lr_lambdas, strict=True
            ):
                group |= told | {"initial_lr": told["lr"]}
                group["lr"] = told["lr"] * factor(schedule.last_epoch)
            schedule.base_lrs = [told["lr"] for told in self.told]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        seen, n = self.batches_seen, len(batch.x)
        self.reseed(mix(self.seed, seen, self.global_rank))
        noise = self.noise("train", seen, n=n)
        u = batch.u
        for part, share_of in self.dropout.items():
            if share_of and batch.u_null is not None and getattr(u, part, None) is not None:
                u = u.replaced(batch.u_null, noise.uniform(n) < share_of, part)  # type: ignore
        for block in self.blocks if u is not None and self.dropout["tokens"] else ():
            u = u.without(block, noise.uniform(n) < self.dropout["tokens"])  # type: ignore
        loss = self.objective(self.denoiser, batch.x, u, noise).mean()
        if self.written(self.trainer.global_step + 1):
            self.log("train/loss", loss, prog_bar=True)
        # 1, or NaN where the loss is not finite: then the gradient is not either, on all devices
        return loss * (1 + (loss.detach() - loss.detach()))

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if self.written(self.trainer.global_step):
            self.check_finite()
            self.log("train/gradient", self.length)
            self.log("train/skipped", self.skipped[1].float())

    def written(self, step: int) -> bool:
        """Whether the loggers are told of this step."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and step % every == 0

    def check_finite(self) -> None:
        """End the run where so many steps in a row were skipped, or where a weight is not finite.

        Raises:
            Diverged: So it is.
        """
        norm = length(p.detach() for p in self.denoiser.parameters())
        diverged = bool((self.skipped[0] >= MOST_SKIPPED) | ~norm.isfinite())
        if self.trainer.strategy.reduce_boolean_decision(diverged, all=False):
            raise Diverged(
                f"Training has diverged at step {self.trainer.global_step}: a weight, or the loss "
                f"or gradient of the last {int(self.skipped[0])} steps, is not finite. The "
                "checkpoints are of before. Start again with a smaller --model.optimizer.lr, or "
                "with clipping (--trainer.gradient_clip_val 1)."
            )

    def reseed(self, seed: int) -> None:
        """Seed the generator that layers draw from, such as dropout.

        Not `torch.manual_seed`: without a GPU it keeps a stack trace of each call for later.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        r"""Scale the gradient g to norm c = gradient_clip_val where it is longer, and let no
        gradient move anything that is not finite.

        .. math:: g \leftarrow g \, / \max(1, \|g\| / c)

        A fused optimizer divides by that number while it reads the gradient, and skips the step by
        itself: no pass over the memory for it, no word to the host. From another the gradient is
        taken away, which the host has to know of.
        """
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = length(p.grad for p in trained if p.grad is not None)
        bad, self.length = ~norm.isfinite(), norm.float()
        self.skipped = torch.stack(((self.skipped[0] + 1) * bad, self.skipped[1] + bad))
        told: Any = optimizer
        fused = optimizer.defaults.get("fused")
        if fused and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            told.grad_scale = (self.length / gradient_clip_val).clamp(min=1.0)
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if fused:
            told.found_inf = bad.float()
        elif bad:
            for p in trained:
                p.grad = None

    def on_validation_epoch_start(self) -> None:
        bands = max(len(self.objective.bands), 1)
        # losses, examples
        self.total = torch.zeros(2, bands, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        noise = self.noise("validate", batch_idx, n=len(batch.x))
        loss, band = self.objective.validate(self.denoiser, batch.x, batch.u, noise)
        self.total[0].index_add_(0, band, (loss * batch.weight).double())
        self.total[1].index_add_(0, band, batch.weight.double())

    def on_validation_epoch_end(self) -> None:
        losses, examples = self.trainer.strategy.reduce(self.total, reduce_op="sum")
        if not self.trainer.sanity_checking and not losses.isfinite().all():
            raise Diverged(
                f"Training has diverged at step {self.trainer.global_step}: the validation loss "
                "is not finite. Start again with a smaller learning rate (--model.optimizer.lr)."
            )
        self.log("val/loss", losses.sum() / examples.sum(), prog_bar=True, rank_zero_only=False)
        for name, loss, count in zip(self.objective.bands, losses, examples, strict=False):
            self.log(f"val/{name}", loss / count.clamp(min=1))

    def generator(self, data: DataModule, together: bool = False) -> Generator:
        """What draws with the weights as they are now; see `Generator`."""
        parts = (self.denoiser, data.conditioning, data.codec, self.sampler, self.guidance)
        return Generator(*parts, together)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(self.denoiser.parameters())
        # what the run is told now, before a checkpoint brings what it was told then
        self.told = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        steps, warmup = self.trainer.estimated_stepping_batches, self.warmup

        def factor(step: int) -> float:
            rise = min((step + 1) / max(warmup, 1), 1.0)
            return rise * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        how = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": how}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the model is; a model that has diverged is not saved."""
        if self.begun:
            self.check_finite()
        checkpoint["skipped"] = self.skipped.tolist()
        checkpoint["objective"] = self.objective.state()
        if self.description:
            checkpoint["pipeline"] = self.description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = torch.tensor(checkpoint.get("skipped", [0, 0]))
        self.objective.load(checkpoint.get("objective", {}))


def length(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together."""
    return assembled(torch.nn.utils.get_total_norm(list(tensors)))
