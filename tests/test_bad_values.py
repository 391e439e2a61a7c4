"""Bad values at every door: one sentence that names the value, and nothing is written or lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT, fit, sentence

from pipeline.cli import main

SHAPES = ["fit", "-c", str(ROOT / "conf/experiment/shapes.yaml"), "--run", "new"]
BANANA = ["sample", "-c", str(ROOT / "conf/sample/banana.yaml"), "--draws", "5", "--warmup", "0"]
DRAW = ["generate", "a red circle", "--checkpoint", "run"]
MEASURE = ["evaluate", "--checkpoint", "run", "--number", "6"]
REFERENCE = ["reference", "-c", str(ROOT / "conf/experiment/shapes.yaml")]

BAD = [
    # options that are none, and values of the wrong kind
    (["train"], "train"),
    ([], "COMMAND"),
    ([*DRAW, "--nmber", "3"], "--nmber"),
    ([*DRAW, "--number", "many"], "many"),
    ([*DRAW, "--number", "0"], "--number 0"),
    ([*DRAW, "--micro-batch", "-2"], "--micro-batch -2"),
    ([*DRAW, "--seed", "1.5"], "1.5"),
    ([*DRAW, "--steps", "0"], "steps = 0"),
    ([*DRAW, "--steps", "few"], "few"),
    ([*DRAW, "--scale", "strong"], "strong"),
    ([*DRAW, "--scale", "1e38"], "1e+38"),
    ([*DRAW, "--device", "cuda:9"], "cuda:9"),
    ([*DRAW, "--device", "toaster"], "toaster"),
    ([*DRAW, "--sampler", "ddim"], "ddim"),
    ([*DRAW, "--sampler", "no.yaml"], "no.yaml"),
    ([*DRAW, "--sampler", str(ROOT / "conf/kernel/ula.yaml")], "ULA"),
    ([*DRAW, "--sampler", str(ROOT / "conf/sampler/predictor_corrector_mala.yaml")], "MALA"),
    ([*DRAW, "--sampler.stps", "3"], "stps"),
    ([*DRAW, "--sampler.rho", "-1"], "rho = -1"),
    ([*DRAW, "--guidance", "no.yaml"], "no.yaml"),
    ([*DRAW, "--guidance.scale", "x"], "'x'"),
    ([*DRAW, "--guidance.interval", "[2, 1]"], "interval = [2.0, 1.0]"),
    ([*DRAW, "--ema", "longest"], "longest"),
    ([*MEASURE, "--ema", "0.07"], "0.07"),
    ([*DRAW, "--guidance", str(ROOT / "conf/guidance/autoguidance.yaml")], "denoiser"),
    ([*DRAW, "--prompts", "no.txt"], "no.txt"),
    ([*DRAW, "--prompts", "empty.txt"], "empty.txt"),
    ([*DRAW, "--prompts", "latin.txt"], "latin.txt"),
    (["generate", " ", "--checkpoint", "run"], "Prompt 1"),
    # files and folders that are not what they should be
    (["generate", "x", "--checkpoint", "no"], "no"),
    (["generate", "x", "--checkpoint", "empty.txt"], "empty.txt"),
    (["generate", "x", "--checkpoint", "cut.ckpt"], "cut.ckpt"),
    (["generate", "x", "--checkpoint", "foreign.ckpt"], "foreign.ckpt"),
    ([*DRAW, "--out", "empty.txt"], "empty.txt"),
    ([*DRAW, "--out", "full"], "full"),
    ([*MEASURE, "--number", "5"], "--number 5"),
    ([*MEASURE, "--seeds", "0"], "--seeds 0"),
    ([*MEASURE, "--steps", "1,x"], "1,x"),
    ([*MEASURE, "--scale", "1,2"], "--out"),
    ([*MEASURE, "--features", "no.yaml"], "no.yaml"),
    ([*MEASURE, "--features", str(ROOT / "conf/sampler/heun.yaml")], "Heun"),
    ([*MEASURE, "--clip", "./no"], "./no"),
    ([*MEASURE, "--likelihood", "1"], "--likelihood 1"),
    ([*MEASURE, "--out", "empty.txt/r.json"], "empty.txt"),
    ([*REFERENCE, "--split", "none"], "none"),
    ([*REFERENCE, "--number", "1"], "--number is 1"),
    ([*REFERENCE, "--data.per_combination", "0"], "per_combination is 0"),
    ([*REFERENCE, "--out", "full"], "full"),
    (["reference", "--pictures", "no"], "no"),
    (["reference", "--checkpoint", "cut.ckpt"], "cut.ckpt"),
    ([*BANANA, "--draws", "0"], "draws is 0"),
    ([*BANANA, "--chains", "0"], "chains is 0"),
    ([*BANANA, "--dim", "3"], "dim is 3"),
    ([*BANANA, "--kernel.step_size", "0"], "step_size is 0"),
    ([*BANANA, "--target", "no.yaml"], "no.yaml"),
    ([*BANANA, "--out", "empty.txt"], "empty.txt"),
    (["sample", "--chains", "3"], "target"),
    ([*SHAPES, "--data.batchsize", "3"], "batchsize"),
    ([*SHAPES, "--data.batch_size", "0"], "batch_size is 0"),
    ([*SHAPES, "--data.batch_size", "many"], "many"),
    ([*SHAPES, "--data", "no.yaml"], "no.yaml"),
    ([*SHAPES, "--model.sampler", "ddim"], "ddim"),
    ([*SHAPES, "--model.denoiser.network.u_dim", "7"], "u_dim = 7"),
    ([*SHAPES, "--model.denoiser.network.channels", "1"], "channels = 1"),
    ([*SHAPES, "--model.denoiser.sigma_data", "-1"], "sigma_data = -1"),
    ([*SHAPES, "--model.optimizer.lr", "fast"], "fast"),
    ([*SHAPES, "--trainer.max_stps", "3"], "max_stps"),
    ([*SHAPES, "--trainer.max_steps", "0"], "max_steps"),
    ([*SHAPES, "--trainer.precision", "64-true"], "64-true"),
    ([*SHAPES, "--trainer.accelerator", "abacus"], "abacus"),
    ([*SHAPES, "--trainer.strategy", "fsdp"], "fsdp"),
    ([*SHAPES, "--seed_everything", "x"], "'x'"),
    ([*SHAPES, "--ckpt_path", "cut.ckpt"], "cut.ckpt"),
    ([*SHAPES, "--run", "run"], "run holds a run already"),
    ([*SHAPES, "--run", "empty.txt"], "empty.txt"),
    (["fit", "-c", "no.yaml"], "no.yaml"),
    (["fit", "-c", "latin.txt"], "latin.txt"),
    (["fit", "--resume", "full"], "full"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    fit(folder / "run", steps=3)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "cut.ckpt").write_bytes((folder / "run/last.ckpt").read_bytes()[:5000])
    torch.save({"x": 1}, folder / "foreign.ckpt")
    (folder / "full").mkdir()
    (folder / "full/00000.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize(("args", "named"), BAD, ids=lambda a: a if isinstance(a, str) else "")
def test_bad_values(
    args: list[str],
    named: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.parent / "cache"))
    monkeypatch.delenv("PIPELINE_RUN", raising=False)

    def contents() -> dict[str, bytes]:
        files = (f for f in place.rglob("*") if f.is_file())
        return {str(f): f.read_bytes() for f in files} | {str(f): b"" for f in place.rglob("*/")}

    before = contents()
    capsys.readouterr()
    assert main(args) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and named in said and "Traceback" not in said
    assert contents() == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_full_memory_is_one_sentence(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.mcmc.sample", full)
    monkeypatch.setattr("pipeline.building.Config.call", full)
    assert "The memory does not hold it" in sentence([*BANANA, "--out", str(tmp_path)], capsys)
