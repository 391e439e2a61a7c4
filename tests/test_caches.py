"""Runs and the cache they read from: shared, taken away, changed, or not to be had."""

import multiprocessing
import shutil
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from test_module import stop_at
from tiny import CALLBACKS, equal, fit, launch, read

PARTS = ("state_dict", "averages", "optimizer_states", "global_step")
DISK = ("--data.table_gib", "0")  # embeddings come from there, as pictures always do


class Gone(pl.Callback):
    """Takes the cache away in the middle of a run."""

    def __init__(self, cache: str) -> None:
        self.cache = cache

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 2:
            shutil.rmtree(self.cache)


def into(cache: Path) -> tuple[str, ...]:
    return (*DISK, "--data.cache_dir", str(cache))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(folder / "run", *into(folder / "cache"))


def assert_the_same(run: Path, whole: Path) -> None:
    for part in PARTS:
        assert equal(read(run)[part], read(whole)[part]), part


def train(run: Path, cache: Path) -> None:
    sys.exit(launch(run, *into(cache)))


def test_two_runs_fill_one_cache(tmp_path: Path, whole: Path) -> None:
    """At once: each file is written whole by either, and both runs are the one."""
    runs, cache = [tmp_path / name / "run" for name in "ab"], tmp_path / "cache"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "pipeline.experiment", "pipeline.callbacks"])
    processes = [context.Process(target=train, args=(run, cache)) for run in runs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for run in runs:
        assert_the_same(run, whole)
    assert len(list(cache.glob("pictures/*"))) == 2  # of train and of val


def test_a_run_outlives_its_cache(tmp_path: Path, whole: Path) -> None:
    gone = {"class_path": "test_caches.Gone", "init_args": {"cache": str(tmp_path / "cache")}}
    more = (*into(tmp_path / "cache"), "--data.workers", "1")
    run = fit(tmp_path / "run", *more, callbacks=[*CALLBACKS, gone])
    assert_the_same(run, whole)
    assert not (tmp_path / "cache").exists()


def test_a_changed_cache_is_made_anew(
    tmp_path: Path, whole: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Between a stop and the same command again: said, and nothing of it is in the weights."""
    run, cache = tmp_path / "run", into(tmp_path / "cache")
    assert launch(run, *cache, callbacks=stop_at(2)) == 130
    kept = [f for f in (tmp_path / "cache").rglob("*") if f.suffix in (".npy", ".safetensors")]
    assert len(kept) == 3
    for file in kept:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    fit(run, "--resume", "auto", *cache)
    assert sum("made anew" in str(one.message) for one in recwarn) == 3
    assert_the_same(run, whole)


@pytest.mark.parametrize("option", ["--run", "--data.cache_dir"])
def test_a_folder_that_cannot_be_is_a_sentence(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a file no folder can be, for root neither."""
    (tmp_path / "file").touch()
    assert launch(tmp_path / "run", option, str(tmp_path / "file" / "x")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and str(tmp_path / "file") in said
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.ckpt"))
