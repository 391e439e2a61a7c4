"""Pictures as conditions: what is observed, what is left out, pairs, and the way to `generate`."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_data
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from test_cli import sentence
from test_condition import same
from test_evaluate import Means
from tiny import ROOT, fit, read
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.cli import main
from pipeline.codec import Columns, Pixels
from pipeline.conditioning import (
    Classes,
    Conditioning,
    Downsampled,
    Given,
    Grey,
    Masked,
    Paired,
    Picture,
)
from pipeline.data import Batch, DataModule, Hub, Points, Shapes
from pipeline.data.base import Source
from pipeline.errors import UserError
from pipeline.evaluation.features import Own
from pipeline.evaluation.measure import Measure
from pipeline.generator import Generator
from pipeline.mcmc.targets import GaussianMixture
from pipeline.noise import Noise

MEMBERS = [Downsampled(2), Masked(), Grey(), Paired()]
SHAPE = (3, 8, 8)


def seeing(picture: Picture, shape: tuple[int, ...] = SHAPE) -> Picture:
    picture.see(shape)
    return picture


def normal(n: int, *shape: int, key: str = "x") -> Tensor:
    return Noise(key).normal(torch.zeros(n, *(shape or SHAPE)))


def name(member: Picture) -> str:
    return type(member).__name__


# --- what is observed ---


def test_a_square_of_pixels_is_its_mean() -> None:
    x = normal(2).double()
    seen = seeing(Downsampled(4)).observe(x)
    for i, j in ((0, 0), (3, 7), (5, 2)):
        square = x[:, :, i // 4 * 4 :, j // 4 * 4 :][:, :, :4, :4]
        assert torch.allclose(seen[:, :, i, j], square.mean(dim=(2, 3)), rtol=1e-12)
    assert torch.allclose(seeing(Downsampled(4)).observe(seen), seen, rtol=1e-12)  # once and again


def test_grey_is_what_pillow_calls_so() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    codec = Pixels(*SHAPE)
    x = codec.encode(torch.from_numpy(levels).permute(2, 0, 1)[None])
    found = codec.decode(Grey().observe(x))[0, 0].int()
    # Pillow's weights are of 16 bits, and it cuts: a level at most
    known = torch.from_numpy(np.array(Pillow.fromarray(levels).convert("L"))).int()
    assert (found - known).abs().max() <= 1


def test_a_box_is_unknown() -> None:
    """Of the sides and places that are asked for, whatever the share of the batch."""
    picture, x = Masked(0.25), torch.zeros(512, 3, 16, 32)
    known = picture.known(x, Noise("box"))
    assert known.shape == (512, 1, 16, 32) and set(known.unique().tolist()) == {0, 1}
    rows, columns = (known[:, 0] == 0).any(dim=2), (known[:, 0] == 0).any(dim=1)
    assert torch.equal(known[:, 0] == 0, rows[:, :, None] & columns[:, None])  # a product
    for inside, side in ((rows, 16), (columns, 32)):
        length, steps = inside.sum(dim=1), inside.int().diff(dim=1).abs().sum(dim=1)
        assert (steps <= 2).all()  # in one piece
        assert length.min() == side // 4 and length.max() == side
        # U(1/4, 1) has the mean 5/8 and the deviation 0.217: 4 errors of a mean of 512
        assert abs(length.float().mean() / side - 0.625) < 4 * 0.217 / 512**0.5
        share = inside.float().mean(dim=0)
        assert torch.allclose(share, share.flip(0), atol=0.1)  # no side is preferred
    # blocks of 32 rows have streams of their own
    whole, half = (
        picture.known(x[:n], Noise("box", rows=(first, 64))) for first, n in ((0, 64), (32, 32))
    )
    assert torch.equal(whole[32:], half)


@pytest.mark.parametrize("member", MEMBERS, ids=name)
def test_planes_say_what_is_known(member: Picture) -> None:
    picture, x = seeing(member), normal(3)
    known = picture.known(x, Noise("m"))
    planes = picture(x, known)
    assert planes.shape == (3, picture.planes, 8, 8) and torch.equal(planes[:, -1:], known)
    assert torch.equal(planes[:, :-1], known * picture.observe(x))
    assert (known == 1).all() == (not isinstance(member, Masked))


def test_rows_that_no_picture_is_made_of_are_refused() -> None:
    mixture = GaussianMixture([[0.0, 0.0]], [1.0])
    for make, said in (
        (lambda: Points(mixture, Grey()), "pictures in colour, and x has the shape"),
        (lambda: Grey().see((1, 8, 8)), "pictures in colour"),
        (lambda: Downsampled(3).see(SHAPE), "'factor': 3.*sides its factor, 2 or more, divides"),
        (lambda: Downsampled(1).see(SHAPE), "2 or more"),
    ):
        with pytest.raises(UserError, match=said):
            make()
    with pytest.raises(ValueError, match=r"least = 1.5 must lie in \(0, 1\)"):
        Masked(1.5)
    Generator(None, Grey(), Pixels(*SHAPE), None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pictures in colour"):
        Generator(None, Grey(), Columns(3), None)  # type: ignore[arg-type]


# --- parts that are left out ---


def both() -> tuple[Picture, Tensor]:
    picture = seeing(Grey(Classes(["red", "blue"])))
    x = normal(1)
    return picture, picture(x, picture.known(x, Noise(0)))[0]


def test_what_is_dropped_is_what_is_left_out() -> None:
    """A dropped part is exactly what generation has where it is not given."""
    picture, planes = both()
    u, null = picture.embed([Given("blue", planes)]), picture.null()
    assert u.tokens is not None and u.tokens[0].tolist() == [[0, 1]]
    assert u.planes is not None and torch.equal(u.planes[0], planes)
    every = torch.ones(1, dtype=torch.bool)
    assert same(u.replaced(null, every, "planes"), picture.embed(["blue"]))
    assert same(u.replaced(null, every, "tokens"), picture.embed([Given("", planes)]))
    assert same(u.replaced(null, every), picture.embed([""])) and same(picture.embed([""]), null)
    assert null.planes is not None and not null.planes.any()
    assert u.planes[:, -1].all()  # which no picture is


def test_a_picture_alone_takes_no_prompt() -> None:
    picture = seeing(Grey())
    assert picture.dim == 0 and picture.null().tokens is None
    assert picture.embed(["", ""]).planes.shape == (2, 2, 8, 8)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="a picture alone: leave out 'red'"):
        picture.embed(["red"])


def test_a_fingerprint_is_of_all_that_decides() -> None:
    made: list[Picture] = [Downsampled(2), Downsampled(4), Masked(), Grey(), Paired()]
    made += [Grey(Classes(["a"])), Grey(Classes(["b"]))]
    prints = [seeing(one).fingerprint() for one in made]
    assert len(set(prints)) == len(prints)
    assert Grey(Classes(["a"])).fingerprint() == prints[5]  # of x's shape the codec says it


# --- a person's pictures ---


def rgba(size: tuple[int, int], key: int = 0) -> Pillow.Image:
    pixels = np.random.default_rng(key).integers(0, 256, (*size[::-1], 4), np.uint8)
    pixels[..., 3] = 255
    return Pillow.fromarray(pixels)


def planes_of(picture: Picture, given: Pillow.Image) -> Tensor:
    generator = Generator(None, picture, Pixels(*SHAPE), None)  # type: ignore[arg-type]
    return generator.given("", given).planes


@pytest.mark.parametrize("member", [Downsampled(2), Grey(), Paired()], ids=name)
def test_a_picture_of_the_size_of_x_is_observed(member: Picture) -> None:
    given = rgba((8, 8))
    x = Pixels(*SHAPE).encode(torch.from_numpy(np.array(given)[..., :3]).permute(2, 0, 1)[None])
    expected = seeing(member)(x, torch.ones(1, 1, 8, 8))[0]
    assert torch.equal(planes_of(member, given), expected)
    with pytest.raises(ValueError, match="it is of 8×7, not 8×8"):
        planes_of(member, rgba((8, 7)))


def test_a_small_picture_is_enlarged() -> None:
    small = rgba((4, 4))
    x = Pixels(3, 4, 4).encode(torch.from_numpy(np.array(small)[..., :3]).permute(2, 0, 1))
    planes = planes_of(Downsampled(2), small)
    assert torch.allclose(planes[:3, ::2, ::2], x) and planes[3].all()
    assert torch.equal(planes[:, ::2], planes[:, 1::2])


def test_transparent_pixels_are_unknown() -> None:
    given = np.array(rgba((8, 8)))
    given[:, 4:, 3] = 0
    planes = planes_of(Masked(), Pillow.fromarray(given))
    assert planes[3, :, :4].all() and not planes[:, :, 4:].any() and planes[:3, :, :4].any()
    with pytest.raises(ValueError, match="no transparent part"):
        planes_of(Masked(), rgba((8, 8)))


# --- data ---


def shapes(conditioning: Conditioning | None, tmp_path: Path, **more: Any) -> Shapes:  # noqa: ANN401
    return Shapes(conditioning, 1, batch_size=8, cache_dir=str(tmp_path), **more)


def batch(data: DataModule, split: str = "train") -> Any:  # noqa: ANN401
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    return data.on_after_batch_transfer(next(iter(loader)), 0)


def test_planes_are_made_of_the_pictures_of_a_batch(tmp_path: Path) -> None:
    data = shapes(Downsampled(4), tmp_path)
    assert data.sizes() == {"u_dim": 0, "planes": 4, "channels": 3, "dims": 2}
    data.setup()
    one = batch(data)
    assert one.u.tokens is None and one.u_null.tokens is None and not one.u_null.planes.any()
    assert torch.equal(one.u.planes, data.picture(one.x, torch.ones_like(one.x[:, :1])))  # type: ignore


def test_a_prompt_stands_beside_a_picture(tmp_path: Path) -> None:
    alone, beside = (shapes(c, tmp_path) for c in (Classes(), Masked(prompt=Classes())))
    for data in (alone, beside):
        data.setup()
    one, two = batch(alone), batch(beside)
    assert beside.sizes() == {**alone.sizes(), "planes": 4}
    assert torch.equal(one.u.tokens, two.u.tokens) and torch.equal(one.x, two.x)
    assert torch.equal(one.u_null.tokens, two.u_null.tokens) and one.u.planes is None


def test_boxes_are_functions_of_seed_and_batches_seen(tmp_path: Path) -> None:
    def planes(seen: int, split: str = "train", seed: int = 0) -> Tensor:
        data = shapes(Masked(), tmp_path, seed=seed)
        data.setup()
        data.seen = lambda: seen  # type: ignore[method-assign]
        trains = split == "train"
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            training=trains,
            limit_train_batches=1.0,
            overfit_batches=0,
            _accelerator_connector=None,
        )
        data.place = lambda: (0, 1)  # type: ignore[method-assign]
        return batch(data, split).u.planes[:, -1]

    assert torch.equal(planes(3), planes(3))
    assert not torch.equal(planes(3), planes(4)) and not torch.equal(planes(3), planes(3, seed=1))
    assert torch.equal(planes(3, "val"), planes(4, "val"))  # what is validated stays the same


def test_a_resumed_run_draws_the_boxes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Boxes(test_data.Recorder):
        def training_step(self, batch: Batch, index: int) -> Tensor:
            assert batch.u is not None and batch.u.planes is not None
            self.seen.append(batch.u.planes[:, -1].flatten(1).cumsum(1).sum(1).tolist())
            return self.weight**2

    monkeypatch.setattr(test_data, "Recorder", Boxes)

    def seen(name: str, checkpoint: str | None = None) -> list[list[float]]:
        data = test_data.Numbers(14, Masked(), batch_size=4, cache_dir=str(tmp_path))
        data.codec = Pixels(1, 8, 8)
        data._rows = {
            split: Source(np.zeros((14, 1, 8, 8), np.uint8), None) for split in data.splits
        }
        return test_data.fit(data, 11, tmp_path / name, checkpoint).seen

    whole = seen("whole")
    assert len(whole) == 11 and len({tuple(one) for one in whole}) == 11
    assert seen("again", str(tmp_path / "whole" / "step=5.ckpt")) == whole[5:]


@pytest.mark.parametrize("prompt", [None, Classes(["a"])], ids=["alone", "prompt"])
def test_what_is_asked_for_has_the_pictures_of_the_truth(
    prompt: Conditioning | None, tmp_path: Path
) -> None:
    data = shapes(Grey(prompt), tmp_path)
    assert data.picture is not None
    values, truth = data.held_out(6)
    assert [str(v) for v in values] == (
        [""] * 6 if prompt is None else shapes(None, tmp_path).held_out(6)[0]
    )
    grey = Grey().observe(data.codec.encode(truth))
    assert torch.equal(torch.stack([v.planes for v in values])[:, :1], grey)
    shown = data.prompts(5)
    assert len(shown) == 5 and all(isinstance(one, Given) for one in shown)
    assert len({one.planes.sum().item() for one in shown}) == 5  # other pictures


# --- pairs ---


def encoded(levels: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Pillow.fromarray(levels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Rows whose second picture is the first upside down."""
    pictures = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    columns = {"image": pictures, "other": pictures[:, ::-1]}
    rows = {k: [encoded(np.ascontiguousarray(p)) for p in v] for k, v in columns.items()}
    types = {k: Image() for k in columns} | {"caption": Value("string")}
    rows |= {"caption": [f"picture {k}" for k in range(24)]}  # type: ignore[dict-item]
    Dataset.from_dict(rows, features=Features(types)).to_parquet(tmp_path / "pairs.parquet")
    return str(tmp_path / "pairs.parquet")


