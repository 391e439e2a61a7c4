r"""A frozen network reads a uint8 picture as a vector f(x) in :math:`R^D`.

A published distance depends on much that its name hides: how the picture was rounded and resized,
how it was scaled, which weights read it, in which precision. Here all of that is fixed by the
class, said in words by `protocol`, and hashed by `fingerprint`, so that two numbers are compared
only where they are comparable:

- pictures come in as uint8, as a file would hold them; there is no second way in;
- features are float32 whatever autocast or TF32 setting is in force outside;
- weights are checked by their sha256 before they are used.

A feature network is frozen and is no child of the model. Making one reads no file; the weights are
loaded at first use.
"""

import hashlib
import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.building import Part
from pipeline.errors import UserError
from pipeline.files import digest, sha256

__all__ = ["Features", "Own", "read_weights", "resize"]

FEW = 4  # pictures of a pass on a CPU, whose caches then hold what a layer makes of them
VERSION = 1  # of what these files compute: raise it when features would come out different

Self = TypeVar("Self", bound="Features")


class Features(Part, ABC):
    """Reads pictures as vectors.

    Attributes:
        dim: The length D of a feature.
        name: The name of the network and of the place where it is tapped.
        protocol: How a uint8 picture becomes the network's input, in words.
        weights: The sha256 of the weights, in hexadecimal.
        classified: Whether the network has a classifier on these features; see `logits`.
    """

    dim: int
    name: str
    protocol: str
    weights: str
    classified: bool = False
    device = torch.device("cpu")

    @cached_property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network, in evaluation mode, on `device`."""

    @abstractmethod
    def prepare(self, x: Tensor) -> Tensor:
        """The network's input, of float32 pictures (B, 3, H, W) in [0, 255]."""

    def logits(self, features: Tensor) -> Tensor:
        """What the network's classifier says of features (B, D), with shape :math:`(B, K)`."""
        raise NotImplementedError(f"{self.name} has no classes.")

    def fingerprint(self) -> str:
        """A hex digest of everything that decides the features."""
        return digest(VERSION, self.name, self.protocol, self.weights)

    def to(self: Self, device: torch.device | str) -> Self:
        """Computes on `device` from now on."""
        self.device = torch.device(device)
        if "network" in self.__dict__:
            self.network.to(self.device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """The features, float32 on `device`, with shape :math:`(B, D)`.

        Arguments:
            pictures: uint8, with shape :math:`(B, 3, H, W)`, or :math:`(B, 1, H, W)` for grey
                ones, which are repeated to three channels.

        Raises:
            ValueError: They are anything else.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise ValueError(
                f"Pictures are {pictures.dtype} of shape {tuple(pictures.shape)}; expected "
                "torch.uint8 of shape (B, 3, H, W) or (B, 1, H, W)."
            )
        x = pictures.to(self.device).expand(-1, 3, -1, -1)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(self.device.type, enabled=False), exact:
            few = FEW if x.device.type == "cpu" else len(x)
            found = [self.network(self.prepare(some.float())).float() for some in x.split(few)]
        return torch.cat(found)

    def read(self, pictures: Tensor | np.ndarray, batch_size: int = 64) -> Iterator[Tensor]:
        """The features of many uint8 pictures (N, C, H, W), `batch_size` at a time, in order."""
        for start in range(0, len(pictures), batch_size):
            some = pictures[start : start + batch_size]
            yield self(torch.from_numpy(np.array(some)) if isinstance(some, np.ndarray) else some)


class Own(Features):
    """A network of your own: uint8 pictures (B, 3, H, W) in, features (B, D) out, with its resize
    and scaling inside, as torchmetrics asks of one too.

    Arguments:
        module: The network.
        dim: The length D of its features.
        protocol: What it does to a picture before reading it, in words.
    """

    def __init__(
        self, module: nn.Module, dim: int, protocol: str = "as the module does it"
    ) -> None:
        self.module, self.dim, self.protocol = module, dim, protocol
        self.name = type(module).__qualname__

    @property
    def weights(self) -> str:
        digest = hashlib.sha256()
        for key, value in sorted(self.module.state_dict().items()):
            file = io.BytesIO()
            np.save(file, value.detach().cpu().double().numpy())
            digest.update(key.encode() + file.getvalue())
        return digest.hexdigest()

    @cached_property
    def network(self) -> nn.Module:
        return self.module.eval().to(self.device)

    def prepare(self, x: Tensor) -> Tensor:
        return x.to(torch.uint8)


def resize(x: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing, clipped to [0, 255], not rounded, where the size is another."""
    if x.shape[-2:] == (size, size):
        return x
    x = interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return x.clamp_(0, 255)


def read_weights(path: Path, expected: str, what: str, remedy: str) -> dict[str, Tensor]:
    """The tensors in a file written by `torch.save`, if it is the file it should be.

    Raises:
        UserError: The sha256 is another, or the file cannot be read.
    """
    found = sha256(path)
    if found != expected:
        raise UserError(
            f"{path} does not hold the weights of {what}: its sha256 begins with {found[:16]}, "
            f"not {expected[:16]}; {remedy}."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as the weights of {what}; {remedy}.") from error


def freeze(network: nn.Module, device: torch.device) -> Any:
    """In evaluation mode, without gradients, on a device."""
    # depthwise convolutions are twice as fast with channels last, on a CPU too
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore
    return network.to(device)
