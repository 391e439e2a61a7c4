"""The doors, opened as a person would."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from encoders import tiny_encoder
from PIL import Image
from tiny import ROOT, fit, launch, read, sentence

from pipeline.cli import DOORS, main
from pipeline.samplers import DDIM, Heun

PROMPT = "a small red circle at the top left"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("cli") / "run")


def draw(run: Path, out: Path, *args: str) -> dict:
    assert main(["generate", "--checkpoint", str(run), "--out", str(out), *args]) == 0
    return json.loads((out / "manifest.json").read_text())


def test_pictures_say_how_they_were_made(run: Path, tmp_path: Path) -> None:
    manifest = draw(run, tmp_path / "out", PROMPT, "a blue square", "--number", "2", "--seed", "5")
    assert [one["seed"] for one in manifest["samples"]] == [5, 6, 5, 6]
    for one in manifest["samples"]:
        with Image.open(tmp_path / "out" / one["file"]) as picture:
            assert picture.size == (32, 32)
            told = json.loads(picture.text["Settings"])  # type: ignore[attr-defined]
        assert told["prompt"] == one["prompt"] and told["seed"] == one["seed"]
        assert told["sampler"]["steps"] == 2 and told["guidance"]["scale"] == 2.0
    assert (tmp_path / "out" / "sheet.png").exists()


def pixels(out: Path, i: int) -> bytes:
    with Image.open(out / f"{i:05d}.png") as picture:
        return picture.tobytes()


def test_a_picture_does_not_depend_on_its_neighbours(run: Path, tmp_path: Path) -> None:
    """Alone, among others, in another micro-batch of the same size: the same to the last bit."""
    draw(run, tmp_path / "alone", PROMPT, "--number", "1", "--micro-batch", "4")
    others = ["a large green cross", "a much longer prompt with many words in it", PROMPT]
    draw(run, tmp_path / "among", *others, "--number", "3", "--micro-batch", "4")
    assert pixels(tmp_path / "alone", 0) == pixels(tmp_path / "among", 6)
    assert pixels(tmp_path / "among", 6) != pixels(tmp_path / "among", 7)  # another seed
    draw(run, tmp_path / "wide", PROMPT, "--number", "1", "--micro-batch", "7")
    with Image.open(tmp_path / "wide" / "00000.png") as picture:
        wide = torch.tensor(list(picture.tobytes()))
    alone = torch.tensor(list(pixels(tmp_path / "alone", 0)))
    assert (wide - alone).abs().max() <= 1  # of 255: the order of summation inside of layers


def test_another_sampler_is_really_used(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[object] = []
    for cls in (Heun, DDIM):
        step = cls.step
        monkeypatch.setattr(
            cls, "step", lambda self, *args, step=step: used.append(self) or step(self, *args)
        )
    draw(run, tmp_path / "own", PROMPT, "--number", "1")
    assert [type(one) for one in used] == [Heun]  # 2 times, 1 step between
    used.clear()
    ddpm = str(ROOT / "conf/sampler/ddpm.yaml")
    manifest = draw(
        run, tmp_path / "ddpm", PROMPT, "--number", "1", "--sampler", ddpm, "--steps", "5"
    )
    assert [type(one) for one in used] == [DDIM] * 4 and {one.eta for one in used} == {1.0}  # type: ignore
    assert manifest["sampler"] == {"class": "DDIM", "steps": 5, "eta": 1.0, "rho": 5.0}
    assert pixels(tmp_path / "own", 0) != pixels(tmp_path / "ddpm", 0)


def test_scale_0_ignores_the_prompt(run: Path, tmp_path: Path) -> None:
    draw(run, tmp_path / "out", PROMPT, "a large blue square", "--number", "1", "--scale", "0")
    assert pixels(tmp_path / "out", 0) == pixels(tmp_path / "out", 1)
    draw(run, tmp_path / "one", PROMPT, "a large blue square", "--number", "1", "--scale", "1")
    assert pixels(tmp_path / "one", 0) != pixels(tmp_path / "one", 1)


def test_a_negative_prompt_stands_for_the_null_condition(run: Path, tmp_path: Path) -> None:
    """D(no) + w (D(u) − D(no)): with w = 0 the picture is that of the other prompt."""
    other, no = "a large blue square", "--guidance.negative"
    draw(run, tmp_path / "no", PROMPT, "--number", "1", "--scale", "0", no, other)
    draw(run, tmp_path / "other", other, "--number", "1", "--scale", "1")
    a, b = (torch.tensor(list(pixels(tmp_path / name, 0))) for name in ("no", "other"))
    assert (a - b).abs().max() <= 1  # of 255: a batch of as many rows, in another place of it
    manifest = draw(run, tmp_path / "plain", PROMPT, "--number", "1")
    assert pixels(tmp_path / "plain", 0) != pixels(tmp_path / "no", 0)
    assert manifest["guidance"]["negative"] is None


def test_a_model_without_a_condition_takes_nothing_to_guide_it_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", "--data.conditioning", "null", steps=1)
    args = ["generate", "--checkpoint", str(run), "--out", str(tmp_path / "out"), "--number", "1"]
    for option, value in (
        ("--scale", "3"),
        ("--guidance.negative", "a red circle"),
        ("--guidance.interval", "[0.2, 3]"),
        ("--guidance", str(ROOT / "conf/guidance/high_noise.yaml")),
    ):
        said = sentence([*args, option, value], capsys)
        assert "nothing to guide it by: leave out " + option in said
    assert "takes no prompt, such as 'red'" in sentence([*args, "red"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_interval_of_guidance(run: Path, tmp_path: Path) -> None:
    """One that no time of the grid is in is no guidance."""
    args = ["--number", "1", "--guidance.interval", "[1e5, 1e6]"]
    manifest = draw(run, tmp_path / "none", PROMPT, *args)
    assert manifest["guidance"]["interval"] == [1e5, 1e6]
    draw(run, tmp_path / "one", PROMPT, "--number", "1", "--scale", "1")
    assert pixels(tmp_path / "none", 0) == pixels(tmp_path / "one", 0)


def test_the_average_is_what_is_drawn_with(run: Path, tmp_path: Path) -> None:
    checkpoint = read(run)
    for name, weight in checkpoint["averages"]["0.9"].items():
        checkpoint["state_dict"][name] = torch.zeros_like(weight)
    torch.save(checkpoint, tmp_path / "zeros.ckpt")
    draw(run, tmp_path / "a", PROMPT, "--number", "1")
    draw(tmp_path / "zeros.ckpt", tmp_path / "b", PROMPT, "--number", "1")
    assert pixels(tmp_path / "a", 0) == pixels(tmp_path / "b", 0)


def test_prompts_from_a_file_and_from_standard_input(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\n  a green triangle \n")
    manifest = draw(run, tmp_path / "a", "--prompts", str(file), "--number", "1")
    assert [one["prompt"] for one in manifest["samples"]] == [PROMPT, "a green triangle"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cross\n"))
    manifest = draw(run, tmp_path / "b", "--prompts", "-", "--number", "1")
    assert [one["prompt"] for one in manifest["samples"]] == ["a cross"]


def test_without_a_prompt_the_run_chooses(run: Path, tmp_path: Path) -> None:
    manifest = draw(run, tmp_path / "out", "--number", "1")
    assert len(manifest["samples"]) == 16  # distinct captions of the validation data


def test_evaluate_prints_accuracy_beside_chance(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = tmp_path / "result.json"
    args = ["evaluate", "--checkpoint", str(run), "--number", "6", "--out", str(result)]
    assert main(args) == 0
    told = json.loads(result.read_text())
    assert told["chance"]["all"] == pytest.approx(1 / 240) and 0 <= told["accuracy"]["mean"] <= 1
    assert told["reference"]["features"] == "efficientnet-lite0-112"
    assert told["frechet"] > told["floor"]["frechet"] > 0  # hardly trained
    assert "prompts shuffled" in capsys.readouterr().out
    assert result.with_suffix(".png").exists()


def test_bad_input_ends_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generate = ["generate", "--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert "no trained model" in sentence(["generate", PROMPT], capsys)
    assert "nowhere.ckpt" in sentence(["generate", PROMPT, "--checkpoint", "nowhere.ckpt"], capsys)
    assert "Prompt 2 is empty" in sentence([*generate, PROMPT, "  "], capsys)
    assert "--number 0" in sentence([*generate, PROMPT, "--number", "0"], capsys)
    assert "steps = 0" in sentence([*generate, PROMPT, "--steps", "0"], capsys)
    assert "none.txt" in sentence([*generate, "--prompts", "none.txt"], capsys)
    assert "none.yaml" in sentence([*generate, PROMPT, "--sampler", "none.yaml"], capsys)
    assert "cuda:7" in sentence([*generate, PROMPT, "--device", "cuda:7"], capsys)
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompt" in sentence([*generate, "--prompts", "empty.txt"], capsys)
    (tmp_path / "file").write_text("")
    assert "file/out" in sentence([*generate[:3], PROMPT, "--out", "file/out"], capsys)
    (tmp_path / "broken.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:1000])
    assert "cut short" in sentence(["generate", PROMPT, "--checkpoint", "broken.ckpt"], capsys)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    said = sentence(["generate", PROMPT, "--checkpoint", "foreign.ckpt"], capsys)
    assert "does not say how to build its model" in said
    assert not (tmp_path / "out").exists()  # nothing is made before all is known to be well


def test_earlier_pictures_are_never_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(run, tmp_path / "out", PROMPT, "--number", "1")
    again = ["generate", PROMPT, "--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert "holds results already" in sentence(again, capsys)


def test_a_checkpoint_may_not_name_foreign_classes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read(run)
    marker = tmp_path / "marker"
    for path in ("subprocess.Popen", "os.system", "pipeline.generator.torch", "pipeline.cli.main"):
        node = {"class_path": path, "init_args": {"args": ["touch", str(marker)]}}
        checkpoint["pipeline"]["denoiser"] = node
        torch.save(checkpoint, tmp_path / "bad.ckpt")
        said = sentence(["generate", PROMPT, "--checkpoint", str(tmp_path / "bad.ckpt")], capsys)
        assert path in said
    assert not marker.exists()


def test_bad_settings_of_training_end_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    u_dim = "--model.denoiser.network.u_dim"
    capsys.readouterr()
    assert launch(tmp_path / "run", u_dim, "7") == 2
    assert "set model.denoiser.network.u_dim to 384, or to null" in capsys.readouterr().err
    assert launch(tmp_path / "run", "--data.batch_size", "0") == 2
    assert "batch_size is 0" in capsys.readouterr().err
    assert "no-run/config.yaml" in sentence(["fit", "--resume", "no-run"], capsys)


def test_resume_spells_out_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run has nothing left to do, and resuming says so by ending well."""
    step = read(run)["global_step"]
    assert main(["fit", "--resume", str(run)]) == 0
    assert read(run)["global_step"] == step
    assert (run / "config-1.yaml").exists()  # the first config is kept


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in DOORS)],
)
def test_help_comes_at_once(command: list[str]) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", *command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "usage: python -m pipeline" in done.stdout
    assert "torch" not in done.stderr  # what takes seconds is not imported
    assert time.monotonic() - start < 30  # hangs, not slowness