def paired(path: str, tmp_path: Path, **more: Any) -> Hub:  # noqa: ANN401
    given = {"conditioning": Paired(), "condition_image": "other", "size": 8, "batch_size": 8}
    return Hub(path, cache_dir=str(tmp_path / "cache"), **(given | more))


@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_stay_together(pairs: str, workers: int, tmp_path: Path) -> None:
    """Through the memory maps, a loader's process, a flip."""
    data = paired(pairs, tmp_path, flip=True, workers=workers)
    data.setup()
    source = data.rows("train")
    assert source.given is not None and (source.given == source.x[:, :, ::-1]).all()
    raw = next(iter(data.train_dataloader()))
    assert raw.flip.any() and not raw.flip.all()
    one = data.on_after_batch_transfer(raw, 0)
    assert torch.equal(one.u.planes[:, :3], one.x.flip(2)) and one.u.planes[:, 3].all()
    values, truth = data.held_out(1)
    assert torch.equal(values[0].planes[:3], data.codec.encode(truth[0]).flip(1))


def test_pairs_are_a_column_and_a_conditioning(pairs: str, tmp_path: Path) -> None:
    for more, said in (
        ({"condition_image": None}, "is None and data.conditioning a Paired: pairs are"),
        ({"conditioning": None}, "is 'other' and data.conditioning a NoneType"),
        ({"conditioning": Grey()}, "data.conditioning a Grey"),
    ):
        with pytest.raises(UserError, match=said):
            paired(pairs, tmp_path, **more).sizes()
    with pytest.raises(UserError, match=r"no column 'none' \(data.condition_image\)"):
        paired(pairs, tmp_path, condition_image="none").rows("train")
    with pytest.raises(UserError, match="Column 'caption' holds .*, not images"):
        paired(pairs, tmp_path, condition_image="caption").rows("train")


