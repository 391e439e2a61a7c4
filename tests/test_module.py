"""Training: reproducible, resumable, the same on one device and on two."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import CALLBACKS, equal, fit, launch, read
from torch import Tensor, nn

from pipeline.callbacks import EMA, Precision
from pipeline.condition import Condition
from pipeline.conditioning import Classes
from pipeline.data import Batch, Points
from pipeline.denoisers import EDM
from pipeline.errors import UserError
from pipeline.mcmc import GaussianMixture
from pipeline.module import ScoreModule
from pipeline.networks import MLP, Network
from pipeline.noise import Noise
from pipeline.objectives import DSM, LogNormal
from pipeline.optimizers import MuonAdamW
from pipeline.samplers import DDIM
from pipeline.schedules import Rectified

STATE = ("state_dict", "averages", "optimizer_states", "lr_schedulers", "global_step")


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(equal(a[key], b[key]) for key in STATE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 batches that was not stopped."""
    return fit(tmp_path_factory.mktemp("whole") / "run")


def test_one_seed_one_run(whole: Path, tmp_path: Path) -> None:
    assert same(read(whole), read(fit(tmp_path / "run")))


def test_another_seed_another_run(whole: Path, tmp_path: Path) -> None:
    other = read(fit(tmp_path / "run", "--seed_everything", "1"))
    assert not equal(read(whole)["state_dict"], other["state_dict"])


class StopAt(pl.Callback):
    """Sends a signal, by default that of Ctrl-C, while a given batch is worked on."""

    def __init__(self, batch: int, signum: int | None = None) -> None:
        self.batch, self.signum = batch, signum

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            os.kill(os.getpid(), self.signum or signal.SIGINT)


def stop_at(batch: int, signum: int | None = None) -> list[dict[str, Any]]:
    how = {"batch": batch, "signum": signum}
    return [*CALLBACKS, {"class_path": "test_module.StopAt", "init_args": how}]


@pytest.mark.parametrize("batch", [0, 2, 3])  # the first; just before a validation; just after
def test_a_stopped_run_goes_on_as_if_it_had_not(
    whole: Path, tmp_path: Path, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert launch(run, callbacks=stop_at(batch)) == 128 + signal.SIGINT
    said = capsys.readouterr().err
    assert f"Stopped at step {batch + 1}" in said and f"fit --resume {run}" in said
    assert read(run)["global_step"] == batch + 1
    fit(run, "--ckpt_path", str(run / "last.ckpt"))
    assert same(read(whole), read(run))


def test_resume_across_epochs_and_accumulation(tmp_path: Path) -> None:
    # 192 rows in batches of 64: 3 batches a pass, 2 batches a step, so passes end inside of a step
    settings = ("--data.batch_size", "64", "--trainer.accumulate_grad_batches", "2")
    settings += ("--trainer.val_check_interval", "4")
    whole = read(fit(tmp_path / "whole" / "run", *settings, steps=5))
    for batch in (3, 4, 5, 6):
        run = tmp_path / str(batch) / "run"
        launch(run, *settings, callbacks=stop_at(batch), steps=5)
        fit(run, *settings, "--ckpt_path", str(run / "last.ckpt"), steps=5)
        assert same(whole, read(run)), f"stopped in batch {batch}"


def test_batches_differ_from_step_to_step(whole: Path, tmp_path: Path) -> None:
    """Were noise or order drawn again after a stop, this would be what resuming gives."""
    restarted = read(fit(tmp_path / "run", steps=3))
    assert not equal(read(whole)["state_dict"], restarted["state_dict"])


def module(**settings: Any) -> ScoreModule:
    torch.manual_seed(0)
    denoiser = EDM(MLP(2, 3, width=16, depth=1), Rectified())
    made = ScoreModule(denoiser, DSM(LogNormal()), DDIM(2), **settings)
    made.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return made


def place(made: ScoreModule, rank: int, world: int, seen: int = 5) -> ScoreModule:
    progress = SimpleNamespace(total=SimpleNamespace(processed=seen))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    shares = {"rank": rank, "num_replicas": world}
    made._trainer = SimpleNamespace(  # type: ignore
        global_rank=rank,
        distributed_sampler_kwargs=shares,
        fit_loop=loop,
        global_step=0,
        log_every_n_steps=1,
    )
    return made


def batch(n: int) -> Batch:
    noise = Noise("batch")
    x, u = noise.normal(torch.empty(n, 2)), noise.normal(torch.empty(n, 2, 3))
    return Batch(x, Condition(u), Condition(torch.zeros(1, 1, 3)), torch.ones(n))


def part(whole: Batch, rows: slice) -> Batch:
    return Batch(whole.x[rows], whole.u[rows], whole.u_null, whole.weight[rows])  # type: ignore


def test_two_devices_draw_what_one_would() -> None:
    """The mean of the losses on two halves, each on its own rank, is the loss of the whole."""
    made, data = module(condition_dropout=0.5), batch(8)
    with torch.no_grad():
        alone = place(made, 0, 1).training_step(data, 0)
        first = place(made, 0, 2).training_step(part(data, slice(0, 4)), 0)
        second = place(made, 1, 2).training_step(part(data, slice(4, 8)), 0)
    torch.testing.assert_close((first + second) / 2, alone)  # float32: order of summation only


def test_step_depends_on_batches_seen_only() -> None:
    made, data = module(), batch(8)
    with torch.no_grad():
        losses = [
            place(made, 0, 1, seen).training_step(data, i) for i, seen in enumerate((5, 5, 6))
        ]
    assert losses[0] == losses[1] != losses[2]


class Recorder(Network):
    """A network that keeps the conditions it was given."""

    u_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Condition] = []

    def forward(self, x: Tensor, level: Tensor, u: Condition) -> Tensor:
        self.seen.append(u)
        return self.weight * x


