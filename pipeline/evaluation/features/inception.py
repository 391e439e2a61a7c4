r"""The Inception-v3 of the Fréchet *Inception* distance, without torchvision.

FID is defined by one set of weights, `inception-2015-12-05` of TensorFlow, whose graph differs
from the Inception-v3 of the paper and of torchvision in three ways:

- a mean over 3 × 3 places counts only places inside the picture;
- the last block pools by the maximum where all others take the mean;
- the classifier has 1008 outputs.

The port to torch of those weights is one file, by whose names (torchvision's) layers are called.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, relu

from pipeline.errors import UserError
from pipeline.evaluation.features.base import Features, freeze, read_weights
from pipeline.files import cache_folder

__all__ = ["Inception"]

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299

Size = int | tuple[int, int]
Branches = dict[str, list[Any]]  # see `Mixed`


class Inception(Features):
    """The 2048 pooled features of FID.

    The protocol is that of pytorch-fid: uint8, scaled to [-1, 1], resized by bilinear
    interpolation without antialiasing and with half-pixel centres. torch-fidelity and the
    original code resize like TensorFlow 1, without half-pixel centres: at 299 × 299 pixels both
    are the same, at other sizes a FID of one is not comparable with one of the other.

    References:
        | Heusel et al., 2017; https://arxiv.org/abs/1706.08500
        | Szegedy et al., 2015; https://arxiv.org/abs/1512.00567
        | https://github.com/mseitzer/pytorch-fid

    Arguments:
        path: The weights, `pt_inception-2015-12-05-6726825d.pth` (96 MB); by default that file
            in the cache of torch.hub or in ours, and it is downloaded where it is in neither.

    Raises:
        UserError: At first use, when the weights cannot be had or are others.
    """

    dim = 2048
    name = "inception-2048"
    protocol = (
        f"uint8, / 127.5 - 1, bilinear without antialiasing to {SIDE} x {SIDE} (pytorch-fid)"
    )
    weights = SHA256  # no others are read
    classified = True

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @cached_property
    def network(self) -> "InceptionV3":
        remedy = f"download {URL} again, or name another file in features.path"
        state = read_weights(find(self.path), SHA256, "the Inception-v3 of FID", remedy)
        network = InceptionV3()
        network.load_state_dict(state)
        return freeze(network, self.device)

    def prepare(self, x: Tensor) -> Tensor:
        x = interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return 2 * x - 1

    def logits(self, features: Tensor) -> Tensor:
        """The 1008 logits without bias, as in the published Inception score."""
        return features @ self.network.fc.weight.T


def find(path: str | None) -> Path:
    """The file of weights, downloaded if need be."""
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"features.path {path!r} is no file; give {FILE} from {URL}.")
        return file
    ours = cache_folder() / "weights" / FILE
    for file in (ours, Path(torch.hub.get_dir()) / "checkpoints" / FILE):
        if file.is_file():
            return file
    ours.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(ours), hash_prefix=SHA256[:8])
    except (OSError, RuntimeError) as error:  # no connection; cut short
        raise UserError(
            f"The weights of Inception could not be downloaded ({error}); fetch {URL} where there "
            "is a connection and name the file in features.path, or choose other features from "
            "conf/features/."
        ) from error
    return ours


def branches_a(pooled: int) -> Branches:
    """35 × 35 places: 1 × 1, 5 × 5, twice 3 × 3, and a mean."""
    twice = [(64, 1), (96, 3), (96, 3)]
    return {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": twice, "_pool": [(pooled, 1)]}


def branches_c(width: int) -> Branches:
    """17 × 17 places: 7 × 7 as 1 × 7 after 7 × 1, once and twice."""
    row, column = (1, 7), (7, 1)
    return {
        "1x1": [(192, 1)],
        "7x7": [(width, 1), (width, row), (192, column)],
        "7x7dbl": [(width, 1), (width, column), (width, row), (width, column), (192, row)],
        "_pool": [(192, 1)],
    }


B: Branches = {"3x3": [(384, 3, 2)], "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "_pool": []}
D: Branches = {
    "3x3": [(192, 1), (320, 3, 2)],
    "7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
    "_pool": [],
}
FORK = [(384, (1, 3)), (384, (3, 1))]  # 3 × 3 as 1 × 3 beside 3 × 1
E: Branches = {
    "1x1": [(320, 1)],
    "3x3": [(384, 1), FORK],
    "3x3dbl": [(448, 1), (384, 3), FORK],
    "_pool": [(192, 1)],
}


class Conv(nn.Module):
    """Convolution, normalisation, ReLU; the size stays but for a stride of 2, or `inside`."""

    def __init__(
        self, channels: int, out: int, kernel: Size, stride: int = 1, inside: bool = False
    ) -> None:
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if inside or stride == 2 else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)), inplace=True)


def mean(x: Tensor) -> Tensor:
    """The mean over the 3 × 3 places around each, of those that there are."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed(nn.Module):
    """Branches side by side.

    Arguments:
        channels: The channels of the input.
        branches: The layers of each branch, one after the other: channels, kernel and, where it is
            not 1, stride; two layers in a list are side by side. Branch `_pool` is behind `pool`.
        pool: A pool.
    """

    def __init__(
        self, channels: int, branches: Branches, pool: Callable[[Tensor], Tensor] = mean
    ) -> None:
        super().__init__()
        self.pool, self.paths = pool, defaultdict[str, list[list[str]]](list)
        for branch, layers in branches.items():
            width, path = channels, self.paths[branch]
            for k, layer in enumerate(layers, 1):
                beside = layer if isinstance(layer, list) else [layer]
                number = f"_{k}" if len(layers) > 1 else ""
                letters = "ab" if len(beside) > 1 else [""]
                path.append([f"branch{branch}{number}{letter}" for letter in letters])
                for name, (out, *how) in zip(path[-1], beside, strict=True):
                    self.add_module(name, Conv(width, out, *how))
                width = beside[0][0]

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch, path in self.paths.items():
            ends = [self.pool(x) if branch == "_pool" else x]
            for names in path:
                ends = [getattr(self, name)(ends[0]) for name in names]
            found += ends
        return torch.cat(found, 1)


class InceptionV3(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] → features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.halve = partial(max_pool2d, kernel_size=3, stride=2)
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, inside=True)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, inside=True)
        self.Mixed_5b = Mixed(192, branches_a(32))
        self.Mixed_5c = Mixed(256, branches_a(64))
        self.Mixed_5d = Mixed(288, branches_a(64))
        self.Mixed_6a = Mixed(288, B, self.halve)
        self.Mixed_6b = Mixed(768, branches_c(128))
        self.Mixed_6c = Mixed(768, branches_c(160))
        self.Mixed_6d = Mixed(768, branches_c(160))
        self.Mixed_6e = Mixed(768, branches_c(192))
        self.Mixed_7a = Mixed(768, D, self.halve)
        self.Mixed_7b = Mixed(1280, E)
        self.Mixed_7c = Mixed(2048, E, partial(max_pool2d, kernel_size=3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.halve(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.halve(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3))
