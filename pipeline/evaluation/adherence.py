r"""Whether a picture shows what its prompt asks for.

Three ways to ask, from the narrowest data to the widest: the attributes of the built-in shapes are
read from the pixels (`shapes_adherence`); among the prompts, the own one should be the nearest to
the picture in a space that holds both (`retrieval_accuracy`); and in CLIP's space, the two should
be near each other (`clip_score`).

A space holds prompts if it has a text half (`CLIP`), or if each prompt has true pictures, whose
mean feature stands for it (`mean_features`).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from pipeline.conditioning import TextEncoder
from pipeline.data.shapes import Relations, Shapes
from pipeline.errors import UserError
from pipeline.evaluation.features import Vision
from pipeline.evaluation.shapes import accuracy
from pipeline.generator import Generator
from pipeline.png import to_uint8
from pipeline.samplers import State

__all__ = [
    "CLIP",
    "clip_score",
    "distinct",
    "mean_features",
    "retrieval_accuracy",
    "shapes_adherence",
]


def shapes_adherence(
    generator: Generator,
    data: Any,
    number: int,
    seed: int = 0,
    micro_batch: int = 16,
    progress: Callable[[State], object] | None = None,
) -> tuple[dict[str, Any], Tensor, list[str]]:
    """Draw unseen combinations of `Shapes` and read the attributes back from the pixels.

    The combinations are taken in a random order that `seed` decides, each once before any twice;
    picture i is drawn with seed `seed` + i.

    Arguments:
        generator: What draws.
        data: The data module the model was trained on.
        number: The number N of pictures.
        seed: Decides the order of the prompts, the pictures, and how prompts are shuffled.
        micro_batch: How many are drawn together.
        progress: Called with the state after each step of the sampler.

    Returns:
        A result of plain numbers: "accuracy" of each attribute, of their "mean" and of "all"
        together; the same for the prompts in another order, "shuffled", which shows that the
        prompt decided; and "chance". Then the uint8 pictures (N, 3, 32, 32), and their prompts.

    Raises:
        UserError: The data are not the built-in shapes.
    """
    if not isinstance(data, Shapes) or isinstance(data, Relations):
        raise UserError(
            f"The model was trained on {type(data).__name__}; attributes can be read back from "
            "the built-in Shapes only."
        )
    order = np.random.default_rng(seed)
    unseen = data.combinations("unseen")
    rounds = [order.permutation(len(unseen)) for _ in range(-(-number // len(unseen)))]
    wanted = [unseen[k] for k in np.concatenate(rounds)[:number]]
    prompts = [one.caption for one in wanted]
    seeds = range(seed, seed + number)
    x = torch.cat([x.cpu() for x in generator(prompts, seeds, micro_batch, progress)])
    pictures = to_uint8(x)
    right = accuracy(pictures, wanted)
    wrong = accuracy(pictures, [wanted[k] for k in order.permutation(number)])
    names = ("colour", "shape", "size", "position", "mean", "all")
    result = {
        "pictures": number,
        "seed": seed,
        "read": right["read"],
        "accuracy": {name: right[name] for name in names},
        "shuffled": {name: wrong[name] for name in names},
        "chance": {name: right[f"chance_{name}"] for name in names},
    }
    return result, pictures, prompts


class CLIP(Vision):
    """The text–image space of a frozen CLIP: `Vision` with the text half beside it.

    A picture is prepared as its preprocessor_config.json says: its shorter side is resized by
    bicubic interpolation with antialiasing, rounded to whole levels, and the centre is cut out.

    References:
        | Learning Transferable Visual Models From Natural Language Supervision
        |   (Radford et al., 2021)
        | https://arxiv.org/abs/2103.00020

    Arguments:
        model: A local folder (config.json, preprocessor_config.json, model.safetensors and a
            tokenizer), or a name on the Hugging Face hub.

    Raises:
        UserError: At first use, when the model cannot be found or read, or reads no text.
    """

    @property
    def protocol(self) -> str:
        mean, std = (tuple(round(v, 6) for v in values) for values in self.scaling)
        return (
            f"uint8, shorter side bicubic with antialiasing to {self.shorter} rounded, centre "
            f"{self.side} x {self.side}, (x / 255 - {mean}) / {std}"
        )

    @property
    def shorter(self) -> int:
        """The shorter side of a picture before the centre is cut out, in pixels."""
        size = self.processor.get("size", self.side)
        return size.get("shortest_edge", self.side) if isinstance(size, dict) else size

    def prepare(self, x: Tensor) -> Tensor:
        least = min(x.shape[-2:])
        size = [length * self.shorter // least for length in x.shape[-2:]]
        x = interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
        x = x.round().clamp(0, 255)
        top, left = ((length - self.side) // 2 for length in size)
        x = x[..., top : top + self.side, left : left + self.side]
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in self.scaling)
        return (x / 255 - mean) / std

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the text half."""
        from transformers import AutoTokenizer

        folder = TextEncoder(self.model).folder  # which holds a tokenizer, or it says so
        how = {"trust_remote_code": False, "local_files_only": True}
        try:
            return AutoTokenizer.from_pretrained(folder, **how)
        except Exception as error:  # each kind of tokenizer has its own
            raise UserError(
                f"The tokenizer in {folder} could not be read ({type(error).__name__}); save it "
                f"there again with save_pretrained."
            ) from error

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """The embeddings of prompts, float32 on `device`, with shape :math:`(N, D)`.

        A prompt longer than the text half reads, 77 tokens as published, is cut there.

        Arguments:
            prompts: The prompts.
            batch_size: How many are read together.

        Raises:
            UserError: The model has no text half.
        """
        model: Any = self.network.model
        if not hasattr(model, "get_text_features"):
            raise UserError(
                f"{self.name} reads pictures and no text; give a CLIP, such as "
                "openai/clip-vit-large-patch14."
            )
        how = {"max_length": model.config.text_config.max_position_embeddings, "truncation": True}
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(prompts), batch_size):
                some = list(prompts[start : start + batch_size])
                read = self.tokenizer(some, padding=True, return_tensors="pt", **how)
                ids, mask = (read[k].to(self.device) for k in ("input_ids", "attention_mask"))
                out = model.get_text_features(input_ids=ids, attention_mask=mask)
                parts.append(out.pooler_output.float())
        return torch.cat(parts)