SUBSETS = ([False, False], [True, False], [False, True], [True, True])


def test_condition_dropout_rate() -> None:
    made = module(condition_dropout=0.25)
    made.denoiser.network = network = Recorder()
    with torch.no_grad():
        for seen in range(50):
            place(made, 0, 1, seen).training_step(batch(40), 0)
    dropped = (torch.stack([u.tokens for u in network.seen]) == 0).all(dim=(2, 3))
    # 2,000 draws: the standard error is sqrt(.25 · .75 / 2000) = 0.0097
    assert abs(dropped.float().mean() - 0.25) < 4 * 0.0097


def test_each_of_several_parts_is_dropped_by_itself() -> None:
    """All with share p, and of what is left each part with share p: every subset comes."""
    made = module(condition_dropout=0.25)
    made.denoiser.network = network = Recorder()
    made.blocks = [slice(0, 1), slice(1, 3)]
    with torch.no_grad():
        for seen in (*range(50), 0):
            place(made, 0, 1, seen).training_step(batch(40), 0)
    *all_but_last, last = [u.tokens for u in network.seen]
    assert torch.equal(last, all_but_last[0])  # a function of the batches seen
    tokens = torch.cat(all_but_last)[:, 0]
    gone = torch.stack([(tokens[:, block] == 0).all(dim=1) for block in made.blocks], dim=1)
    shares = [(gone == torch.tensor(which)).all(dim=1).float().mean() for which in SUBSETS]
    # 2,000 draws: a standard error is at most sqrt(.43 · .57 / 2000) = 0.011
    for share, expected in zip(shares, (0.4219, 0.1406, 0.1406, 0.2969), strict=True):
        assert abs(share - expected) < 4 * 0.011


