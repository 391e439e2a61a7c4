r"""Any vision model of `transformers`: DINOv2, CLIP, SigLIP, ViT, ResNet …

The feature is what the model offers as the summary of a picture: the projected embedding where it
has one (CLIP, SigLIP), else the pooled output (DINOv2: its class token), else the first token, or
the mean over places of a convolutional model.

A published distance of these features, such as FD-DINOv2, brings the whole picture to the model's
input by bicubic resizing with antialiasing, without the crop that the model's own processor would
make; so does this one. Weights are read from safetensors files only, and code that comes with a
model is never run.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.evaluation.features.base import Features, freeze, resize
from pipeline.files import model_folder, sha256

__all__ = ["Vision"]

FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


class Vision(Features):
    """The image embedding of a frozen `transformers` model.

    References:
        | Stein et al., 2023; https://arxiv.org/abs/2306.04675
        | Oquab et al., 2023; https://arxiv.org/abs/2304.07193

    Arguments:
        model: A local folder (config.json, preprocessor_config.json, model.safetensors), or a
            name on the Hugging Face hub; what is in the hub's local cache is not looked up again.

    Raises:
        UserError: At first use, when the model cannot be found or read.
    """

    def __init__(self, model: str) -> None:
        self.model, self.name = model, Path(model).name

    @cached_property
    def folder(self) -> Path:
        """Where the files of the model lie."""
        example = "a folder with config.json, preprocessor_config.json and model.safetensors"
        return model_folder(self.model, [*FILES, *WEIGHTS], lacks, "features.model", example)

    @cached_property
    def dim(self) -> int:
        """The length D of a feature."""
        return self(torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)).shape[1]

    @property
    def protocol(self) -> str:
        mean, std = (tuple(round(v, 6) for v in values) for values in self.scaling)
        return f"uint8, {self.resizing}, (x / 255 - {mean}) / {std}"

    @property
    def resizing(self) -> str:
        """How a picture gets the size of the network's input, in words."""
        return f"bicubic with antialiasing to {self.side} x {self.side} unrounded"

    @property
    def weights(self) -> str:
        files = sorted({*self.folder.glob("*.safetensors"), self.folder / "config.json"})
        return sha256(*files)

    @cached_property
    def processor(self) -> dict[str, Any]:
        """What the model's own processor is configured to do."""
        for name in FILES[1:]:
            if (self.folder / name).is_file():
                said = json.loads((self.folder / name).read_text())
                return said.get("image_processor", said)
        raise UserError(
            f"The model in {self.folder} lacks preprocessor_config.json, which says how large and "
            "how scaled its input is; save its image processor there."
        )

    @property
    def side(self) -> int:
        """The side of the network's input, in pixels."""
        size = self.processor.get("crop_size") or self.processor.get("size") or 224
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or 224
        return int(size)

    @property
    def scaling(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of a channel, of values in [0, 1]."""
        if not self.processor.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return self.processor["image_mean"], self.processor["image_std"]

    @cached_property
    def network(self) -> nn.Module:
        from transformers import AutoModel

        try:
            model, report = AutoModel.from_pretrained(
                self.folder,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"The model in {self.folder} could not be read: {error}") from error
        pooler = {key for key in report["missing_keys"] if "pooler" in key}
        missing = sorted(set(report["missing_keys"]) - pooler)
        if missing:
            raise UserError(
                f"The weights in {self.folder} lack {len(missing)} tensors of the network that "
                f"its config.json describes, such as {missing[0]}."
            )
        return freeze(Summary(model, trained_pooler=not pooler), self.device)

    def prepare(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in self.scaling)
        return (self.resized(x) / 255 - mean) / std

    def resized(self, x: Tensor) -> Tensor:
        return resize(x, self.side)


class Summary(nn.Module):
    """Pictures → what a model offers as their summary, (B, D)."""

    def __init__(self, model: Any, trained_pooler: bool) -> None:
        super().__init__()
        self.model, self.trained_pooler = model, trained_pooler

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):  # CLIP, SigLIP: the text half is not run
            return self.model.get_image_features(pixel_values=x).pooler_output
        out = self.model(pixel_values=x)
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None and self.trained_pooler:
            return pooled.flatten(1)
        hidden = out.last_hidden_state
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean((2, 3))


def lacks(folder: Path) -> list[str]:
    """What a folder lacks to be a model."""
    wanted = {"config.json": "config.json", "model.safetensors": "*.safetensors"}
    return [name for name, pattern in wanted.items() if not any(folder.glob(pattern))]
