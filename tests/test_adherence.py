"""Adherence: spaces made by hand, and a CLIP of random weights by the real path."""

import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import tiny_encoder
from PIL import Image
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.adherence import (
    CLIP,
    clip_score,
    distinct,
    retrieval_accuracy,
)
from pipeline.noise import Noise

PROMPTS = ["a red circle", "a blue square at the left", "two green triangles"]
PROCESSOR = {
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPModel

    folder = tiny_encoder("clip", tmp_path_factory.mktemp("clip"))
    model = CLIPModel.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # random ones make every embedding nearly the same
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
    # two random ones make every cosine nearly 0
    model.text_projection.load_state_dict(model.visual_projection.state_dict())
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIP:
    return CLIP(str(folder))


def any_pictures(n: int, height: int = 8, width: int = 8, contrast: float = 60) -> Tensor:
    x = Noise("pictures").normal(torch.empty(n, 3, height, width))
    return (x * contrast + 128).clamp(0, 255).to(torch.uint8)


def turned(degrees: Tensor) -> Tensor:
    radians = degrees.double() * math.pi / 180
    return torch.stack((radians.cos(), radians.sin()), dim=1)


def test_retrieval_in_the_plane() -> None:
    """Prompts at 0°, 90° and 180°; pictures 30°, 60° and 100° away from their own."""
    prompts = turned(torch.tensor([0, 90, 180]))
    pictures = turned(torch.tensor([30, 60, 80, 150]))
    own = torch.tensor([0, 0, 2, 1])
    # at 30°: right; at 60° the second is nearer; at 80° too, not the third; at 150° the third is
    assert retrieval_accuracy(pictures, prompts, own) == (0.25, pytest.approx(1 / 3))
    assert retrieval_accuracy(pictures, prompts, torch.tensor([0, 1, 1, 2]))[0] == 1
    lengths = torch.tensor([[0.1], [5.0], [40.0]])  # an angle is told, not a length
    assert retrieval_accuracy(pictures, prompts * lengths, own)[0] == 0.25
    assert retrieval_accuracy(pictures * 7, prompts, own)[0] == 0.25


def test_a_tie_is_a_miss() -> None:
    same = torch.ones(3, 4)
    for k in range(3):
        assert retrieval_accuracy(same[:1], same, torch.tensor([k]))[0] == 0


def test_shuffled_prompts_fall_to_chance() -> None:
    n, k, d = 4000, 8, 16
    noise = Noise("space")
    prompts = noise.normal(torch.empty(k, d))
    own = torch.arange(n) % k
    pictures = prompts[own] + 0.2 * noise.normal(torch.empty(n, d))
    accuracy, chance = retrieval_accuracy(pictures, prompts, own)
    assert accuracy > 0.99 and chance == 1 / k
    shuffled = own[noise.uniform(n).argsort()]
    accuracy, chance = retrieval_accuracy(pictures, prompts, shuffled)
    # four standard errors of a share of n
    assert abs(accuracy - chance) < 4 * math.sqrt(chance * (1 - chance) / n)


def test_distinct() -> None:
    prompts, own = distinct(["b", "a", "b", "c", "a"])
    assert prompts == ["b", "a", "c"] and own.tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(
    ("n", "d", "k"), [(0, 2, 3), (2, 3, 3), (2, 2, 1)], ids=["nothing", "dim", "one prompt"]
)
def test_retrieval_refuses(n: int, d: int, k: int) -> None:
    with pytest.raises(ValueError, match="N of at least 1 and K of at least 2"):
        retrieval_accuracy(torch.ones(n, d), torch.ones(k, 2), torch.zeros(n, dtype=torch.int64))


def test_clip_score_in_the_plane() -> None:
    """Prompts at 0°, and pictures further and further away."""
    found = clip_score(3 * turned(torch.tensor([0, 60, 90, 120, 180])), turned(torch.zeros(5)))
    assert torch.allclose(found, torch.tensor([100.0, 50, 0, 0, 0]).double(), atol=1e-9)


def test_clip_score_by_hand(clip: CLIP, folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    pictures = any_pictures(3)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore
    mean, std = (torch.tensor(PROCESSOR[f"image_{k}"])[:, None, None] for k in ("mean", "std"))
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=(pictures / 255 - mean) / std, **tokens)
    # what the model gives of all pictures and prompts, but for a learned factor
    cosine = out.logits_per_image / model.logit_scale.exp()
    assert cosine.max() > 0.05 and cosine.std() > 0.01  # or little is compared
    for i in range(3):
        found = clip_score(clip(pictures.roll(i, 0)), clip.embed(PROMPTS))
        expected = 100 * cosine.roll(i, 0).diagonal().clamp(min=0)
        assert torch.allclose(found, expected, rtol=0, atol=1e-4)  # float32, of 100


def test_prompt_alone_and_in_company(clip: CLIP) -> None:
    """The padding that unequal lengths need changes nothing, nor does the size of a batch."""
    together = clip.embed(PROMPTS)
    alone = torch.cat([clip.embed([prompt]) for prompt in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-5)  # sums in another order
    assert torch.allclose(together, clip.embed(PROMPTS, batch_size=2), atol=1e-5)
    assert (together - together.roll(1, 0)).abs().max() > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip.embed(PROMPTS), together)


def test_long_prompt_is_cut(clip: CLIP) -> None:
    long = clip.embed(["a red circle " * 40, "a red circle " * 50])
    assert torch.equal(long[0], long[1])


@pytest.mark.parametrize(("height", "width"), [(20, 31), (31, 20), (9, 8), (5, 7), (8, 8)])
def test_picture_is_prepared_as_pillow_would(clip: CLIP, height: int, width: int) -> None:
    """Shorter side to 8, bicubic, and the middle. Pillow rounds and clips between its two passes
    too; what it clips there is left out of this, with pictures of little contrast.
    """
    (picture,) = any_pictures(1, height, width, contrast=20)
    size = width * 8 // min(height, width), height * 8 // min(height, width)
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 8) // 2, (size[1] - 8) // 2
    pixels = np.array(image.crop((left, top, left + 8, top + 8)))
    mean, std = (torch.tensor(PROCESSOR[f"image_{k}"])[:, None, None] for k in ("mean", "std"))
    found = clip.prepare(picture[None].float())[0] * std + mean
    levels = (255 * found - torch.as_tensor(pixels).permute(2, 0, 1)).abs()
    assert levels.max() < 1.01 and levels.mean() < 0.3


