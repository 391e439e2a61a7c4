"""Feature networks: what they compute, what they say of it, and what they refuse."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import ROOT
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, interpolate, max_pool2d

from pipeline.errors import UserError
from pipeline.evaluation.distances import (
    density_coverage,
    frechet,
    kernel_distance,
    precision_recall,
)
from pipeline.evaluation.features import EfficientNetLite0, Inception, Own, Vision
from pipeline.evaluation.features import efficientnet as efficientnet_module
from pipeline.evaluation.features import inception as inception_module
from pipeline.evaluation.statistics import Statistics
from pipeline.files import sha256
from pipeline.noise import Noise

CIFAR = ROOT / "../shared/data/cifar10/test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """64 of CIFAR-10."""
    if not CIFAR.is_file():
        pytest.skip(f"{CIFAR} is not there")
    from pyarrow.parquet import ParquetFile

    rows = next(ParquetFile(CIFAR).iter_batches(64, columns=["img"]))["img"].to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows]
    return torch.as_tensor(np.stack(pixels)).permute(0, 3, 1, 2)


def any_pictures(n: int, side: int = 32, channels: int = 3) -> Tensor:
    """Smooth ones: what a network sees of noise is noise."""
    coarse = Noise("pictures").normal(torch.empty(n, channels, 4, 4))
    x = interpolate(coarse, (side, side), mode="bicubic")
    return (x * 60 + 128).clamp(0, 255).to(torch.uint8)


class Corners(nn.Module):
    """A network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x[:, :, 0, :2].flatten(1)).bfloat16()


def test_what_every_feature_network_keeps_to() -> None:
    own = Own(Corners(), dim=6, protocol="as it is")
    x = any_pictures(4, 8)
    found = own(x)
    assert found.shape == (4, own.dim) and found.dtype == torch.float32
    assert not found.requires_grad and found[0, 0] == 2 * x[0, 0, 0, 0]
    grey = any_pictures(4, 8, channels=1)
    assert torch.equal(own(grey), own(grey.expand(-1, 3, -1, -1)))
    batches = list(own.read(x.numpy(), batch_size=3))
    assert [len(some) for some in batches] == [3, 1] and torch.equal(torch.cat(batches), found)
    for bad in (x.float(), x[0], x[:, :2]):
        with pytest.raises(ValueError, match="expected torch.uint8 of shape"):
            own(bad)
    assert not own.classified
    with pytest.raises(NotImplementedError, match="has no classes"):
        own.logits(found)


