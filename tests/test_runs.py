"""A run's folder, its checkpoints, and how it goes on."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from test_module import stop_at
from tiny import CALLBACKS, ROOT, command, contents, equal, fit, launch, read, sentence

from pipeline.callbacks import Last, Progress
from pipeline.checkpoint import Checkpoint
from pipeline.cli import main
from pipeline.doors.fit import begin
from pipeline.errors import UserError
from pipeline.experiment import Experiment, WholeFiles, new_run, newest_config, own_plugins


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps."""
    return fit(tmp_path_factory.mktemp("runs") / "run", steps=3)


def copy(run: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, to))


# --- whose a folder is


@pytest.mark.parametrize("how", [[], ["--trainer.fast_dev_run", "true"]])
def test_a_folder_that_holds_a_run_is_not_taken(
    run: Path, tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    taken = copy(run, tmp_path / "run")
    before = contents(taken)
    if how:  # nothing is written at all
        assert launch(taken, *how) == 0
        assert capsys.readouterr().err.endswith("No checkpoint is kept.\n")
    else:
        said = sentence(command(taken), capsys)
        assert "holds a run already" in said and f"--resume {taken}" in said
    assert contents(taken) == before


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    names = [new_run(tmp_path / "20260101-000000").name for _ in range(3)]
    assert names == ["20260101-000000", "20260101-000000.2", "20260101-000000.3"]


def test_a_run_that_fails_before_it_trains_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIPELINE_RUN", raising=False)
    args = command(tmp_path / "run")
    at = args.index("--run")
    width = ["--model.denoiser.network.u_dim", "7"]
    assert "u_dim = 7" in sentence([*args[:at], *args[at + 2 :], *width], capsys)
    assert "u_dim = 7" in sentence([*args, *width], capsys)
    assert not list(tmp_path.glob("runs/*/*")) and not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert launch(tmp_path / "mine", *width) == 2
    assert list(contents(tmp_path / "mine")) == ["notes.txt"]


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_a_place_that_cannot_be_written_to_is_one_sentence(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command(tmp_path / "run")
    args[args.index("--run") + 1] = str(tmp_path / folder)
    (tmp_path / "file").write_text("")
    said = sentence(args, capsys)
    assert f"--run {tmp_path / folder} cannot be written to" in said


# --- checkpoints on the disk


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an error nor a full disk leaves less than the one before, nor anything in TMPDIR."""
    files, place = WholeFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint({"x": torch.zeros(3)}, place)
    whole = place.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(OSError, match=r"No space left on device.*last\.ckpt"):
            files.save_checkpoint({"x": torch.ones(3)}, place)
    assert contents(tmp_path) == {"last.ckpt": whole}
    (tmp_path / "last.ckpt.0123.part").write_text("of a process that was killed")
    files.save_checkpoint({"x": torch.ones(3)}, place)
    assert [*contents(tmp_path)] == ["last.ckpt"] and place.read_bytes() != whole


def test_the_one_before_is_kept_and_taken_where_the_last_is_torn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = copy(run, tmp_path / "run")
    straight = copy(run, tmp_path / "straight")
    for folder in (torn, straight):
        assert main(["fit", "--resume", str(folder), "--trainer.max_steps", "6"]) == 0
    assert read(torn)["global_step"] == 6
    before = torch.load(torn / "before.ckpt", weights_only=True)
    assert before["global_step"] == 3
    for left in ((torn / "last.ckpt").read_bytes()[:1000], b"", b"t", b"root:x:0"):
        (torn / "last.ckpt").write_bytes(left)
        capsys.readouterr()
        assert Checkpoint(torn).path == torn / "before.ckpt"
        assert "cut short" in capsys.readouterr().err
    assert main(["fit", "--resume", str(torn), "--trainer.max_steps", "6"]) == 0
    assert equal(read(torn)["state_dict"], read(straight)["state_dict"])


@pytest.mark.parametrize("lacks", ["global_step", "optimizer_states"])
def test_weights_alone_are_not_gone_on_with(
    lacks: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = copy(run, tmp_path / "run")
    content = torch.load(torn / "last.ckpt", weights_only=True)
    del content[lacks]
    torch.save(content, torn / "last.ckpt")
    told = sentence(["fit", "--resume", str(torn), "--trainer.max_steps", "6"], capsys)
    assert f"holds weights and no training to go on with (it lacks {lacks})" in told
    assert "--init_from" in told


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (b"\xff\xfe", "is no longer the table that the run wrote"),
        (b"step,loss\n1," + b"9" * 200_000, "is no longer the table that the run wrote"),
        (b"", ""),
        ("step,loss\n²,3\n".encode(), ""),
    ],
)
def test_a_log_that_somebody_wrote_over(
    left: bytes, said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy(run, tmp_path / "run")
    (other / "csv").mkdir(exist_ok=True)
    (other / "csv/metrics.csv").write_bytes(left)
    before = (other / "last.ckpt").read_bytes()
    how = ["fit", "--resume", str(other), "--trainer.max_steps", "4", "--trainer.logger", "true"]
    if said:
        assert said in sentence(how, capsys)
        assert (other / "last.ckpt").read_bytes() == before
    else:
        assert main(how) == 0


# --- what a run that goes on is told


def test_a_new_learning_rate_is_used(run: Path, tmp_path: Path) -> None:
    runs = [copy(run, tmp_path / name) for name in "abc"]
    more = ["--trainer.max_steps", "6"]
    told = [[], ["--model.optimizer.lr", "0.1"], ["--model.optimizer.betas", "[0.5, 0.9]"]]
    for folder, own in zip(runs, told, strict=True):
        assert main(["fit", "--resume", str(folder), *more, *own]) == 0
    weights = [read(folder)["state_dict"] for folder in runs]
    assert not equal(weights[0], weights[1]) and not equal(weights[0], weights[2])
    for group in read(runs[1])["optimizer_states"][0]["param_groups"]:
        assert group["initial_lr"] == 0.1
    _, adamw = read(runs[2])["optimizer_states"][0]["param_groups"]
    assert adamw["betas"] == (0.5, 0.9)


def test_another_optimizer_is_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(run, tmp_path / "run")
    sgd = tmp_path / "sgd.yaml"
    sgd.write_text(
        "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}}"
    )
    assert main(["fit", "--resume", str(folder), "-c", str(sgd)]) == 2
    assert "model.optimizer is of another kind than it was" in capsys.readouterr().err


def test_what_one_resume_was_told_the_next_one_knows(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "run")
    assert main(["fit", "--resume", str(folder), "--trainer.max_steps", "5"]) == 0
    assert main(["fit", "--resume", str(folder)]) == 0  # to 5, and not to 3
    assert read(folder)["global_step"] == 5
    config = yaml.safe_load(newest_config(folder).read_text())
    assert newest_config(folder).name == "config-2.yaml" and config["trainer"]["max_steps"] == 5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data.conditioning.max_length", "9"], "max_length is 9, and was None"),
        (["--data.conditioning", "null"], "data.conditioning is None, and was"),
        (["--model.denoiser.network.widths", "[16, 32]"], "network.widths is [16, 32], and was"),
        (["--model.denoiser.schedule.clip", "0.02"], "schedule.clip is 0.02, and was 0.01"),
    ],
)
def test_another_model_or_condition_is_not_gone_on_with(
    run: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    free = ["--model.denoiser.network.u_dim", "null"]  # read anew from the data
    resume = ["fit", "--resume", str(run), "--trainer.max_steps", "6", *free]
    found = sentence([*resume, *args], capsys)
    assert said in found and "cannot be gone on with" in found
    assert contents(run) == before


def test_the_best_stays_the_best_where_the_folder_moves(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "run")
    checkpoint = read(folder)
    for name, state in checkpoint["callbacks"].items():
        if name.startswith("ModelCheckpoint"):  # nothing that comes is better
            score = torch.tensor(1e-9)
            state |= {"best_model_score": score, "kth_value": score}
            state["best_k_models"] = dict.fromkeys(state["best_k_models"], score)
    torch.save(checkpoint, folder / "last.ckpt")
    best = (folder / "best.ckpt").read_bytes()
    moved = folder.rename(tmp_path / "moved")
    assert main(["fit", "--resume", str(moved), "--trainer.max_steps", "6"]) == 0
    assert (moved / "best.ckpt").read_bytes() == best and not folder.exists()


# --- the same command, again and again


def test_one_command_begins_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped three times, where a validation was due and where none was, and once more after the
    end: the run is the one that was not stopped, sheets and best weights included, in one table.
    """
    log = ["--trainer.logger", "null"]
    assert launch(tmp_path / "whole", *log, steps=7) == 0
    auto = [*log, "--resume", "auto"]
    for batch in (2, 4, 5):
        assert launch(tmp_path / "run", *auto, callbacks=stop_at(batch), steps=7) == 130
    for _ in range(2):
        assert launch(tmp_path / "run", *auto, steps=7) == 0
    tables = []
    for name in ("last.ckpt", "best.ckpt"):
        both = [torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "run")]
        for key in ("state_dict", "averages", "optimizer_states", "global_step"):
            assert equal(both[0][key], both[1][key]), (name, key)
    for name in ("whole", "run"):
        with (tmp_path / name / "csv/metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        costs = ("time/", "memory/", "train/examples_per_s", "train/tflops")
        tables.append([{k: v for k, v in r.items() if not k.startswith(costs)} for r in rows])
    assert [row["step"] for row in tables[0] if row["train/loss"]] == [str(k) for k in range(7)]
    assert [row["step"] for row in tables[0] if row["val/loss"]] == ["2", "5", "6"]
    assert tables[0] == tables[1]
    sheets = [contents(tmp_path / name / "sheets") for name in ("whole", "run")]
    assert len(sheets[0]) == 3 and sheets[0] == sheets[1]  # the last at the end


def test_a_run_shorter_than_its_validations_ends_with_one(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "--trainer.logger", "null", steps=2)
    assert [*contents(run / "sheets")] == ["step-000002.png"] and (run / "best.ckpt").is_file()
    with (run / "csv/metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["val/loss"]] == ["1"]


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert launch(folder, "--resume", "auto") == 0
    before = read(folder)
    (folder / "last.ckpt").unlink()
    (folder / "before.ckpt").unlink(missing_ok=True)
    assert launch(folder, "--resume", "auto") == 0
    assert equal(before["state_dict"], read(folder)["state_dict"])


def test_auto_wants_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    said = sentence(["fit", "-c", "conf/experiment/shapes.yaml", "--resume", "auto"], capsys)
    assert "--run FOLDER" in said


# --- numbers that are not finite


@pytest.mark.parametrize(
    "how",
    [
        ["--model.optimizer.lr", "1e30"],
        ["--model.optimizer.lr", "1e30", "--trainer.gradient_clip_val", "null"],
    ],
)
def test_a_run_that_diverges_ends_in_a_sentence_and_keeps_what_was_good(
    run: Path, tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(run, tmp_path / "run")
    before = contents(folder)
    resume = ["fit", "--resume", str(folder), "--trainer.max_steps", "9", "--model.warmup", "0"]
    assert "Training has diverged" in sentence([*resume, *how], capsys)
    after = contents(folder)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".ckpt"))
    for name in ("last.ckpt", "best.ckpt"):
        weights = torch.load(folder / name, weights_only=True)["state_dict"].values()
        assert all(w.isfinite().all() for w in weights)


def test_pictures_of_numbers_that_are_not_finite_are_not_made(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read(run)
    for weights in (checkpoint["state_dict"], *checkpoint["averages"].values()):
        for w in weights.values():
            w.fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    draw = ["generate", "a red circle", "--number", "1", "--out", str(tmp_path / "out")]
    said = sentence([*draw, "--checkpoint", str(tmp_path / "nan.ckpt")], capsys)
    assert "not finite" in said and not list(tmp_path.glob("out/*.png"))
    said = sentence([*draw, "--checkpoint", str(run), "--scale", "1e38"], capsys)
    assert "scale 1e+38 is too large" in said and not list(tmp_path.glob("out/*.png"))


def test_a_run_that_writes_no_log_trains(tmp_path: Path) -> None:
    assert launch(tmp_path / "run", "--trainer.log_every_n_steps", "0") == 0


def test_the_manifest_for_kubernetes_tells_fit_what_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    documents = [*yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text())]
    (container,) = documents[1]["spec"]["template"]["spec"]["containers"]
    torchrun, told = (
        container["args"],
        container["args"][container["args"].index("pipeline") + 1 :],
    )
    assert torchrun[torchrun.index("pipeline") - 1] == "--"  # or torchrun takes --run for its own
    experiment = told[told.index("-c") + 1]
    assert (ROOT / experiment).is_file()
    told = [one for one in told if not one.startswith("--data.path")]
    told[told.index(experiment)] = str(ROOT / "conf/experiment/shapes.yaml")
    assert main([*told, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (printed["num_nodes"], printed["devices"]) == (2, 8)


# --- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint(
    signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_module.signal.SIGINT", signum)  # what StopAt sends
    run = tmp_path / "run"
    assert launch(run, callbacks=stop_at(2)) == (129 if signum == signal.SIGHUP else 143)
    assert read(run)["global_step"] == 3


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("door", ["generate", "fit"])
def test_a_signal_before_anything_is_made_is_said(
    door: str, signum: signal.Signals, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*_: object, **__: object) -> Any:
        os.kill(os.getpid(), signum)

    if door == "generate":
        monkeypatch.setattr("pipeline.generator.Generator.draw", stop)
        args = ["generate", "x", "--checkpoint", str(run), "--out", str(tmp_path / "out")]
    else:
        monkeypatch.setattr("pipeline.data.DataModule.prepare_data", stop)
        args = command(tmp_path / "run")
    assert main(args) == 143
    assert f"Stopped by {signum.name}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_last_keeps_no_handlers(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    last = Last()
    trainer: Any = type("Trainer", (), {"global_step": 0})
    last.on_train_start(trainer, trainer)
    last.teardown(trainer, trainer, "fit")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# --- clusters, and what a trainer is told


def test_variables_of_a_job_do_not_break_a_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("NTASKS", "4"), ("JOB_NAME", "mine"), ("JOB_ID", "7"), ("PROCID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert [type(plugin).__name__ for plugin in own_plugins()][1:] == ["LightningEnvironment"]
    fit(tmp_path / "run", steps=1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # srun has started one for each device
    with pytest.raises(UserError, match="--ntasks-per-node=4"):
        own_plugins()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert [type(plugin).__name__ for plugin in own_plugins()][1:] == ["SLURMEnvironment"]
    assert own_plugins()[1].auto_requeue is False


def test_a_job_that_is_preempted_goes_back_into_the_queue_and_ends(tmp_path: Path) -> None:
    """The batch script, with programs of these names that do as SLURM's do."""
    stand_ins = {
        "make": "exit 0",  # the environment is there
        "srun": f'shift 3; exec "{sys.executable}" "$@"',  # its options, and the venv's Python
        "scontrol": f'echo "$@" >> "{tmp_path}/scontrol"',
    }
    for name, does in stand_ins.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "1"}
    job |= {"SLURM_JOB_NUM_NODES": "1", "RUN": str(tmp_path / "job" / "run")}
    paths = f"{ROOT}:{ROOT / 'tests'}"
    env = os.environ | job | {"PYTHONPATH": paths, "WANDB_MODE": "disabled"}
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    env.pop("PIPELINE_RUN", None)
    told = command(tmp_path / "job" / "run", callbacks=stop_at(2, int(signal.SIGUSR1)))
    told = told[1 : told.index("--run")] + told[told.index("--run") + 2 :]  # but for `fit`
    codes = [
        subprocess.run(["sh", "docker/slurm.sbatch", *told], cwd=ROOT, env=env).returncode
        for _ in range(3)
    ]
    assert codes == [143, 0, 0]  # stopped; gone on with; nothing left to do
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    ended = read(tmp_path / "job" / "run")
    assert equal(ended["state_dict"], read(fit(tmp_path / "whole" / "run"))["state_dict"])


@pytest.mark.slow
def test_one_task_with_two_devices_trains_on_every_row(tmp_path: Path) -> None:
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "mine", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    one = fit(tmp_path / "one" / "run", steps=2)
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    args = command(tmp_path / "two" / "run", *devices, steps=2)
    line = [sys.executable, "-m", "pipeline", *args]
    done = subprocess.run(
        line, cwd=ROOT, env=os.environ | job, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, w in read(one)["state_dict"].items():
        # the order of summation, and Adam's step whose size does not depend on the gradient's
        other = read(tmp_path / "two" / "run")["state_dict"][name]
        torch.testing.assert_close(other, w, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.precision", "64-true"], "trainer.precision is '64-true'"),
        (["--trainer.precision", "bf16-mixed"], "callbacks.Precision"),
        (["--trainer.max_steps", "0"], "trainer.max_steps or max_epochs is 0"),
        (["--trainer.strategy", "fsdp"], "name conf/strategy/fsdp.yaml"),
        (["--trainer.accelerator", "gpu", "--trainer.devices", "3"], "trainer cannot be made"),
        (["--trainer.devices", "0"], "trainer cannot be made"),
        (["--data.batch_size", "0"], "batch_size is 0"),
        (["--model.denoiser.network.channels", "1"], "channels = 1 and the data give 3"),
        (["--model.condition_dropout", "2"], "condition_dropout = 2.0"),
    ],
)
def test_what_no_run_can_be_made_of_is_one_sentence(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "gpu" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert said in sentence([*command(tmp_path / "run"), *args], capsys)
    assert not (tmp_path / "run").exists()


def test_a_sharded_strategy_by_its_class_is_sentence(tmp_path: Path) -> None:
    node = '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
    assert launch(tmp_path / "run", "--trainer.strategy", node) == 2


def test_no_progress_bar_is_no_conflict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", "--trainer.enable_progress_bar", "false", steps=1)
    assert read(run)["global_step"] == 1 and "Training:" not in capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_that_become_slow_are_said_once(
    threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    trainer: Any = SimpleNamespace(
        estimated_stepping_batches=5000, global_step=0, is_global_zero=True, world_size=2
    )
    module: Any = SimpleNamespace(written=lambda step: False, device=torch.device("cpu"))
    progress = Progress()
    progress.on_train_start(trainer, module)

    def run(steps: int, seconds: float) -> str:
        for _ in range(steps):
            clock.now += seconds
            trainer.global_step += 1
            progress.on_train_batch_end(trainer, module)
        said = capsys.readouterr().err.splitlines()
        return "".join(line for line in said if "A step takes" in line)

    assert "A step takes 0.5 s, so 5,000 steps end on" in run(200, 0.5)
    assert run(400, 1.4) == ""  # less than three times as slow
    progress.on_validation_end(trainer, module)
    clock.now += 1000  # of a validation and its sheet
    assert run(200, 0.5) == ""
    said = run(100, 2.0)
    assert "A step takes 2 s, so 5,000 steps end on" in said and "4 times as slow" in said
    assert ("go on with OMP_NUM_THREADS=1" in said) == (threads > 1)
    assert run(200, 4.0) == ""
    progress.on_exception()


def test_callbacks_of_ones_own_are_added(tmp_path: Path) -> None:
    experiment = Experiment(
        [ROOT / "conf/experiment/shapes.yaml"],
        ["--trainer.callbacks+", str(ROOT / "conf/callback/evaluation.yaml")],
    )
    kinds = [
        plan.cls.__name__ for plan in experiment.plan.arguments["trainer"].arguments["callbacks"]
    ]
    assert kinds[-1] == "Evaluation" and len(kinds) == 1 + len(CALLBACKS)


def test_a_run_begins_with_the_weights_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them where the model is the same; with other conditions, but for those that read
    them, which are named.
    """
    old = fit(tmp_path / "old", steps=2)
    begun = Checkpoint(old).weights()
    run = fit(tmp_path / "same", "--init_from", str(old), "--model.optimizer.lr", "0", steps=1)
    said = capsys.readouterr().err
    assert f"{len(begun)} of {len(begun)} weights are those of {old}" in said
    assert "anew" not in said and equal(Checkpoint(run).weights("trained"), begun)

    more = ["--init_from", str(old), "--model.optimizer.lr", "0", "--data.conditioning"]
    classes = "{class_path: pipeline.conditioning.Classes}"
    run = fit(tmp_path / "classes", *more, classes, steps=1)
    said = capsys.readouterr().err
    anew = said.split("begun anew: ")[1].split(".\n")[0].split("; ")[0].split(", ")
    found = Checkpoint(run).weights("trained")
    assert anew and all("network.modulate" in name for name in anew), anew
    assert all(equal(found[name], begun[name]) for name in found if name not in anew)

    assert main(["fit", "--resume", str(run), "--init_from", str(old)]) == 2
    assert "is for a run that begins" in capsys.readouterr().err
    with pytest.raises(UserError, match="no weight of it fits this network"):
        begin(SimpleNamespace(denoiser=torch.nn.Linear(2, 2)), Checkpoint(old))  # type: ignore
