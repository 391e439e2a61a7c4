"""Every YAML in conf/ builds what it names."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import yaml
from lightning.pytorch.strategies import Strategy
from test_latents import save
from tiny import ROOT

from pipeline import (
    conditioning,
    engines,
    guidance,
    mcmc,
    networks,
    objectives,
    samplers,
    schedules,
)
from pipeline.building import Config, build, make
from pipeline.cli import main
from pipeline.data import DataModule
from pipeline.denoisers import ScoreDenoiser
from pipeline.evaluation.features import Features

CONF = ROOT / "conf"
TYPES: dict[str, type] = {
    "callback": pl.Callback,
    "conditioning": conditioning.Conditioning,
    "data": DataModule,
    "features": Features,
    "guidance": guidance.Guidance,
    "kernel": mcmc.Kernel,
    "network": networks.Network,
    "objective": objectives.Objective,
    "sampler": samplers.Sampler,
    "schedule": schedules.Schedule,
    "strategy": Strategy,
    "target": mcmc.Target,
}
GROUPS = sorted(CONF.glob("*/*.yaml"))
BUILT = [file for file in GROUPS if file.parent.name in TYPES]
# what a network reads from the data
DATA = {"channels": 3, "u_dim": 5, "planes": 0, "dims": 2, "x_dim": 2}
EXPERIMENTS = [file for file in GROUPS if file.parent.name == "experiment"]


def name(file: Path) -> str:
    return str(file.relative_to(CONF))


def test_every_group_is_known() -> None:
    """What is neither built here nor an experiment is part of one."""
    assert {file.parent.name for file in GROUPS} - set(TYPES) == {
        "experiment",
        "model",
        "optimizer",
        "sample",  # built and run by test_sample.py
        "trainer",
    }


@pytest.mark.parametrize("file", BUILT, ids=name)
def test_group_builds(
    file: Path, tmp_path: Path, mixture: mcmc.GaussianMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LEAST", (2, 0))  # it is built, and not used
    (tmp_path / "part.yaml").write_text(f"part: {file}\n")
    config, kind = Config([tmp_path / "part.yaml"]), TYPES[file.parent.name]
    config.fill("part", DATA)
    if file.stem == "autoguidance":
        config.set("part.denoiser", ScoreDenoiser(mixture, schedules.VP()))
    if file.stem == "inpaint":
        config.set("part.known", [0.5, None])  # a person's own
    if file.parent.name == "data" and "path: null" in file.read_text():
        config.set("part.path", "pictures")  # likewise
    assert isinstance(make(config.resolve("part", kind)), kind)


@pytest.mark.parametrize("file", [f for f in BUILT if f.parent.name != "callback"], ids=name)
def test_group_states_every_argument(file: Path) -> None:
    """A person sees all there is to set."""
    node = yaml.safe_load(file.read_text())
    module, _, cls = node["class_path"].rpartition(".")
    signature = inspect.signature(getattr(__import__(module, fromlist=[cls]), cls))
    assert set(node["init_args"]) == set(signature.parameters)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name)
def test_experiment_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: dict[str, list[str]]
) -> None:
    monkeypatch.delenv("PIPELINE_RUN", raising=False)
    small = ["--data.batch_size", "4", "--run", str(tmp_path / "run")]
    args = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    own = pictures.get(file.stem, [])
    assert main(["fit", "-c", str(file), *small, *args, *own]) == 0


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, list[str]]:
    """What stands in for data that do not come with the package: a folder like theirs."""
    from datasets import ClassLabel, Dataset, Image

    pictures = [{"bytes": _png(k), "path": None} for k in range(8)]
    rows: dict[str, dict[str, Any]] = {
        "emoji": {"image": pictures, "caption": [f"face {k}" for k in range(8)]},
        "emoji_styles": {
            "image": pictures,
            "caption": [f"face {k}, flat style" for k in range(8)],
            "style": ["flat"] * 8,
            "subject": [f"face {k}" for k in range(8)],
        },
        "cifar10": {"img": pictures, "label": list(range(8))},
    }
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    for kind, table in rows.items():
        data = Dataset.from_dict(table).cast_column(next(iter(table)), Image())
        if kind == "cifar10":
            data = data.cast_column("label", ClassLabel(names=names))
        for split in ("train", "test_pair" if kind == "emoji_styles" else "test"):
            (tmp_path / kind).mkdir(exist_ok=True)
            data.to_parquet(tmp_path / kind / f"{split}-00000-of-00001.parquet")
    cache = ["--data.cache_dir", str(tmp_path / "cache")]
    own = {kind: ["--data.path", str(tmp_path / kind), *cache] for kind in rows}
    for kind, same in (("cifar10_long", "cifar10"), ("emoji_styles_64", "emoji_styles")):
        own[kind] = own[same]
    small = ["--model.denoiser.network.widths", "[16, 32, 32]"]  # they are for a GPU
    autoencoder = str(save(tmp_path / "autoencoder", seed=0))
    own["latents"] = [*own["emoji"], "--data.autoencoder", autoencoder, "--data.size", "32"]
    own["latents"] += ["--model.denoiser.network.width", "64"]
    short = ["--data.length", "2048"]  # of 16,384
    own["sequences"] = ["--data.path", str(_sounds(tmp_path / "sequences")), *short, *cache]
    return own | {
        kind: own[kind] + small for kind in ("cifar10", "cifar10_long", "emoji_styles_64")
    }


def _sounds(folder: Path) -> Path:
    from scipy.io import wavfile

    folder.mkdir()
    for k in range(4):
        wavfile.write(folder / f"{k}.wav", 16000, np.full(9000, 1000 * k, np.int16))
    lines = [f'{{"file_name": "{k}.wav", "caption": "sound {k}"}}' for k in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _png(k: int) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), (30 * k, 0, 255 - 30 * k)).save(file, "png")
    return file.getvalue()


def test_a_description_is_built() -> None:
    heun = build(yaml.safe_load((CONF / "sampler/heun.yaml").read_text()), samplers.Sampler)
    assert isinstance(heun, samplers.Heun) and heun.steps == 18