def test_a_fingerprint_is_of_all_that_decides() -> None:
    other = Corners()
    other.scale.data += 1
    prints = [
        Own(Corners(), 6).fingerprint(),
        Own(other, 6).fingerprint(),
        Own(Corners(), 6, "scaled").fingerprint(),
        EfficientNetLite0(112).fingerprint(),
        EfficientNetLite0(1280).fingerprint(),
        Inception().fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert Own(Corners(), 6).fingerprint() == prints[0]


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite0:
    return EfficientNetLite0(1280)


def test_autocast_outside_changes_nothing(lite: EfficientNetLite0) -> None:
    x = any_pictures(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lite(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, lite(x))


def test_efficientnet_taps(lite: EfficientNetLite0) -> None:
    """The 112 features are the means of block 10 inside the whole network."""
    x, seen = any_pictures(2), []
    hook = lite.network.blocks[10].register_forward_hook(lambda *args: seen.append(args[2]))
    assert lite(x).shape == (2, 1280)
    hook.remove()
    torch.testing.assert_close(EfficientNetLite0(112)(x), seen[0].mean((2, 3)))
    assert lite.classified and lite.logits(lite(x)).shape == (2, 1000)
    assert not EfficientNetLite0(112).classified
    with pytest.raises(ValueError, match="dim is 320"):
        EfficientNetLite0(320)


def test_efficientnet_knows_what_it_sees(lite: EfficientNetLite0) -> None:
    """Grace Hopper, whose portrait comes with matplotlib, wears a military uniform: class 652 of
    1000 has probability 0.20 to 0.44 in four crops. With the odd pixel of padding before instead
    of after, 0.10 to 0.19; with the colours in reverse, down to 0.17.
    """
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(portrait) as opened:
        crops = [ImageOps.fit(opened, (448, 448), centering=(0.5, at)) for at in (0, 0.5, 1)]
    crops.append(ImageOps.mirror(crops[1]))
    x = torch.as_tensor(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
    uniform = lite.logits(lite(x)).softmax(1)[:, 652]
    assert uniform.min() > 0.19 and uniform.mean() > 0.3


def test_the_stem_pads_after(lite: EfficientNetLite0) -> None:
    """As TensorFlow does: its first place sees the pixels 0, 1 and 2, and none before."""
    x, seen = torch.full((1, 3, 224, 224), 127, dtype=torch.uint8), []
    hook = lite.network.conv_stem.register_forward_hook(lambda *args: seen.append(args[2]))
    lite(x)
    x[:, :, 2, 2] = 255
    lite(x)
    hook.remove()
    assert not torch.equal(seen[0][:, :, 0, 0], seen[1][:, :, 0, 0])


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "altered/models" / f"efficientnet-lite0-{efficientnet_module.SHA256[:8]}.pth"
    file.parent.mkdir(parents=True)
    (tmp_path / "altered" / "__init__.py").touch()
    torch.save({"_fc.bias": torch.zeros(3)}, file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet_module, "PACKAGE", "altered")
    with pytest.raises(UserError, match="not hold the weights of efficientnet-lite0-pytorch-mod"):
        EfficientNetLite0()(any_pictures(1))
    with pytest.raises(UserError, match="not hold the weights of the Inception-v3 of FID"):
        Inception(str(file))(any_pictures(1))
    with pytest.raises(UserError, match="is no file"):
        Inception("nowhere.pth")(any_pictures(1))
    monkeypatch.setattr(efficientnet_module, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="is needed and not installed; .*other features"):
        EfficientNetLite0()(any_pictures(1))


def test_without_a_connection_inception_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=r"no route.*fetch https://github.com/mseitzer"):
        Inception()(any_pictures(1))


# The published file: its layers by torchvision's names, as output, input, height, width.
STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
}


def block_a(i: int, pooled: int) -> dict[str, tuple[int, ...]]:
    return {
        "1x1": (64, i, 1, 1),
        "5x5_1": (48, i, 1, 1),
        "5x5_2": (64, 48, 5, 5),
        "3x3dbl_1": (64, i, 1, 1),
        "3x3dbl_2": (96, 64, 3, 3),
        "3x3dbl_3": (96, 96, 3, 3),
        "_pool": (pooled, i, 1, 1),
    }


def block_c(w: int) -> dict[str, tuple[int, ...]]:
    return {
        "1x1": (192, 768, 1, 1),
        "7x7_1": (w, 768, 1, 1),
        "7x7_2": (w, w, 1, 7),
        "7x7_3": (192, w, 7, 1),
        "7x7dbl_1": (w, 768, 1, 1),
        "7x7dbl_2": (w, w, 7, 1),
        "7x7dbl_3": (w, w, 1, 7),
        "7x7dbl_4": (w, w, 7, 1),
        "7x7dbl_5": (192, w, 1, 7),
        "_pool": (192, 768, 1, 1),
    }


def block_e(i: int) -> dict[str, tuple[int, ...]]:
    return {
        "1x1": (320, i, 1, 1),
        "3x3_1": (384, i, 1, 1),
        "3x3_2a": (384, 384, 1, 3),
        "3x3_2b": (384, 384, 3, 1),
        "3x3dbl_1": (448, i, 1, 1),
        "3x3dbl_2": (384, 448, 3, 3),
        "3x3dbl_3a": (384, 384, 1, 3),
        "3x3dbl_3b": (384, 384, 3, 1),
        "_pool": (192, i, 1, 1),
    }


MIXED: dict[str, dict[str, tuple[int, ...]]] = {
    "5b": block_a(192, 32),
    "5c": block_a(256, 64),
    "5d": block_a(288, 64),
    "6a": {
        "3x3": (384, 288, 3, 3),
        "3x3dbl_1": (64, 288, 1, 1),
        "3x3dbl_2": (96, 64, 3, 3),
        "3x3dbl_3": (96, 96, 3, 3),
    },
    "6b": block_c(128),
    "6c": block_c(160),
    "6d": block_c(160),
    "6e": block_c(192),
    "7a": {
        "3x3_1": (192, 768, 1, 1),
        "3x3_2": (320, 192, 3, 3),
        "7x7x3_1": (192, 768, 1, 1),
        "7x7x3_2": (192, 192, 1, 7),
        "7x7x3_3": (192, 192, 7, 1),
        "7x7x3_4": (192, 192, 3, 3),
    },
    "7b": block_e(1280),
    "7c": block_e(2048),
}

# How a block is wired: branches side by side, "/" for stride 2, "a+b" for two beside each other.
A = "1x1 | 5x5_1 5x5_2 | 3x3dbl_1 3x3dbl_2 3x3dbl_3 | mean _pool"
C = "1x1 | 7x7_1 7x7_2 7x7_3 | 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 | mean _pool"
E = "1x1 | 3x3_1 3x3_2a+3x3_2b | 3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b | {} _pool"
WIRES = dict.fromkeys(("5b", "5c", "5d"), A) | dict.fromkeys(("6b", "6c", "6d", "6e"), C)
WIRES |= {"6a": "3x3/ | 3x3dbl_1 3x3dbl_2 3x3dbl_3/ | max/", "7b": E.format("mean")}
WIRES |= {"7a": "3x3_1 3x3_2/ | 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/ | max/", "7c": E.format("max")}


def published(seed: int = 0) -> dict[str, Tensor]:
    """Made-up weights under the published names, such that activations keep their scale."""
    layers = STEM | {
        f"Mixed_{block}.branch{name}": shape
        for block, parts in MIXED.items()
        for name, shape in parts.items()
    }
    noise, state = Noise("inception", seed), {}
    for name, shape in layers.items():
        state[f"{name}.conv.weight"] = (
            noise.normal(torch.empty(shape)) / (np.prod(shape[1:]) / 2) ** 0.5
        )
        for part, mean, spread in (("weight", 1, 0.1), ("bias", 0, 0.1), ("running_mean", 0, 0.1)):
            state[f"{name}.bn.{part}"] = mean + spread * noise.normal(torch.empty(shape[0]))
        state[f"{name}.bn.running_var"] = 0.5 + noise.uniform(shape[0])
    state["fc.weight"] = noise.normal(torch.empty(1008, 2048)) / 2048**0.5
    state["fc.bias"] = noise.normal(torch.empty(1008))
    return state


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published graph, read from the tables above."""

    def conv(x: Tensor, name: str, stride: int = 1, padded: bool = True) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        padding = [size // 2 if padded else 0 for size in weight.shape[2:]]
        x = conv2d(x, weight, stride=stride, padding=padding)
        parts = ("running_mean", "running_var", "weight", "bias")
        return batch_norm(x, *(state[f"{name}.bn.{part}"] for part in parts), eps=1e-3).relu()

    def chain(x: Tensor, block: str, names: str) -> Tensor:
        for name in names.split():
            bare, stride = name.rstrip("/"), 2 if name.endswith("/") else 1
            if bare == "mean":
                inside = avg_pool2d(torch.ones_like(x), 3, 1, 1)
                x = avg_pool2d(x, 3, 1, 1) / inside
            elif bare == "max":
                x = max_pool2d(x, 3, stride, 1 if stride == 1 else 0)
            else:
                parts = [f"Mixed_{block}.branch{part}" for part in bare.split("+")]
                x = torch.cat([conv(x, part, stride, stride == 1) for part in parts], 1)
        return x

    x = conv(conv(x, "Conv2d_1a_3x3", 2, False), "Conv2d_2a_3x3", padded=False)
    x = max_pool2d(conv(x, "Conv2d_2b_3x3"), 3, 2)
    x = conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", padded=False)
    x = max_pool2d(x, 3, 2)
    for block in MIXED:
        x = torch.cat([chain(x, block, names) for names in WIRES[block].split("|")], 1)
    return x.mean((2, 3))


def test_inception_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes, wiring and protocol, with made-up weights."""
    state = published()
    numbers = sum(value.numel() for value in state.values())
    assert 0.99 * 95_628_359 < 4 * numbers < 95_628_359  # the published file's bytes
    torch.save(state, tmp_path / inception_module.FILE)
    monkeypatch.setattr(inception_module, "SHA256", sha256(tmp_path / inception_module.FILE))
    inception = Inception(str(tmp_path / inception_module.FILE))
    x = any_pictures(2, 40)
    found = inception(x)
    assert found.shape == (2, inception.dim)
    assert inception.classified
    scaled = interpolate(x / 127.5 - 1, (299, 299), mode="bilinear", align_corners=False)
    # sums in another order through 48 layers of float32
    torch.testing.assert_close(found, by_hand(state, scaled), rtol=1e-3, atol=1e-4)
    assert found.std() > 0.01
    torch.testing.assert_close(inception.logits(found), found @ state["fc.weight"].T)


def vision(kind: str, folder: Path) -> Any:
    """A small random vision model, saved as real ones are."""
    import transformers as hf

    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sides: dict[str, Any] = {"image_size": 16, "patch_size": 4}
    text = small | {"intermediate_size": 32, "vocab_size": 9, "max_position_embeddings": 4}
    models: dict[str, Callable[[], Any]] = {
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**small, **sides)),
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config=text,
                vision_config=small | sides | {"intermediate_size": 32},
                projection_dim=12,
            )
        ),
        "vit": lambda: hf.ViTModel(
            hf.ViTConfig(**small, **sides, intermediate_size=32), add_pooling_layer=False
        ),
        "resnet": lambda: hf.ResNetModel(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models[kind]().eval()
    model.save_pretrained(folder)
    said = {"crop_size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3]}
    said |= {"image_std": [0.2, 0.3, 0.4], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return model


@pytest.mark.parametrize(
    ("kind", "dim"), [("dinov2", 16), ("clip", 12), ("vit", 16), ("resnet", 16)]
)
def test_vision_models(kind: str, dim: int, tmp_path: Path) -> None:
    model, features = vision(kind, tmp_path), Vision(str(tmp_path))
    x = any_pictures(3, 16)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    scaled = (x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        if kind == "clip":
            expected = model.visual_projection(model.vision_model(scaled).pooler_output)
        elif kind == "resnet":
            expected = model(scaled).last_hidden_state.mean((2, 3))
        else:
            expected = model(scaled).last_hidden_state[:, 0]  # the class token
    found = features(x)
    assert found.shape == (3, features.dim) == (3, dim)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "16 x 16" in features.protocol and "0.4" in features.protocol
    before = features.fingerprint()
    vision("vit" if kind != "vit" else "dinov2", tmp_path / "other")
    assert Vision(str(tmp_path / "other")).fingerprint() != before


def test_vision_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        Vision("./nowhere")(any_pictures(1))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lacks model.safetensors"):
        Vision(str(tmp_path))(any_pictures(1))
    vision("vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="lacks preprocessor_config.json"):
        Vision(str(tmp_path / "vit"))(any_pictures(1))
    vision("vit", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be read"):
        Vision(str(tmp_path / "cut"))(any_pictures(1))


def test_a_model_that_is_on_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("offline")

    for name in ("snapshot_download", "HfApi"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    with pytest.raises(UserError, match="'nobody/nothing' was not found"):
        Vision("nobody/nothing")(any_pictures(1))


@pytest.mark.parametrize("dim", [112, pytest.param(1280, marks=pytest.mark.slow)])
def test_noise_is_seen_in_the_right_order(dim: int, photographs: Tensor) -> None:
    """Photographs beside others, and beside those with more and more noise, in grey levels."""
    features = EfficientNetLite0(dim)
    real, others = features(photographs[:32]), photographs[32:]
    steps = [features(noisy(others, level)) for level in (0, 8, 25)]
    a = Statistics(dim).update(real)
    found = {
        "frechet": [frechet(a, Statistics(dim).update(step)) for step in steps],
        "kernel": [kernel_distance(real, step, Noise("ladder"), 1).value for step in steps],
        "precision": [-precision_recall(real, step).precision for step in steps],
        "density": [-density_coverage(real, step).density for step in steps],
        "coverage": [-density_coverage(real, step).coverage for step in steps],
    }
    for distance, values in found.items():
        assert values == sorted(values) and values[0] < values[1], (distance, values)


def noisy(x: Tensor, level: float) -> Tensor:
    noise = Noise("ladder", int(level)).normal(x.float())
    return (x + level * noise).round().clamp(0, 255).to(torch.uint8)
