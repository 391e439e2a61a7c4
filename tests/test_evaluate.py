"""`evaluate`: the right pictures against the right ones, each point of a sweep once, on any number
of processes.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import tiny_encoder
from PIL import Image
from test_adherence import PROCESSOR
from test_tracking import apart, records
from tiny import ROOT, fit
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from pipeline.cli import main
from pipeline.codec import Pixels
from pipeline.conditioning import Classes
from pipeline.data import Hub, Relations, Shapes
from pipeline.evaluation import shapes
from pipeline.evaluation.adherence import CLIP, clip_score
from pipeline.evaluation.distances import frechet, inception_score, kernel_distance
from pipeline.evaluation.features import Own
from pipeline.evaluation.measure import Measure, read
from pipeline.evaluation.report import block, context
from pipeline.evaluation.statistics import Statistics
from pipeline.evaluation.sweep import over
from pipeline.generator import Generator
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers import Likelihood


class Means(nn.Module):
    """The mean colours of sixteen blocks: 48 features in no time."""

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x.float() / 255, x.shape[-1] // 4).flatten(1)


class Colours(nn.Module):
    """The mean colour alone: three features, so that few pictures are many."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3)) / 255


class Classified(Own):
    """Features with classes: which of the first ten is the largest."""

    classified = True

    def logits(self, features: Tensor) -> Tensor:
        return 20 * features[:, :10]


MEANS = """
class_path: pipeline.evaluation.features.Own
init_args:
  module: {class_path: test_evaluate.Means}
  dim: 48
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained run, and the features to evaluate it with beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "means.yaml").write_text(MEANS)
        yield fit(folder / "run")


def command(run: Path, *args: str) -> list[str]:
    features = ["--features", str(run.parent / "means.yaml"), "--device", "cpu"]
    return ["evaluate", "--checkpoint", str(run), "--micro-batch", "4", *features, *args]


def evaluate(run: Path, out: Path, *args: str) -> dict[str, Any]:
    """The result in the one JSON that is written."""
    assert main(command(run, "--out", str(out), *args)) == 0
    return json.loads(out.read_text())


def small(path: Path) -> list[Shapes | Hub]:
    """Data with few rows: shapes, and ten pictures in two classes, or without."""
    from datasets import ClassLabel, Dataset, Image

    drawn = Shapes(None, 8, cache_dir=str(path / "cache"))
    pixels = drawn.rows("train").x
    images = []
    for k in range(40):
        file = path / f"{k}.png"
        _save(pixels[k], file)
        images.append({"bytes": file.read_bytes(), "path": None})
    table = Dataset.from_dict({"image": images, "caption": [k % 2 for k in range(40)]})
    table = table.cast_column("image", Image()).cast_column(
        "caption", ClassLabel(names=["a", "b"])
    )
    for split, rows in (("train", range(30)), ("test", range(30, 40))):
        (path / "hub").mkdir(exist_ok=True)
        table.select(rows).to_parquet(path / "hub" / f"{split}-00000-of-00001.parquet")
    kwargs: dict[str, Any] = {"val_split": "test", "cache_dir": str(path / "cache")}
    hub = [Hub(str(path / "hub"), c, **kwargs) for c in (Classes(["a", "b"]), None)]
    return [drawn, *hub]


def _save(pixels: np.ndarray, file: Path) -> None:
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file)


class Copies(Generator):
    """Draws given pictures, as a perfect model might."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures, self.asked = pictures, []

    def __call__(self, values: Any, seeds: Any, *_: object) -> Iterator[Tensor]:  # type: ignore
        self.asked = list(zip(values, seeds, strict=True))
        yield self.pictures


def test_what_is_held_out(tmp_path: Path) -> None:
    drawn, classes, unconditional = small(tmp_path)
    values, truth = drawn.held_out(100)
    unseen = {one.caption: one for one in drawn.combinations("unseen")}  # type: ignore
    assert len(unseen) == 48 and set(values) == set(unseen) and len(truth) == 100
    assert max(values.count(value) for value in unseen) == 3  # each twice before any three times
    # the detector reads clean drawings without a mistake, so they show what was asked
    assert [unseen[value] for value in values] == shapes.read(truth)

    pairs = Relations(None, 1, cache_dir=str(tmp_path / "cache"))
    assert set(pairs.held_out(20)[0]) <= set(pairs.captions("unseen"))

    x, labels, *_ = classes.rows("val")
    values, truth = classes.held_out(13)
    assert truth.shape == (10, 3, 32, 32) and len(values) == 13
    rows = [next(k for k in range(10) if np.array_equal(x[k], one)) for one in truth.numpy()]
    assert sorted(rows) == list(range(10)) and labels is not None
    assert values[:10] == [labels[k] for k in rows]
    assert unconditional.held_out(3)[0] == ["", "", ""]