# --- the whole way ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    masked = str(ROOT / "conf/conditioning/masked.yaml")
    guidance = str(ROOT / "conf/guidance/by_part.yaml")
    folder = tmp_path_factory.mktemp("planes") / "run"
    return fit(folder, "--data.conditioning", masked, "--model.guidance", guidance, steps=3)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder of two pictures whose right half is transparent, and something else."""
    folder = tmp_path / "given"
    folder.mkdir()
    for k in range(2):
        pixels = np.array(rgba((32, 32), k))
        pixels[:, 16:, 3] = 0
        Pillow.fromarray(pixels).save(folder / f"{k}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures_are_drawn_from(run: Path, given: Path, tmp_path: Path) -> None:
    assert read(run)["pipeline"]["conditioning"]["class_path"].endswith(".Masked")
    assert (run / "sheets/step-000003.png").exists()
    out, prompts = tmp_path / "out", ["a red circle", "a blue square"]
    args = ["generate", *prompts, "--checkpoint", str(run), "--out", str(out)]
    assert main([*args, "--pictures", str(given), "--number", "2"]) == 0
    samples = json.loads((out / "manifest.json").read_text())["samples"]
    assert [(one["prompt"], Path(one["picture"]).name, one["seed"]) for one in samples] == [
        (prompt, f"{k}.png", seed) for prompt in prompts for k in (0, 1) for seed in (0, 1)
    ]
    with Pillow.open(out / "sheet.png") as sheet:  # 4 lines of what is given and two draws
        assert sheet.width == 8 + 3 * (128 + 8)
    drawn = [Pillow.open(out / one["file"]).tobytes() for one in samples]
    assert len(set(drawn)) == 8  # prompt, picture and seed each count
    args = ["generate", "--checkpoint", str(run), "--out", str(tmp_path / "alone")]
    assert main([*args, "--pictures", str(given / "0.png"), "--number", "1"]) == 0
    (one,) = json.loads((tmp_path / "alone/manifest.json").read_text())["samples"]
    assert one["prompt"] == "" and one["picture"] == str(given / "0.png")


def test_pictures_that_do_not_fit_end_in_one_sentence(
    run: Path, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "a red circle", "--checkpoint", str(run), "--out", str(tmp_path / "o")]
    rgba((9, 32)).save(tmp_path / "narrow.png")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "narrow.png", "narrow.png cannot be drawn from: it is of 9×32, not 32×32"),
        (given / "notes.txt", "notes.txt cannot be drawn from: cannot identify image file"),
        (tmp_path / "none.png", "none.png cannot be drawn from: .*No such file"),
        (tmp_path / "empty", "empty holds no picture"),
    ):
        assert re.search(said, sentence([*generate, "--pictures", str(path)], capsys))
    plain = fit(tmp_path / "plain", "--data.conditioning", "null", steps=1)
    args = ["generate", "--checkpoint", str(plain), "--pictures", str(given)]
    assert "trained without a picture as its condition" in sentence(args, capsys)
    assert not (tmp_path / "o").exists()


def test_a_model_of_pictures_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pictures that are held out: each prompt with its own, whatever the seed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data: Any = Checkpoint(run).data(DataModule)  # type: ignore[type-abstract]
    measure, asked = Measure(data, Own(Means(), 48), 6), []

    def wanted(drawn: Tensor, plan: list[Any], order: object) -> dict[str, Any]:
        asked.extend(one.caption for one in plan)
        return {}

    monkeypatch.setattr("pipeline.evaluation.adherence.shapes_adherence", wanted)
    _, pictures, prompts = measure(Generator.from_checkpoint(run), seed=3)
    assert prompts == asked == [value.prompt for value in measure.values]
    assert pictures.shape == (6, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["downsampled", "masked", "grey"])
def test_samples_obey_their_picture(name: str, tmp_path: Path) -> None:
    """What is observed of a draw is nearer to what was given than to what another was given."""
    conditioning = ["--data.conditioning", str(ROOT / f"conf/conditioning/{name}.yaml")]
    alone = ["--data.conditioning.prompt", "null", "--model.denoiser.network.patch", "2"]
    alone += ["--model.sampler.steps", "8"]
    more = ["--data.per_combination", "8", "--data.batch_size", "16", "--model.warmup", "20"]
    run = fit(tmp_path / "run", *conditioning, *alone, *more, steps=200)
    generator = Generator.from_checkpoint(run)
    picture: Any = generator.conditioning
    values, _ = Checkpoint(run).data(DataModule).held_out(16)  # type: ignore[type-abstract]
    x = torch.cat(list(generator.draw(values, range(16))))
    given = torch.stack([value.planes for value in values])
    known = given[:, -1:]

    def away(other: Tensor) -> float:
        return float(
            ((picture.observe(x) - other[:, :-1]) * known * other[:, -1:]).square().mean()
        )

    assert away(given) < 0.5 * away(given.roll(1, 0))  # measured: see benchmarks/planes.py
