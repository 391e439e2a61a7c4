"""What a run writes down about itself."""

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import launch

from pipeline import tracking


def records(file: Path) -> Iterator[Any]:
    """The records of an offline W&B run: a 7-byte header, then LevelDB log blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header: the block is filled up
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracking") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder.parent))  # logged in nowhere
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.delenv("WANDB_MODE", raising=False)
        cache = ["--data.cache_dir", str(folder.parent / "cache")]
        assert launch(folder, "--trainer.logger", "null", *cache) == 0
    import wandb

    wandb.finish()
    return folder


def test_csv_holds_losses_and_throughput(run: Path) -> None:
    (file,) = run.glob("csv/*/metrics.csv")
    rows = list(csv.DictReader(file.open()))
    names = {name for row in rows for name, value in row.items() if value}
    bands = {f"val/band_{k}" for k in range(4)}
    assert {"train/loss", "train/examples_per_s", "val/loss", "step"} | bands <= names
    assert all(float(row["train/examples_per_s"] or 1) > 0 for row in rows)


def test_config_can_be_run_again(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["denoiser"]["class_path"] == "pipeline.denoisers.EDM"
    assert config["data"]["init_args"]["batch_size"] == 8


def test_wandb_offline_holds_config_command_losses_and_sheets(run: Path) -> None:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    config, history = {}, {}
    for record in records(file):
        for item in record.run.config.update if record.HasField("run") else record.config.update:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.history.item:
            history[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert config["command"].startswith("python -m pipeline fit -c ")
    flat = json.dumps(config)
    assert "pipeline.denoisers.EDM" in flat and "pipeline.data.Shapes" in flat
    assert {"train/loss", "val/loss", "train/examples_per_s"} <= set(history)
    assert any("samples" in name for name in history)
    assert list(run.glob("wandb/offline-run-*/files/media/images/*.png"))


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not tracking._logged_in()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking._logged_in()
    (tmp_path / ".netrc").write_text("machine elsewhere.org login user password secret\n")
    assert not tracking._logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking._logged_in()


def test_resumed_run_keeps_its_identity(tmp_path: Path) -> None:
    first = tracking._identity(tmp_path)
    assert tracking._identity(tmp_path) == first and len(first) >= 8