def test_planes_and_tokens_are_dropped_each_by_itself() -> None:
    made, whole = module(condition_dropout=0.25, planes_dropout=0.5), batch(2000)
    u = Condition(whole.u.tokens, torch.ones(2000, 1, 2, 2))
    null = Condition(whole.u_null.tokens, torch.zeros(1, 1, 2, 2))
    made.denoiser.network = network = Recorder()
    with torch.no_grad():
        place(made, 0, 1).training_step(whole._replace(u=u, u_null=null), 0)
    (seen,) = network.seen
    tokens, planes = (seen.tokens == 0).all(dim=(1, 2)), (seen.planes == 0).all(dim=(1, 2, 3))
    for gone, share in ((tokens, 0.25), (planes, 0.5), (tokens & planes, 0.125)):
        assert abs(gone.float().mean() - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    assert torch.equal(seen.tokens[~tokens], u.tokens[~tokens]) and seen.planes[~planes].all()
    made = module(condition_dropout=0.25)  # the tokens of a model without planes fall as before
    made.denoiser.network = network
    with torch.no_grad():
        place(made, 0, 1).training_step(whole, 0)
    assert torch.equal((network.seen[1].tokens == 0).all(dim=(1, 2)), tokens)


def test_learning_rate_rises_and_falls_to_zero() -> None:
    made = module(warmup=4)
    made._trainer = SimpleNamespace(estimated_stepping_batches=20)  # type: ignore[assignment]
    configured = made.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    full = optimizer.defaults["lr"]
    assert rates[:4] == sorted(rates[:4]) and rates[0] == pytest.approx(full / 4)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_bad_dropout_is_an_error() -> None:
    for name in ("condition_dropout", "planes_dropout"):
        with pytest.raises(ValueError, match=f"{name} = 1.5"):
            module(**{name: 1.5})


def test_condition_of_another_width_is_one_sentence() -> None:
    made = module()
    mixture = GaussianMixture([[0.0, 0.0, 0.0]], [1.0])
    for conditioning, said in (
        (Classes(list("abcde")), "u_dim = 3 .* give 5"),
        (Classes(list("abc")), "x_dim = 2 .* give 3"),
    ):
        made._trainer = SimpleNamespace(datamodule=Points(mixture, conditioning))  # type: ignore
        with pytest.raises(UserError, match=said):
            made.on_fit_start()


def test_average_follows_the_weights() -> None:
    made, ema = module(), EMA(decay=0.5)
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, made)
    name, weight = next(iter(made.named_parameters()))
    before, after = weight.detach().clone(), weight.detach() + 1
    weight.data.copy_(after)
    ema.on_train_batch_end(trainer, made)  # no step was taken
    assert torch.equal(ema.average[name], before)
    trainer.global_step = 1
    ema.on_train_batch_end(trainer, made)
    decay = 2 / 11  # min(0.5, (1 + 1) / (10 + 1))
    torch.testing.assert_close(ema.average[name], decay * before + (1 - decay) * after)
    trainer.global_step = 1000
    ema.on_train_batch_end(trainer, made)
    torch.testing.assert_close(
        ema.average[name], 0.5 * (decay * before + (1 - decay) * after) + 0.5 * after
    )


def test_average_of_every_third_step_decays_by_three_steps() -> None:
    made, ema = module(), EMA(decay=0.5, every=3)
    trainer: Any = SimpleNamespace(global_step=998)
    ema.on_train_start(trainer, made)
    name, weight = next(iter(made.named_parameters()))
    before = weight.detach().clone()
    weight.data.add_(1)
    for step in (999, 1000, 1001):  # of these, 999 is a multiple of three
        trainer.global_step = step
        ema.on_train_batch_end(trainer, made)
    torch.testing.assert_close(ema.average[name], before / 8 + (before + 1) * 7 / 8)