@pytest.mark.parametrize("kind", ["clip_text", "t5"])
def test_any_text_encoder_goes_the_whole_way(kind: str, tmp_path: Path) -> None:
    """fit → checkpoint → generate with an encoder that is not the packaged one."""
    encoder = tiny_encoder(kind, tmp_path / kind)
    run = fit(tmp_path / "run", "--data.conditioning.name", str(encoder), steps=2)
    manifest = draw(run, tmp_path / "out", "a red circle", "--number", "1")
    assert manifest["samples"][0]["prompt"] == "a red circle"


def test_an_encoder_changed_since_training_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = tiny_encoder("bert", tmp_path / "bert")
    run = fit(tmp_path / "run", "--data.conditioning.name", str(encoder), steps=1)
    for file in encoder.iterdir():
        file.unlink()
    tiny_encoder("clip_text", encoder)  # of the same width
    assert "trained with another TextEncoder" in sentence(
        ["generate", PROMPT, "--checkpoint", str(run)], capsys
    )


OWN = """
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Denoiser
from pipeline.noise import Noise
from pipeline.samplers import Sampler, State


class OneStep(Sampler):
    evaluations = 1

    def __init__(self, brightness: float) -> None:
        super().__init__(steps=1, rho=1.0)
        self.brightness = brightness

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        return state

    def last(self, denoiser: Denoiser, state: State, t: Tensor, u: U, noise: Noise) -> State:
        return State(0 * denoiser(state.x, t, u) + self.brightness)
"""


