"""Others' libraries around a model of ours: they draw what we draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import contents, fit

from pipeline.building import replace
from pipeline.errors import UserError
from pipeline.generator import Generator

pytest.importorskip("diffusers")

from pipeline.interop import ScoreModel, ScorePipeline  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interop")
    run = fit(folder / "run", steps=3)
    Generator.from_checkpoint(run).save_pretrained(folder / "model")
    return folder


def test_diffusers_loader_opens_it_and_it_draws_the_same(folder: Path) -> None:
    ScorePipeline(ScoreModel.from_pretrained(folder / "model")).save_pretrained(folder / "pipe")
    assert (folder / "pipe/model_index.json").is_file()
    pipe = ScorePipeline.from_pretrained(folder / "pipe")
    pipe.set_progress_bar_config(disable=True)
    own = Generator.from_pretrained(folder / "model")
    prompts = ["a red circle", "a blue square"]
    rows = torch.cat(list(own([p for p in prompts for _ in range(2)], [5, 6, 5, 6])))
    seed = torch.Generator().manual_seed(5)
    images = pipe(prompts, num_images_per_prompt=2, generator=seed).images
    drawn = torch.stack([torch.from_numpy(np.array(one)) for one in images])
    assert torch.equal(drawn.permute(0, 3, 1, 2), rows)
    assert torch.equal(pipe(prompts[0], generator=seed, output_type="pt")[0], rows[:1] / 255)
    assert pipe(prompts[0], output_type="np", return_dict=False)[0].shape == (1, 32, 32, 3)


def test_steps_and_scale_are_of_one_call(folder: Path) -> None:
    pipe = ScorePipeline(ScoreModel.from_pretrained(folder / "model"))
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 4, "guidance_scale": 0.5, "output_type": "pt"}
    first, other, again = (
        pipe("a red circle", **one).images for one in (how, {"output_type": "pt"}, how)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    own = Generator.from_pretrained(folder / "model")
    own.sampler, own.guidance = replace(own.sampler, steps=4), replace(own.guidance, scale=0.5)
    assert torch.equal(first, torch.cat(list(own(["a red circle"], [0]))) / 255)
    for wrong in (
        {"num_inference_steps": 0},
        {"output_type": "jpg"},
        {"num_images_per_prompt": 0},
    ):
        with pytest.raises(ValueError, match="0|jpg"):
            pipe("a red circle", **wrong)


def test_another_dtype_is_refused(folder: Path) -> None:
    pipe = ScorePipeline(ScoreModel.from_pretrained(folder / "model")).to(torch.float16)
    with pytest.raises(ValueError, match=r"draws in float32 and was cast to torch\.float16"):
        pipe("a red circle")


def test_a_changed_weight_is_refused(folder: Path) -> None:
    ScorePipeline(ScoreModel.from_pretrained(folder / "model")).save_pretrained(folder / "changed")
    assert any(name.endswith("model/model.safetensors") for name in contents(folder / "changed"))
    with (folder / "changed/model/model.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(UserError, match="is not the file"):
        ScorePipeline.from_pretrained(folder / "changed")
