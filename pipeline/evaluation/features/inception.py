r"""The Inception-v3 of the Fréchet *Inception* distance, without torchvision.

FID is defined by one set of weights, `inception-2015-12-05` of TensorFlow, whose graph differs
from the Inception-v3 of the paper and of torchvision in three ways:

- a mean over 3 × 3 places counts only places inside the picture;
- the last block pools by the maximum where all others take the mean;
- the classifier has 1008 outputs.

The port to torch of those weights is one file, under whose names (those of torchvision) the layers
here are called.
"""

from functools import cached_property
from pathlib import Path

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


class Inception(Features):
    """The 2048 pooled features of FID.

    The protocol is that of pytorch-fid: uint8, scaled to [-1, 1], resized by bilinear
    interpolation without antialiasing and with half-pixel centres. torch-fidelity and the
    original code resize like TensorFlow 1, without half-pixel centres: at 299 × 299 pixels both
    are the same, at other sizes a FID of one is not comparable with one of the other.

    References:
        | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel
        |   et al., 2017)
        | https://arxiv.org/abs/1706.08500
        | Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2015)
        | https://arxiv.org/abs/1512.00567
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


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)), inplace=True)


def mean(x: Tensor) -> Tensor:
    """The mean over the 3 × 3 places around each, of those that there are."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35 × 35 places: 1 × 1, 5 × 5, twice 3 × 3, and a mean, side by side."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch5x5_2(self.branch5x5_1(x))
        b = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), a, b, self.branch_pool(mean(x))], 1)


class InceptionB(nn.Module):
    """From 35 × 35 to 17 × 17 places."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), a, max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """17 × 17 places: 7 × 7 as 1 × 7 after 7 × 1, once and twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row: dict = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, **row)
        self.branch7x7_3 = Conv(width, 192, **column)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, **column)
        self.branch7x7dbl_3 = Conv(width, width, **row)
        self.branch7x7dbl_4 = Conv(width, width, **column)
        self.branch7x7dbl_5 = Conv(width, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        b = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        b = self.branch7x7dbl_5(self.branch7x7dbl_4(b))
        return torch.cat([self.branch1x1(x), a, b, self.branch_pool(mean(x))], 1)


class InceptionD(nn.Module):
    """From 17 × 17 to 8 × 8 places."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch3x3_2(self.branch3x3_1(x))
        b = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([a, self.branch7x7x3_4(b), max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """8 × 8 places: 3 × 3 as 1 × 3 beside 3 × 1."""

    def __init__(self, channels: int, maximum: bool) -> None:
        super().__init__()
        row: dict = {"kernel": (1, 3), "padding": (0, 1)}
        column: dict = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, **row)
        self.branch3x3_2b = Conv(384, 384, **column)
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, **row)
        self.branch3x3dbl_3b = Conv(384, 384, **column)
        self.branch_pool = Conv(channels, 192, 1)
        self.maximum = maximum

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch3x3_1(x)
        b = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.maximum else mean(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(a),
            self.branch3x3_2b(a),
            self.branch3x3dbl_3a(b),
            self.branch3x3dbl_3b(b),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


class InceptionV3(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] → features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pooled=32)
        self.Mixed_5c = InceptionA(256, pooled=64)
        self.Mixed_5d = InceptionA(288, pooled=64)
        self.Mixed_6a = InceptionB()
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, maximum=False)
        self.Mixed_7c = InceptionE(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3))
