"""Scores while training: those of `evaluate`, in their share of the time, on any device count."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import MEANS, evaluate
from tiny import CALLBACKS, ROOT, command, equal, fit, read

from pipeline.callbacks import Evaluation

BEST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "filename": "best-frechet",
        "monitor": "eval/frechet_48",
        "enable_version_counter": False,
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")  # of the second process
    (tmp_path / "means.yaml").write_text(MEANS)
    return tmp_path


def callbacks(folder: Path, share: float) -> list[dict[str, Any]]:
    own = {"number": 8, "micro_batch": 4, "share": share, "features": str(folder / "means.yaml")}
    return [{"class_path": "pipeline.callbacks.Evaluation", "init_args": own}, *CALLBACKS, BEST]


def logged(run: Path) -> list[dict[str, float]]:
    """The scores that were written down, one for each validation that was scored."""
    (file,) = run.glob("csv/metrics.csv")
    rows = [
        {name[5:]: float(value) for name, value in row.items() if name[:5] == "eval/" and value}
        for row in csv.DictReader(file.open())
    ]
    return [row for row in rows if row]


def test_scores_are_those_of_evaluate_and_choose_the_best(folder: Path) -> None:
    logger = ["--trainer.logger", "null"]
    run = fit(folder / "run", *logger, callbacks=callbacks(folder, share=1e6))
    scores = logged(run)
    assert len(scores) == 2  # after steps 3 and 6
    last = evaluate(run, folder / "last.json", "--number", "8")
    for name in ("frechet", "kernel", "precision", "recall", "density", "coverage"):
        assert scores[-1][f"{name}_48"] == pytest.approx(last[name], rel=1e-6)  # logged in float32
    assert scores[-1]["frechet_48_floor"] == pytest.approx(last["floor"]["frechet"], rel=1e-6)
    assert scores[-1]["accuracy"] == pytest.approx(last["accuracy"]["mean"], abs=1e-6)
    assert scores[-1]["all"] == pytest.approx(last["accuracy"]["all"], abs=1e-6)
    assert all(score["seconds"] > 0 for score in scores)

    assert scores[0]["frechet_48"] != scores[1]["frechet_48"]
    least = min(score["frechet_48"] for score in scores)
    (run / "best-frechet.ckpt").rename(folder / "best.ckpt")
    best = evaluate(folder / "best.ckpt", folder / "best.json", "--number", "8")
    assert best["frechet"] == pytest.approx(least, rel=1e-6)


def test_what_is_spent_stays_within_its_share(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first validation is scored; then, at a small share, none. Training does not notice."""
    logger = ["--trainer.logger", "null"]
    run = fit(folder / "run", *logger, callbacks=callbacks(folder, share=1e-6))
    assert len(logged(run)) == 1
    without = fit(folder / "other" / "run")
    assert equal(read(run)["state_dict"], read(without)["state_dict"])

    clock, scored = [0.0], []

    def score(*_: object) -> tuple[dict[str, Any], None, None]:
        scored.append(clock[0])
        clock[0] += 10  # seconds for each
        return dict.fromkeys(("frechet", "kernel", "inception_score"), 0.0), None, None

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("pipeline.callbacks.evaluation.DISTANCES", ("frechet",))
    evaluation, trainer, module = Evaluation(8, share=0.1), Stub(), Stub()
    evaluation.measure, evaluation.floor = score, 0.0  # type: ignore
    evaluation.on_train_start(trainer, module)  # type: ignore
    while clock[0] < 400:
        clock[0] += 25
        evaluation.on_validation_epoch_end(trainer, module)  # type: ignore
    # k scores of 10 s may be spent once 100 k s were trained, so the second, at the first chance
    # from 200 + 10 s on, then the third from 300 + 20 s on; the fourth would be due at 430 s
    assert scored == [25, 210, 320]
    assert module.said["eval/seconds"] == 10
    assert "eval/inception_score_112" in module.said


class Stub:
    """What the callback asks of trainer, strategy, data and module."""

    sanity_checking = False

    def __init__(self) -> None:
        self.strategy = self.datamodule = self
        self.said: dict[str, float] = {}

    def broadcast(self, due: bool) -> bool:
        return due

    def generator(self, data: object, together: bool) -> None:
        pass

    def log(self, name: str, value: float, **_: object) -> None:
        self.said[name] = value


def test_bad_settings_are_refused() -> None:
    for bad in ({"number": 5}, {"micro_batch": 0}, {"share": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Evaluation(**bad)  # type: ignore


@pytest.mark.slow
def test_two_devices_score_as_one(folder: Path) -> None:
    logger = ["--trainer.logger", "null"]
    fit(folder / "one" / "run", *logger, callbacks=callbacks(folder, share=1e6))
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    own = callbacks(folder, share=1e6)
    args = command(folder / "two" / "run", *logger, *devices, callbacks=own)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    both = [logged(folder / name / "run") for name in ("one", "two")]
    assert len(both[0]) == len(both[1]) == 2
    for a, b in zip(*both, strict=True):
        # the weights differ by the order of sums in float32, see test_devices.py
        assert b["frechet_48"] == pytest.approx(a["frechet_48"], rel=1e-2)
        assert b["frechet_48_floor"] == pytest.approx(a["frechet_48_floor"], rel=1e-6)
