"""What a model says of itself: written once, read once, by whoever trained it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fit, read
from torch import Tensor

from pipeline.checkpoint import VERSION, Checkpoint, about, write
from pipeline.codec import Columns, Pixels
from pipeline.conditioning import Classes
from pipeline.data import DataModule, Shapes
from pipeline.denoisers import EDM
from pipeline.errors import UserError
from pipeline.generator import Generator
from pipeline.guidance import ClassifierFree
from pipeline.networks import MLP
from pipeline.samplers import Heun
from pipeline.schedules import VP


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("checkpoint") / "run", steps=2)


def denoiser() -> EDM:
    torch.manual_seed(0)
    network = MLP(2, 2, width=16, depth=1)
    torch.nn.init.normal_(network.output.weight)
    return EDM(network, VP())


PARTS: dict[str, Any] = {
    "codec": Columns(2),
    "conditioning": Classes(["up", "down"]),
    "sampler": Heun(3),
    "guidance": ClassifierFree(2.0),
}


def drawn(generator: Generator) -> Tensor:
    return torch.cat(list(generator(["up", "down", "up"], [1, 2, 3], micro_batch=2)))


def test_a_model_trained_from_python_is_drawn_from(tmp_path: Path) -> None:
    model = denoiser()
    halved = {name: w / 2 for name, w in model.state_dict().items()}
    write(
        tmp_path / "m.ckpt", model, **PARTS, averages={"half": halved, "same": model.state_dict()}
    )
    before = drawn(Generator(model, **PARTS))
    assert torch.equal(
        drawn(Generator.from_checkpoint(tmp_path / "m.ckpt", average="trained")), before
    )
    assert torch.equal(
        drawn(Generator.from_checkpoint(tmp_path / "m.ckpt", average="same")), before
    )
    model.load_state_dict(halved)
    first = drawn(Generator.from_checkpoint(tmp_path / "m.ckpt"))  # the first average
    assert torch.equal(first, drawn(Generator(model, **PARTS))) and not torch.equal(first, before)
    with pytest.raises(UserError, match="no average 'ema'; it has trained, half, same"):
        Generator.from_checkpoint(tmp_path / "m.ckpt", average="ema")
    with pytest.raises(UserError, match="does not say its data"):
        Checkpoint(tmp_path / "m.ckpt").data(DataModule)


def test_everything_is_said_once(run: Path) -> None:
    told = read(run)["pipeline"]
    assert told["version"] == VERSION and told["data"]["init_args"]["conditioning"] is None
    assert told["conditioning"]["class_path"].endswith("TextEncoder")
    checkpoint = Checkpoint(run)
    data = checkpoint.data(DataModule)
    assert isinstance(data, Shapes) and data.conditioning.name == "minilm"  # type: ignore
    assert data.per_combination == 1 and checkpoint.part("codec", Pixels).shape == (3, 32, 32)
    again = about(
        checkpoint.denoiser(),
        data.codec,
        data.conditioning,
        checkpoint.part("sampler", Heun),
        checkpoint.optional("guidance", ClassifierFree),
        data,
        data.prompts(),
    )
    assert again == told


def damage(told: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    return {k: v for k, v in (told | {key: value}).items() if v != "gone"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", 99, "of version 99 and this program reads"),
        ("version", "x", "of version 'x'"),
        ("denoiser", "gone", "does not say its denoiser"),
        ("sampler", "gone", "does not say its sampler"),
        ("fingerprint", "gone", "does not say its fingerprint"),
        ("denoiser", 3, "cannot be built: denoiser is 3; expected Denoiser"),
        ("sampler", {"class_path": "pipeline.mcmc.ULA"}, "no Sampler"),
        ("codec", {"class_path": "pipeline.schedules.VP"}, "no Codec"),
        ("guidance", {"class_path": "pipeline.samplers.Heun"}, "no Guidance"),
        ("conditioning", {"class_path": "pipeline.codec.Columns"}, "no Conditioning"),
        ("denoiser", {"class_path": "torch.nn.Identity"}, "not in a trusted package"),
        ("denoiser", {"class_path": "pipeline.cli.main"}, "which is not a class"),
        ("denoiser", {"class_path": "pipeline.cli"}, "which is not a class"),
        ("denoiser", {"class_path": "pipeline.cli.Parser"}, "no Denoiser"),
    ],
)
def test_what_is_wrong_in_it_is_one_sentence(
    key: str, value: object, said: str, tmp_path: Path
) -> None:
    write(tmp_path / "m.ckpt", denoiser(), **PARTS)
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    content["pipeline"] = damage(content["pipeline"], key, value)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=said) as error:
        Generator.from_checkpoint(tmp_path / "bad.ckpt")
    assert "bad.ckpt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["wider", "fewer", "words", "int64", "complex64"])
def test_weights_that_do_not_fit_are_one_sentence(weights: str, tmp_path: Path) -> None:
    write(tmp_path / "m.ckpt", denoiser(), **PARTS)
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    name = next(iter(content["state_dict"]))
    if weights == "wider":
        content["state_dict"][name] = torch.zeros(7, 7)
    elif weights == "fewer":
        del content["state_dict"][name]
    elif weights != "words":
        content["state_dict"][name] = content["state_dict"][name].to(getattr(torch, weights))
    else:
        content["state_dict"][name] = "words"
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="bad.ckpt do not fit its network") as error:
        Generator.from_checkpoint(tmp_path / "bad.ckpt")
    assert "\n" not in str(error.value)


def test_a_conditioning_that_changed_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.ckpt", denoiser(), **PARTS)
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    content["pipeline"]["conditioning"]["init_args"]["names"] = ["down", "up"]
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="trained with another Classes"):
        Generator.from_checkpoint(tmp_path / "bad.ckpt")


def test_a_stopped_draw_leaves_the_model_as_it_was() -> None:
    model = denoiser().train()
    rows = Generator(model, **PARTS)(["up", "down"], [1, 2], micro_batch=1)
    next(rows)
    assert not model.training
    rows.close() if hasattr(rows, "close") else None
    del rows
    assert model.training