def test_every_size_is_cut_to_one(clip: CLIP) -> None:
    for side in range(1, 64):
        assert clip.prepare(torch.zeros(1, 3, side, 63)).shape == (1, 3, 8, 8)


def test_retrieval_in_a_clip(clip: CLIP) -> None:
    """Random weights know nothing: what the path from pictures to a share must do is not fail."""
    pictures, (prompts, own) = any_pictures(6), distinct(PROMPTS * 2)
    embedded = torch.cat([clip(some) for some in pictures.split(4)])
    accuracy, chance = retrieval_accuracy(embedded, clip.embed(prompts), own)
    assert embedded.shape == (6, clip.dim) and 0 <= accuracy <= 1
    assert chance == pytest.approx(1 / 3)


def test_protocol_says_the_crop(clip: CLIP) -> None:
    assert "shorter side" in clip.protocol and "centre 8 x 8" in clip.protocol


def test_refusals(clip: CLIP, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 pictures need a prompt each, and 3 prompts"):
        clip_score(clip(any_pictures(2)), clip.embed(PROMPTS))
    with pytest.raises(UserError, match="is not a folder"):
        CLIP("./nowhere").embed(PROMPTS)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(UserError, match="lacks a tokenizer"):
        CLIP(str(tmp_path)).embed(PROMPTS)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="The tokenizer in .* could not be read"):
        CLIP(str(tmp_path)).embed(PROMPTS)


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(UserError, match="was not found: a folder with .*or a Hugging Face hub"):
        CLIP("nobody/no-such-clip").embed(PROMPTS)


def test_model_without_text(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = ViTConfig(**size, num_attention_heads=2, image_size=8, patch_size=4)  # type: ignore
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads pictures and no text"):
        CLIP(str(tmp_path)).embed(PROMPTS)
