"""`reference`: made once, found again, never taken for another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, fit

from pipeline.cli import main
from pipeline.data import Points, Shapes
from pipeline.errors import UserError
from pipeline.evaluation.features import Own
from pipeline.evaluation.reference import Reference, digest_of, reference_of
from pipeline.mcmc.targets import GaussianMixture
from pipeline.noise import Noise

FLAT = """
class_path: pipeline.evaluation.features.Own
init_args:
  module: {class_path: torch.nn.Flatten}
  dim: 192
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures and a YAML of features, in a folder where everything else is written too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for k in range(12):
        draw(tmp_path, k, Noise("picture", k).uniform(192))
    (tmp_path / "flat.yaml").write_text(FLAT)
    return tmp_path


def draw(folder: Path, k: int, levels: torch.Tensor) -> None:
    pixels = (255 * levels).view(8, 8, 3).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / "pictures" / f"{k:02d}.png")


def door(folder: Path, *args: str) -> int:
    own = ["--features", str(folder / "flat.yaml"), "--device", "cpu"]
    return main(["reference", *own, *args])


def made(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("conditional-pipeline/references/*.safetensors"))


def test_a_folder_of_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = ["--pictures", str(folder / "pictures"), "--size", "8", "--batch", "5"]
    assert door(folder, *pictures) == 0
    (path,) = made(folder)
    assert str(path) in capsys.readouterr().out
    said = {"features": "Flatten", "split": "train", "pictures": "12 of 12 pictures of 3 x 8 x 8"}
    found = Reference.load(path, said)
    files = sorted((folder / "pictures").iterdir())
    x = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1).ravel() for file in files])
    torch.testing.assert_close(found.statistics.mean, torch.tensor(x.mean(0)))
    torch.testing.assert_close(found.statistics.covariance, torch.tensor(np.cov(x.T)))
    assert torch.equal(found.features, torch.tensor(x[found.rows]).float())

    written = path.stat().st_mtime_ns
    assert door(folder, *pictures) == 0  # found again
    assert made(folder) == [path] and path.stat().st_mtime_ns == written
    assert door(folder, *pictures, "--number", "5") == 0  # another
    assert len(made(folder)) == 2
    draw(folder, 3, Noise("other").uniform(192))
    assert door(folder, *pictures) == 0  # a picture was changed
    assert len(made(folder)) == 3


def test_a_file_about_something_else_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--pictures", str(folder / "pictures"), "--size", "8", "--out", str(folder / "r.st")]
    assert door(folder, *out) == 0 and door(folder, *out) == 0
    assert door(folder, *out, "--number", "5") == 2
    said = capsys.readouterr().err
    assert "is about pictures '12 of 12" in said and "'5 of 12" in said
    draw(folder, 3, Noise("other").uniform(192))
    assert door(folder, *out) == 2
    assert "is about data" in capsys.readouterr().err


def test_the_data_of_an_experiment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = (folder / "flat.yaml").read_text().replace("192", "3072")
    (folder / "flat.yaml").write_text(flat)
    shapes = ["-c", str(ROOT / "conf/experiment/shapes.yaml"), "--split", "val", "--number", "20"]
    few = ["--data.per_combination", "1"]
    assert door(folder, *shapes, *few) == 0
    assert "20 of 192 pictures of 3 x 32 x 32" in capsys.readouterr().out
    (path,) = made(folder)
    own = Own(torch.nn.Flatten(), 3072)
    found = reference_of(Shapes(None, per_combination=1), "val", own, 20)
    assert found[1] == path  # with conditioning and without, and from Python
    assert door(folder, *shapes, *few, "--seed_everything", "1") == 0  # other drawings
    assert len(made(folder)) == 2
    assert door(folder, *shapes, "--data.per_cobination", "1") == 2
    wrong = "data.per_cobination is not an argument of Shapes; did you mean per_combination"
    assert wrong in capsys.readouterr().err


def test_the_digest_of_a_map_is_kept_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Shapes(None, 1, cache_dir=str(tmp_path))
    x = data.rows("val").x
    assert isinstance(x, np.memmap)
    pixels = digest_of(np.array(x))
    assert digest_of(x) == pixels != digest_of(x[:-1])
    (kept,) = tmp_path.glob("pictures/*.sha256")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.evaluation.reference.hashlib", None)
        assert digest_of(x) == pixels
    kept.write_text(f"{'0' * 64} {'1' * 64}")  # of another map
    assert digest_of(x) == pixels
    kept.unlink()
    kept.mkdir()  # where nothing can be kept
    kept.joinpath("file").touch()
    assert digest_of(np.memmap(x.filename, x.dtype, "r", x.offset, x.shape)) == pixels


def test_the_data_of_a_checkpoint(folder: Path) -> None:
    run = fit(folder / "run", steps=1)
    flat = (folder / "flat.yaml").read_text().replace("192", "3072")
    (folder / "flat.yaml").write_text(flat)
    assert door(folder, "--checkpoint", str(run), "--split", "val") == 0
    assert len(made(folder)) == 1


def test_bad_input_ends_in_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = ["--pictures", str(folder / "pictures"), "--size", "8"]
    for args, said in (
        ([*pictures, "--number", "13"], "--number is 13; split 'train' has 12 pictures"),
        ([*pictures, "--number", "1"], "--number is 1"),
        ([*pictures, "--split", "test"], "has no split 'test'"),
        ([*pictures, "--features", "no.yaml"], "--features no.yaml: there is no such file"),
        ([*pictures, "--data.path", "x"], "--data.path changes an experiment"),
        (["-c", "no.yaml"], "error: no.yaml: there is no such file"),
        (["--checkpoint", "no.ckpt"], "There is no checkpoint no.ckpt"),
    ):
        assert door(folder, *args) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error
    assert main(["generate", "--no-such-option", "1"]) == 2
    assert "There is no option --no-such-option" in capsys.readouterr().err
    mixture = GaussianMixture([[0.0, 0.0]], [1.0])
    with pytest.raises(UserError, match="a reference is made of pictures"):
        reference_of(Points(mixture, None), "val", Own(torch.nn.Flatten(), 2))