def clip_score(clip: CLIP, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    r"""The CLIP score of each picture with its prompt, with shape (N,).

    .. math:: 100 \, \max\big( \cos(f(x), g(u)), 0 \big)

    Published scores differ in the model, the factor (Hessel's is 2.5 where 100 stands here) and
    words put before the prompt (there "A photo depicts", here none): compare within one protocol.

    References:
        | CLIPScore: A Reference-free Evaluation Metric for Image Captioning
        |   (Hessel et al., 2021), section 3
        | https://arxiv.org/abs/2104.08718

    Arguments:
        clip: The space, f its picture half and g its text half.
        pictures: uint8, with shape (N, 3, H, W) or (N, 1, H, W).
        prompts: The prompt of each.

    Raises:
        ValueError: There is not one prompt for each picture.
    """
    if len(pictures) != len(prompts):
        raise ValueError(
            f"{len(pictures)} pictures need a prompt each, and {len(prompts)} prompts were given."
        )
    f, g = torch.cat([clip(some) for some in pictures.split(64)]), clip.embed(prompts)
    return 100 * torch.cosine_similarity(f, g).clamp(min=0)


def retrieval_accuracy(pictures: Tensor, prompts: Tensor, own: Tensor) -> tuple[float, float]:
    r"""The share of pictures that are nearer to their own prompt than to every other, and chance.

    .. math:: \frac{1}{N} \, \#\big\{ i : \cos(f_i, g_{k_i}) > \cos(f_i, g_j)
        \text{ for all } j \neq k_i \big\}, \quad \text{chance } \frac{1}{K}

    A tie is a miss, so a space that tells nothing apart scores 0.

    References:
        | Learning Transferable Visual Models From Natural Language Supervision
        |   (Radford et al., 2021), section 3.1, for choosing among prompts by the cosine
        | https://arxiv.org/abs/2103.00020

    Arguments:
        pictures: The embeddings f of pictures, with shape (N, d).
        prompts: The embeddings g of the K distinct prompts, with shape (K, d).
        own: The index k of each picture's own prompt, with shape (N,).

    Raises:
        ValueError: The shapes do not fit, or there is nothing to choose from.
    """
    n, k = len(own), len(prompts)
    if pictures.shape != (n, prompts.shape[-1]) or n == 0 or k < 2:
        raise ValueError(
            f"pictures {tuple(pictures.shape)}, prompts {tuple(prompts.shape)} and own "
            f"{tuple(own.shape)} must be (N, d), (K, d) and (N,) with N of at least 1 and K of "
            f"at least 2."
        )
    cosine = normalize(pictures, dim=1) @ normalize(prompts, dim=1).T  # (N, K)
    as_near = cosine >= cosine.gather(1, own[:, None].to(cosine.device))
    return (as_near.sum(dim=1) == 1).double().mean().item(), 1 / k


def mean_features(features: Tensor, own: Tensor, number: int) -> Tensor:
    """The mean feature of each prompt's true pictures, with shape (K, d): where a prompt lies in
    a space that reads pictures only.

    Arguments:
        features: The features of the true pictures, with shape (M, d).
        own: The index of each one's prompt, with shape (M,).
        number: The number K of prompts.

    Raises:
        ValueError: A prompt has no picture.
    """
    own = own.to(features.device)
    count = torch.bincount(own, minlength=number)
    if len(count) > number or (count == 0).any():
        raise ValueError(
            f"own must name each of the {number} prompts at least once and no other; it names "
            f"{len(own.unique())} from {int(own.min())} to {int(own.max())}."
        )
    total = features.new_zeros(number, features.shape[1]).index_add(0, own, features)
    return total / count[:, None]


def distinct(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The K distinct prompts in the order of their first use, and which of them each one is, with
    shape (N,).
    """
    index = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    return list(index), torch.tensor([index[prompt] for prompt in prompts])