def test_true_pictures_score_the_floor_and_the_training_pictures_0(tmp_path: Path) -> None:
    """Whoever draws the true pictures is as good as they are: the same formula, the same sets."""
    _, data, _ = small(tmp_path)
    features = Own(Means(), 48)
    measure = Measure(data, features, 10)
    assert measure.reference.statistics.n == 30  # 10 for each drawn, or all
    copies = Copies(measure.truth)
    scores, pictures, prompts = measure(copies, seed=5)
    assert measure.floor == {"number": 10} | scores
    assert torch.equal(pictures, measure.truth)
    assert copies.asked == list(zip(measure.values, range(5, 15), strict=True))
    assert prompts == measure.values

    train = torch.tensor(np.array(data.rows("train").x))
    x, y = features(train), features(measure.truth)
    direct = frechet(Statistics(48).update(x), Statistics(48).update(y))
    assert scores["frechet"] == pytest.approx(direct, rel=1e-9)
    # the same pictures on both sides, but in another order
    whole = measure.score(train, ["a"] * 30)
    assert whole["frechet"] == pytest.approx(0, abs=1e-8)  # cancels traces of about 3 in float64
    assert (whole["precision"], whole["recall"], whole["coverage"]) == (1, 1, 1)
    unbiased = kernel_distance(x, x, Noise("any")).value
    assert whole["kernel"] == pytest.approx(unbiased, rel=1e-9)
    # one of them again and again: each is precise, and only that one is recalled
    collapsed = measure.score(train[:1].expand(30, -1, -1, -1), ["a"] * 30)
    assert (collapsed["precision"], collapsed["recall"]) == (1, 1 / 30)
    assert collapsed["density"] > 0 and collapsed["coverage"] > 0  # in a ball around a true one


def test_inception_score_is_of_all_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.measure.KEPT", 9)  # neighbours are of fewer
    _, data, _ = small(tmp_path)
    features = Classified(Means(), 48)
    measure = Measure(data, features, 10)
    pictures = torch.tensor(np.array(data.rows("train").x))
    scores = measure.score(pictures, ["a"] * 30)
    mean, deviation = inception_score(features.logits(features(pictures)), Noise("splits"), 10)
    assert scores["inception_score"] == pytest.approx(mean, rel=1e-6) and mean > 1.01  # float32
    assert scores["inception_score_deviation"] == pytest.approx(deviation, rel=1e-4)
    assert deviation > 0
    # ten pictures are ten splits of one, each as clear as their mean; without classes, none
    assert measure.floor["inception_score"] == pytest.approx(1)
    assert measure.score(pictures[:6], ["a"] * 6)["inception_score"] == pytest.approx(1)
    assert "inception_score" not in Measure(data, Own(Means(), 48), 10).floor


def test_frechet_within_each_class(tmp_path: Path) -> None:
    _, data, free = small(tmp_path)
    features = Own(Colours(), 3)
    measure = Measure(data, features, 10)
    own = np.array(measure.values)
    x, train = measure.truth, torch.tensor(np.array(data.rows("train").x))
    for one in (measure, Measure(data, features, 2)):  # references of all 30 rows, and of 20
        rows = one.reference.rows
        expected = {
            label: frechet(
                Statistics(3).update(features(train[rows[rows % 2 == k]])),
                Statistics(3).update(features(x[own == label])),
            )
            for k, label in enumerate("ab")  # rows take turns
        }
        found = one.score(x, measure.values)["frechet_by_class"]
        assert found == pytest.approx(expected, rel=1e-6) and found["a"] != found["b"]
    assert measure.floor["frechet_by_class"].keys() == {"a", "b"}

    # with three of a class its covariance is singular; one class is not several; "c" is unknown
    assert "frechet_by_class" in measure.score(x[:8], ["a", "b"] * 4)
    assert "frechet_by_class" not in measure.score(x[:7], ["a", "b"] * 3 + ["a"])
    assert "frechet_by_class" not in measure.score(x, ["a"] * 10)
    assert "frechet_by_class" not in measure.score(x, ["a", "c"] * 5)
    assert "frechet_by_class" not in Measure(data, Own(Means(), 48), 10).floor  # 15 of each
    assert "frechet_by_class" not in Measure(free, features, 10).floor


