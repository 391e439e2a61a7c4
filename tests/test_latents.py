"""Pictures as the latents of a tiny autoencoder, made here."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import ROOT, command

from pipeline.checkpoint import Checkpoint
from pipeline.cli import main
from pipeline.codec import Codec
from pipeline.conditioning import Downsampled
from pipeline.data import Hub
from pipeline.errors import UserError
from pipeline.latents import Latents

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder that folds 4×4 pixels into one place of 2 channels."""
    return save(tmp_path_factory.mktemp("autoencoder"), seed=0)


def save(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    made = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=2,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for k in range(12):
        Image.new("RGB", (20, 16), (20 * k, 10 * k, 90)).save(root / f"{k:02}.png")
        (root / f"{k:02}.txt").write_text(f"number {k}")
    return root


def test_x_is_the_scaled_mean(folder: Path) -> None:
    codec = Latents(str(folder), 3, 16, 8)
    assert codec.shape == (2, 4, 2) and codec.sizes == {"channels": 2, "dims": 2}
    rows = torch.randint(256, (11, 3, 16, 8), dtype=torch.uint8)
    x = codec.encode(rows)
    direct = codec.autoencoder.encode(rows / 127.5 - 1).latent_dist
    # batches of other sizes sum in another order
    torch.testing.assert_close(x, (direct.mean - 0.25) * 0.5, atol=1e-5, rtol=1e-5)
    assert torch.equal(codec.encode(codec.means(rows)), x)
    back = codec.autoencoder.decode(direct.mean).sample
    difference = (codec.decode(x).float() - (back * 127.5 + 127.5).clamp(0, 255)).abs()
    assert difference.max() <= 0.51  # rounded
    with pytest.raises(UserError, match="no likelihood"):
        codec.dequantise(rows, None)


def test_what_does_not_fit_is_a_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="of 3 channels whose sides are multiples of 4"):
        Latents(str(folder), 3, 18, 16)
    with pytest.raises(UserError, match=r"lacks .*config\.json"):
        Latents(str(tmp_path), 3, 16, 16)
    before = Latents(str(folder), 3, 16, 16)
    with pytest.raises(UserError, match="another than the model was trained with"):
        Latents(str(save(tmp_path / "other", seed=1)), 3, 16, 16, before.weights)
    with pytest.raises(UserError, match=r"of pictures and data\.autoencoder learns latents"):
        Hub(str(tmp_path), Downsampled(2), size=16, autoencoder=str(folder))
    with pytest.raises(UserError, match=r"data\.flip mirrors pictures"):
        Hub(str(tmp_path), None, size=16, flip=True, autoencoder=str(folder))

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("diffusers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install diffusers"):
        Latents(str(folder), 3, 16, 16).autoencoder  # noqa: B018


def test_latents_are_kept(folder: Path, photos: Path, tmp_path: Path) -> None:
    def module() -> Hub:
        data = Hub(
            str(photos),
            None,
            size=(16, 8),
            batch_size=4,
            autoencoder=str(folder),
            cache_dir=str(tmp_path),
        )
        data.prepare_data()
        data.setup()
        return data

    data = module()
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    rows = torch.from_numpy(data.rows("val").x[:])  # what is measured against: pictures
    assert rows.dtype == torch.uint8 and batch.x.shape[1:] == (2, 4, 2) == data.shape
    torch.testing.assert_close(batch.x[:1], data.codec.encode(rows), atol=1e-5, rtol=1e-5)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("latents/*.npy")}
    assert len(kept) == 2
    module()
    assert kept == {file: file.stat().st_mtime_ns for file in tmp_path.glob("latents/*.npy")}


def test_a_model_of_latents_draws_pictures(
    folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(ROOT / "conf/data/emoji.yaml"), "--data.path", str(photos)]
    data += ["--data.val_split", "null", "--data.size", "16", "--data.autoencoder", str(folder)]
    data += ["--data.cache_dir", str(tmp_path / "cache"), "--model.denoiser.network.patch", "2"]
    own = command(tmp_path / "run", steps=2)
    drop = own.index("--data.per_combination")
    told = [*own[:drop], *own[drop + 2 :], *data, "--data.conditioning", "null"]
    assert main(told) == 0, capsys.readouterr().err
    codec = Checkpoint(tmp_path / "run").part("codec", Codec)
    assert isinstance(codec, Latents) and codec.shape == (2, 4, 4)
    out = tmp_path / "out"
    args = ["generate", "--checkpoint", str(tmp_path / "run"), "--number", "2", "--steps", "2"]
    assert main([*args, "--out", str(out), "--device", "cpu"]) == 0
    with Image.open(out / "00001.png") as picture:
        assert picture.size == (16, 16)