@pytest.mark.parametrize("length", [0.3, 50.0])  # below the limit and above it
def test_fused_clipping_is_clipping(length: float) -> None:
    """The step of a fused optimizer is that on gradients which were clipped before."""
    steps = []
    for fused in (True, False):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(7))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        made = module()
        for k in range(2):
            direction = torch.arange(7.0) - k
            weight.grad = length * direction / direction.norm()
            if fused:
                made.configure_gradient_clipping(optimizer, 1.0)
            else:
                torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
        steps.append(weight.detach().clone())
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-6)  # clip_grad_norm_ adds 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: MuonAdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_a_step_whose_gradient_is_not_finite_moves_nothing(
    bad: float, clip: float | None, make: Callable[..., torch.optim.Optimizer]
) -> None:
    """And the steps after it are those that would have been without it."""
    found = []
    for spoilt in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(5))]
        optimizer, made = make(weights), module()
        made.trainer = pl.Trainer(logger=False, barebones=True)
        for k in range(4):
            for p in weights:
                p.grad = Noise(k, p.ndim).normal(p.detach())
            if k == 2:
                before = [p.detach().clone() for p in weights]
                if not spoilt:
                    continue
                weights[1].grad[3] = bad  # type: ignore[index]
            made.configure_gradient_clipping(optimizer, clip)
            optimizer.step()
            if k == 2:
                assert all(torch.equal(p, q) for p, q in zip(weights, before, strict=True))
                assert made.skipped.tolist() == [1, 1]
        assert made.skipped.tolist() == [0, spoilt]
        found.append(weights)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_a_loss_that_is_not_finite_spoils_its_gradient_and_another_one_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loss can be infinite where its gradient is not, and then the step is no step either."""
    made = module()
    monkeypatch.setattr(ScoreModule, "batches_seen", 0)
    made.trainer = pl.Trainer(logger=False, barebones=True)
    weight = next(made.parameters())
    for added in (0.0, torch.inf, torch.nan):
        monkeypatch.setattr(
            made,
            "objective",
            lambda denoiser, x, u, noise, added=added: weight.sum() * x.new_ones(2) + added,
        )
        loss = made.training_step(Batch(torch.zeros(2, 2), None, None, torch.ones(2)), 0)
        (gradient,) = torch.autograd.grad(loss, weight)
        expected = torch.ones_like(weight) if added == 0 else weight.new_full((), torch.nan)
        torch.testing.assert_close(
            gradient, expected.expand_as(gradient), rtol=0, atol=0, equal_nan=True
        )


def test_reseeding_decides_what_layers_draw_and_keeps_nothing() -> None:
    made = module()
    made.reseed(5)
    a = torch.rand(3)
    waiting = len(torch.cuda._queued_calls)
    made.reseed(5)
    assert torch.equal(a, torch.rand(3))
    assert len(torch.cuda._queued_calls) == waiting  # torch.manual_seed leaves a trace each time


def test_average_is_in_place_while_validating_and_never_saved_as_weights() -> None:
    made, ema = module(), EMA(decay=0.5)
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, made)
    raw = {name: p.detach().clone() + 1 for name, p in made.named_parameters()}
    for name, p in made.named_parameters():
        p.data.copy_(raw[name])
    average = {name: a.clone() for name, a in ema.average.items()}
    ema.on_validation_start(trainer, made)
    assert all(torch.equal(p, average[name]) for name, p in made.named_parameters())
    checkpoint = {"state_dict": made.state_dict()}
    ema.on_save_checkpoint(trainer, made, checkpoint)
    assert equal({k: checkpoint["state_dict"][k] for k in raw}, raw)
    assert equal(checkpoint["averages"], {"0.5": average})
    ema.on_validation_end(trainer, made)
    assert all(torch.equal(p, raw[name]) for name, p in made.named_parameters())


def test_checkpoint_holds_what_is_trained_and_nothing_else(whole: Path) -> None:
    checkpoint = read(whole)
    assert all(name.startswith("denoiser.network.") for name in checkpoint["state_dict"])
    assert checkpoint["averages"].keys() == {"0.9"}
    assert checkpoint["state_dict"].keys() == checkpoint["averages"]["0.9"].keys()
    assert not equal(checkpoint["state_dict"], checkpoint["averages"]["0.9"])


def test_run_folder_holds_what_the_readme_says(whole: Path) -> None:
    files = {path.name for path in whole.rglob("*") if path.is_file()}
    assert {"config.yaml", "last.ckpt", "best.ckpt", "step-000003.png", "step-000006.png"} <= files


@pytest.mark.parametrize(
    ("one", "many", "chosen"),
    [(3.0, 0.7, "bfloat16"), (3.0, 1.2, "float32"), (20.0, None, "float32")],
    ids=["disturbed", "slower", "without instructions"],
)
def test_the_trial_of_a_type(
    one: float, many: float | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single trial on one row may be disturbed; it ends the matter where it is far off alone."""
    made, asked = module(), list[int]()

    def seconds(trainer: object, pl_module: ScoreModule, rows: int) -> float:
        asked.append(rows)
        ratio = one if rows == 1 else many
        assert ratio is not None, "a whole batch was tried"
        return 1.0 if pl_module.denoiser.precision is None else ratio

    monkeypatch.setattr("pipeline.callbacks.precision.seconds", seconds)
    monkeypatch.setattr("pipeline.callbacks.precision.share", lambda trainer: (0, 1))
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(batch_size=8),
        strategy=SimpleNamespace(broadcast=lambda value: value),
        print=lambda said: None,
    )
    callback = Precision(trials=2)
    callback.on_train_start(trainer, made)
    assert callback.choice == chosen and set(asked) == ({1} if many is None else {1, 8})
    assert made.denoiser.precision == {"bfloat16": torch.bfloat16, "float32": None}[chosen]