def test_the_worst_classes_are_told() -> None:
    distances = {"cat": 3.0, "dog": 1.0, "ship": 4.0, "frog": 2.0}
    result = {"pictures": 9, "spread": None, "frechet": 1.0, "floor": {"frechet": 0.5}}
    said = block(result | {"frechet_by_class": distances}).splitlines()[-1]
    assert said == (
        "frechet within the worst of 4 classes: ship 4 (true pictures nan), cat 3 (true pictures "
        "nan), frog 2 (true pictures nan)"
    )
    result["floor"]["frechet_by_class"] = dict.fromkeys(distances, 0.25)
    assert "cat 3 (true pictures 0.25)" in block(result | {"frechet_by_class": distances})
    repeats = [{"frechet_by_class": {"cat": k, "dog": 2 * k}} for k in (1.0, 2.0)]
    assert over(repeats, statistics.fmean) == {"frechet_by_class": {"cat": 1.5, "dog": 3.0}}


def test_inception_score_is_told_beside_that_of_true_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classified.yaml").write_text(
        MEANS.replace("pipeline.evaluation.features.Own", "test_evaluate.Classified")
    )
    own = ["--features", str(tmp_path / "classified.yaml"), "--number", "24", "--seeds", "2"]
    told = evaluate(run, tmp_path / "r.json", *own)
    of_each = [one["inception_score"] for one in told["repeats"]]
    assert told["inception_score"] == pytest.approx(statistics.mean(of_each))
    said = capsys.readouterr().out
    assert (
        f"inception_score {told['inception_score']:.4g} ± {told['spread']['inception_score']:.2g} "
        f"(over splits: ± {told['inception_score_deviation']:.2g})   "
        f"true pictures {told['floor']['inception_score']:.4g}\n"
    ) in said and "only that of Inception-v3" in context(told)