def test_a_sampler_of_ones_own_is_one_file_and_one_yaml(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ones_own.py").write_text(OWN)
    node = "class_path: ones_own.OneStep\ninit_args: {brightness: 0.0}\n"
    (tmp_path / "one_step.yaml").write_text(node)
    args = [PROMPT, "--number", "1", "--sampler", "one_step.yaml"]
    said = sentence(["generate", "--checkpoint", str(run), "--out", "a", *args], capsys)
    assert "ones_own.OneStep" in said and "--trust" in said and not (tmp_path / "a").exists()
    trust = ["--trust", "ones_own"]
    manifest = draw(run, tmp_path / "b", *trust, "--sampler.brightness", "1", *args)
    assert manifest["sampler"] == {"class": "OneStep", "brightness": 1.0}
    assert set(pixels(tmp_path / "b", 0)) == {255}
    (said,) = [one["prompt"] for one in manifest["samples"]]
    assert said == PROMPT  # and not the 1


def test_a_weaker_model_guides(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = ["--guidance", str(ROOT / "conf/guidance/autoguidance.yaml")]
    weak = fit(tmp_path / "weak", steps=1)
    by = [*conf, "--guidance.denoiser", str(weak), "--number", "1", PROMPT]
    manifest = draw(run, tmp_path / "a", *by, "--scale", "3")
    told = {"class": "Autoguidance", "denoiser": str(weak), "scale": 3.0, "interval": None}
    assert manifest["guidance"] == told
    draw(run, tmp_path / "b", PROMPT, "--number", "1", "--scale", "1")
    draw(weak, tmp_path / "c", PROMPT, "--number", "1", "--scale", "1")
    draw(run, tmp_path / "d", *by, "--scale", "1")
    draw(run, tmp_path / "e", *by, "--scale", "0")
    assert pixels(tmp_path / "d", 0) == pixels(tmp_path / "b", 0)
    assert pixels(tmp_path / "e", 0) == pixels(tmp_path / "c", 0)
    assert pixels(tmp_path / "a", 0) != pixels(tmp_path / "b", 0)
    missing = ["generate", "--checkpoint", str(run), "--out", str(tmp_path / "f"), PROMPT, *conf]
    assert "denoiser is null; expected Denoiser" in sentence(missing, capsys)


def test_prompts_are_composed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = ["--guidance", str(ROOT / "conf/guidance/composed.yaml"), "--number", "1", PROMPT]
    also = ["--guidance.also", "[a blue square, a green circle]"]
    manifest = draw(run, tmp_path / "a", *conf, *also, "--scale", "2")
    assert manifest["guidance"]["also"] == ["a blue square", "a green circle"]
    # of nothing but the prompt it is classifier-free guidance
    draw(run, tmp_path / "b", *conf, "--scale", "2")
    plain = ["--guidance", str(ROOT / "conf/guidance/classifier_free.yaml")]
    draw(run, tmp_path / "c", *plain, "--scale", "2", "--number", "1", PROMPT)
    one, two, three = (pixels(tmp_path / name, 0) for name in "abc")
    assert one != two
    assert max(abs(a - b) for a, b in zip(two, three, strict=True)) <= 1  # rounding of the sum
    refused = ["generate", "--checkpoint", str(run), *conf, "--guidance.either", "[a blue square]"]
    assert "a score and no density" in sentence([*refused, "--out", str(tmp_path / "d")], capsys)


def test_a_picture_is_completed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is known of it is drawn as it is, with a prompt and guidance for the rest."""
    known = Image.effect_noise((32, 32), 80).convert("RGB")
    known.putalpha(Image.linear_gradient("L").resize((32, 32)).point(lambda k: 255 * (k > 127)))
    known.save(tmp_path / "known.png")
    conf = ["--guidance", str(ROOT / "conf/guidance/inpaint.yaml"), "--number", "2", PROMPT]
    given = ["--guidance.known", str(tmp_path / "known.png")]
    manifest = draw(run, tmp_path / "a", *conf, *given, "--scale", "2")
    assert manifest["guidance"]["class"] == "MomentMatching"
    drawn = [Image.open(tmp_path / "a" / f"{k:05d}.png") for k in range(2)]
    lower = [one.crop((0, 17, 32, 32)).tobytes() for one in (known.convert("RGB"), *drawn)]
    assert lower[0] == lower[1] == lower[2]
    assert drawn[0].tobytes() != drawn[1].tobytes()
    known.resize((12, 12)).save(tmp_path / "known.png")
    refused = ["generate", "--checkpoint", str(run), "--out", str(tmp_path / "b"), *conf, *given]
    assert "smaller by a whole factor" in sentence(refused, capsys)


def test_the_whole_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    experiment = ["fit", "-c", str(ROOT / "conf/experiment/shapes.yaml"), "--model.warmup", "7"]
    assert main([*experiment, "--print_config"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["model"]["warmup"] == 7 and told["trainer"]["gradient_clip_val"] == 1.0
    network = told["model"]["denoiser"]["init_args"]["network"]["init_args"]
    assert (network["u_dim"], network["channels"]) == (384, 3)  # read from the data
    assert main([*experiment, "--help-all"]) == 0
    said = capsys.readouterr().out
    assert "--model.warmup 7  (int)  The number of steps over which the learning rate" in said
    assert "--data.per_combination 32  (int)  Training drawings of each" in said
    assert "--trainer.max_steps 1800  (int)  Stop training after this number of steps" in said


@pytest.mark.parametrize("what", [["fit", "-c", "conf/experiment/shapes.yaml"], ["generate"]])
def test_a_python_without_the_packages_is_told_where_they_are(what: list[str]) -> None:
    """As the system's own, which `python` is before the environment is entered."""
    line = [sys.executable, "-S", "-m", "pipeline", *what]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: \S+ has no module \w+: `make setup` .* `\. \.venv/bin/activate` enters\.\n",
        done.stderr,
    )


def test_unknown_options_are_refused_with_the_near_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = ["fit", "-c", str(ROOT / "conf/experiment/shapes.yaml")]
    for args, said in (
        (["generate", PROMPT, "--nmber", "3"], "--nmber; did you mean --number"),
        (["generate", PROMPT, "--check", "x"], "no option --check"),  # no abbreviations
        (["evaluate", "--wandbb"], "--wandbb; did you mean --wandb"),
        (["evaluate", "x"], "'x' belongs to no option"),
        ([*experiment, "--data.batchsize", "3"], "batchsize is not an argument of Shapes; did"),
        ([*experiment, "--trainer.max_step", "3"], "did you mean max_steps"),
        ([*experiment, "--modl.warmup", "3"], "modl is not known; did you mean model?"),
        ([*experiment, "--model.sampler", "ddim"], "conf/sampler/ddim.yaml"),
        ([*experiment, "--model.sampler", "conf/kernel/ula.yaml"], "which is no Sampler"),
        ([*experiment, "--seed_everything", "x"], "seed_everything is 'x'; expected int"),
        (["blah"], "invalid choice: 'blah'"),
        (["generate", PROMPT, "--seed", "x"], "--seed: invalid int value: 'x'"),
    ):
        assert said in sentence(args, capsys)