def test_likelihood_is_that_of_the_unguided_denoiser(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    likelihood = Likelihood(8)
    monkeypatch.setattr(
        "pipeline.evaluation.sweep.Likelihood", lambda: likelihood
    )  # in little time
    asked = ["--number", "6", "--likelihood", "6", "--seed", "3", "--scale", "30,1"]
    assert main(command(run, "--out", str(tmp_path), *asked)) == 0
    first, second = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    said = capsys.readouterr().out

    generator = Generator.from_checkpoint(run / "last.ckpt")
    values, truth = Shapes(None, 1).held_out(6)
    noise = PictureNoise(range(3, 9))
    x = Pixels(3, 32, 32).dequantise(truth, noise)
    log_prob = likelihood(generator.denoiser, x, generator.embed(values), noise)
    bits = np.log2(127.5) - log_prob.numpy() / (3 * 32 * 32 * np.log(2))
    # in micro-batches of 4 a convolution sums in another order; other seeds are 1e-5 away
    assert first["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-6)
    error = bits.std(ddof=1) / np.sqrt(6)
    assert first["bits_per_dim_error"] == pytest.approx(error, rel=1e-4)
    assert first["likelihood"] == {"pictures": 6, "steps": 8, "probes": 1}
    assert "6 true pictures" in said and "8 steps with 1 probe" in said
    assert f"{first['bits_per_dim']:.4g}" in said
    for name in ("bits_per_dim", "bits_per_dim_error"):
        assert second[name] == first[name]  # at either scale


def test_a_ladder_shows_what_a_distance_looks_like(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = evaluate(run, tmp_path / "r.json", "--number", "6", "--ladder")
    rungs = told["ladder"]
    assert list(rungs) == [
        "with noise of 1 grey level",
        "with noise of 2 grey levels",
        "with noise of 4 grey levels",
        "with noise of 8 grey levels",
        "blurred, 3 × 3",
    ]
    x = Shapes(None, 1).held_out(6)[1].float()
    eight = (x + 8 * Noise("ladder").normal(x)).round().clamp(0, 255).byte()
    data = Shapes(None, 1, cache_dir=str(tmp_path))
    measure = Measure(data, Own(Means(), 48), 6)
    # the noise of a level comes after that of the others: the same law, other numbers
    assert rungs["with noise of 8 grey levels"] == pytest.approx(
        measure.score(eight, measure.values)["frechet"], rel=0.2
    )
    assert f", {rungs['blurred, 3 × 3']:.4g} blurred, 3 × 3" in capsys.readouterr().out
    assert "ladder" not in evaluate(run, tmp_path / "s.json", "--number", "6")


def test_features_are_kept_in_order() -> None:
    pictures = torch.arange(150 * 3 * 64).view(150, 3, 8, 8).remainder(251).to(torch.uint8)
    features = Own(Means(), 48)
    found, rows = read(features, pictures)
    torch.testing.assert_close(rows, features(pictures))
    expected = Statistics(48).update(features(pictures))
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=1e-6, atol=1e-6)  # float32
    assert found.n == 150


def test_a_result_says_what_it_is_to_be_compared_with(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = evaluate(run, tmp_path / "r.json", "--number", "9", "--seeds", "2", "--seed", "3")
    said = capsys.readouterr().out
    assert told["pictures"] == told["floor"]["number"] == 9
    assert told["floor"]["frechet"] > 0 and f"{told['floor']['frechet']:.4g}" in said
    assert told["reference"]["pictures"].startswith("90 of 192 pictures")  # 10 for each
    assert told["reference"]["data"][:16] in said and told["reference"]["protocol"] in said
    assert "fewer than 10,000 pictures" in said and "prompts shuffled" in said
    assert told["chance"]["all"] == pytest.approx(1 / 240)
    # Heun with two times is a long step, so Euler's, and the mean; guidance doubles the first
    assert told["evaluations"] == 3
    assert (tmp_path / "r.png").exists()

    of_each = [one["frechet"] for one in told["repeats"]]
    assert told["frechet"] == pytest.approx(statistics.mean(of_each))
    assert told["spread"]["frechet"] == pytest.approx(statistics.stdev(of_each)) and (
        told["spread"]["accuracy"]["mean"] >= 0
    )
    second = evaluate(run, tmp_path / "s.json", "--number", "9", "--seed", "12")  # 3 + 9
    assert second["frechet"] == of_each[1] and second["spread"] is None
    first = evaluate(run, tmp_path / "t.json", "--number", "9", "--seed", "3")
    assert first["frechet"] == of_each[0]
    assert main(command(run, "--out", str(tmp_path / "t.json"), "--number", "9")) == 2
    assert "t.json holds another result" in capsys.readouterr().err


def test_classes_and_pictures_without_any(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From `fit` to a score on data of one's own, one model for each of two classes, one free."""
    small(tmp_path)
    (tmp_path / "means.yaml").write_text(MEANS)
    network = "--model.denoiser.network"
    for name, conditioning, u_dim in (
        ("classes", '{"names": ["a", "b"]}', "2"),
        ("free", "", "0"),
    ):
        own = ["--data.path", str(tmp_path / "hub"), "--data.image", "image", "--data.caption"]
        own += ["caption", f"{network}.widths", "[16, 16, 16]", f"{network}.u_dim", u_dim]
        own += ["--data.conditioning.init_args", conditioning] if conditioning else []
        own += [] if conditioning else ["--data.conditioning", "null"]
        own += ["--data.cache_dir", str(tmp_path / "cache"), "--run", str(tmp_path / name)]
        own += ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--data.batch_size"]
        own += ["4", "--trainer.logger", "false", "--model.sampler.steps", "2"]
        own += ["--model.guidance", str(ROOT / "conf/guidance/classifier_free.yaml")]
        assert main(["fit", "-c", str(ROOT / "conf/experiment/cifar10.yaml"), *own]) == 0
        told = evaluate(tmp_path / name, tmp_path / f"{name}.json", "--number", "12")
        assert told["floor"]["number"] == 10 and told["frechet"] > told["floor"]["frechet"]
        assert told["evaluations"] == (4 if conditioning else 2) and "accuracy" not in told
    assert main(command(tmp_path / "free", "--number", "12", "--likelihood", "11")) == 2
    assert "--likelihood 11 is more than the 10 pictures" in capsys.readouterr().err


def test_clip_scores_prompts(tmp_path: Path) -> None:
    _, data, _ = small(tmp_path)
    tiny_encoder("clip", tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    clip = CLIP(str(tmp_path / "clip"))
    measure = Measure(data, Own(Means(), 48), 10, clip)
    scores, pictures, prompts = measure(Copies(measure.truth))
    expected = clip_score(clip(pictures), clip.embed(prompts)).mean().item()
    assert scores["clip_score"] == pytest.approx(expected, rel=1e-5)  # prompts in other company
    assert 0 <= scores["retrieval"] <= 1 and measure.floor["clip_score"] == scores["clip_score"]


def sweep(run: Path, out: Path, *more: str) -> int:
    ddim = str(ROOT / "conf/sampler/ddim.yaml")
    heun = str(ROOT / "conf/sampler/heun.yaml")
    which = ["--sampler", ddim, "--sampler", heun, "--steps", "1,3", "--scale", "1"]
    return main(command(run, "--out", str(out), "--number", "6", *which, *more))


def test_a_sweep_goes_on_where_it_stopped(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int]] = []
    draw = Generator.__call__

    def watched(self: Generator, *args: Any) -> Iterator[Tensor]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append((type(self.sampler).__name__, self.sampler.steps))
        return draw(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "__call__", watched)
        assert sweep(run, tmp_path) == 130
    assert drawn == [("DDIM", 1), ("DDIM", 3)] and len(list(tmp_path.glob("*.json"))) == 2
    (broken, whole) = sorted(tmp_path.glob("*.json"))
    broken.write_text(broken.read_text()[:50])
    times = whole.stat().st_mtime_ns
    assert sweep(run, tmp_path) == 0
    assert whole.stat().st_mtime_ns == times and "finished before" in capsys.readouterr().err
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    asked = {(r["sampler"]["class"], r["sampler"]["steps"]): r["evaluations"] for r in results}
    assert asked == {("DDIM", 1): 1, ("DDIM", 3): 3, ("Heun", 1): 1, ("Heun", 3): 3}
    assert (tmp_path / "sweep.png").exists()

    monkeypatch.setattr(Generator, "__call__", None)  # nothing is left to draw
    assert sweep(run, tmp_path) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[1:5] == ["sampler", "steps", "scale", "evaluations"]
    assert [line.split()[1:3] for line in table[1:5]] == [
        ["DDIM", "1"],
        ["DDIM", "3"],
        ["Heun", "1"],
        ["Heun", "3"],
    ]


def test_wandb_holds_table_and_summary(run: Path, tmp_path: Path) -> None:
    args = command(run, "--out", str(tmp_path / "r.json"), "--number", "6", "--wandb")
    done = apart(["-m", "pipeline", *args], tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "r.json").read_text())
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    summary, config = {}, {}
    for record in records(file):
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.run.config.update if record.HasField("run") else record.config.update:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert summary["eval/frechet"] == told["frechet"]
    assert summary["eval/frechet_floor"] == told["floor"]["frechet"]
    assert any(name.startswith("evaluation") for name in summary)
    assert "python -m pipeline evaluate" in json.dumps(config)


def test_bad_input_ends_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIPELINE_RUN", raising=False)
    points = run.parent / "points"
    mixture = ["fit", "-c", str(ROOT / "conf/experiment/mixture.yaml"), "--run", str(points)]
    few = ["--data.rows", "64", "--data.val_rows", "64", "--trainer.logger", "false"]
    assert main([*mixture, *few, "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]) == 0
    file = ["--out", str(tmp_path / "r.json")]
    for checkpoint, args, said in (
        (run, ["--number", "5"], "--number 5 must be at least 6"),
        (run, ["--seeds", "0"], "--seeds 0 at least 1"),
        (run, ["--likelihood", "1"], "--likelihood 1 must be at least 2"),
        (run, ["--steps", "1,two"], "--steps 1,two is no list of numbers"),
        (run, ["--scale", "1,2"], "give --out FOLDER, not none"),
        (run, ["--scale", "1,2", *file], "give --out FOLDER"),
        (run, ["--wandb"], "--wandb needs --out"),
        (run, ["--features", "no.yaml"], "no.yaml: there is no such file"),
        (run, ["--clip", str(tmp_path / "clip"), "--number", "6"], "is not a folder"),
        (points, ["--number", "6"], "Points, whose rows are vectors of 2 numbers"),
    ):
        capsys.readouterr()
        assert main(command(checkpoint, *args)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [11, 6])  # 3 micro-batches for 2 processes, and 2
def test_two_processes_measure_as_one(run: Path, tmp_path: Path, number: int) -> None:
    many = ["--number", str(number), "--scale", "2", "--likelihood", "5"]
    one = evaluate(run, tmp_path / "one.json", *many)
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = command(run, "--out", str(tmp_path / "two.json"), *many)
    done = subprocess.run(
        [sys.executable, *processes, "-m", "pipeline", *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures of what was held out") == 1  # the first process alone
    two = json.loads((tmp_path / "two.json").read_text())
    # the same pictures, bit for bit; the statistics add up in another order, in float64
    sheets = [Image.open(tmp_path / f"{name}.png").tobytes() for name in ("one", "two")]
    assert sheets[0] == sheets[1]
    assert two["accuracy"] == one["accuracy"] and two["evaluations"] == one["evaluations"]
    assert two["bits_per_dim"] == pytest.approx(one["bits_per_dim"], rel=1e-6)  # in float32
    for name in ("frechet", "kernel", "kernel_low", "precision", "density"):
        assert two[name] == pytest.approx(one[name], rel=1e-10)
        assert two["floor"][name] == pytest.approx(one["floor"][name], rel=1e-10)
