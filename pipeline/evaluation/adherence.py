r"""Whether a picture shows what its prompt asks for.

Three ways to ask, from the narrowest data to the widest: the attributes of the built-in shapes are
read from the pixels (`shapes_adherence`); among the prompts, the own one should be the nearest to
the picture in a space that holds both (`retrieval_accuracy`); and in CLIP's space, the two should
be near each other (`clip_score`).

A space holds prompts if it has a text half, as `CLIP` does.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from pipeline.conditioning import TextEncoder
from pipeline.data import Attributes
from pipeline.errors import UserError
from pipeline.evaluation import shapes
from pipeline.evaluation.features import Vision

__all__ = ["CLIP", "adherence", "chance", "clip_score", "distinct", "retrieval_accuracy", "right"]
__all__ += ["shapes_adherence"]

Columns = Mapping[str, Sequence[str | None]]  # of each label, the values one by one


def shapes_adherence(
    pictures: Tensor, wanted: Sequence[Attributes], order: np.random.Generator
) -> dict[str, Any]:
    """Read the attributes of the built-in shapes back from uint8 pictures (N, 3, 32, 32).

    Arguments:
        wanted: What was asked of each.
        order: Decides how prompts are shuffled.

    Returns:
        Plain numbers: the part that shows one object at all, "read"; how far their ground is from
        flat in grey levels, "grain"; and what :func:`adherence` says.
    """
    found = shapes.read(pictures)
    shown = float(np.mean([one is not None for one in found]))
    asked = adherence(shapes.columns(found), shapes.columns(wanted), shapes.VALUES, order)
    return {"read": shown, "grain": shapes.grain(pictures, found), **asked}


def adherence(
    found: Columns, wanted: Columns, values: Mapping[str, int], order: np.random.Generator
) -> dict[str, dict[str, float]]:
    """How often what was found in pictures is what was wanted, label by label.

    Arguments:
        found: What each shows; None where it could not be read, which is wrong.
        wanted: What was asked of each; None where it was not asked, which counts for nothing.
        values: How many values each label has.
        order: Decides how prompts are shuffled.

    Returns:
        The "accuracy" of each label that was asked, of their "mean" and of "all" together; the
        same for the prompts in another order, "shuffled", which shows that the prompt decided; and
        the "chance" of a model that draws a random combination, deaf to the prompt.
    """
    n = len(next(iter(wanted.values())))
    places: list[int] = order.permutation(n).tolist()
    shuffled = {name: [column[k] for k in places] for name, column in wanted.items()}
    return {
        "accuracy": right(found, wanted),
        "shuffled": right(found, shuffled),
        "chance": chance(wanted, values),
    }


def right(found: Columns, wanted: Columns) -> dict[str, float]:
    """The share of each label that is right, the mean of these, and the share of all right."""
    pairs = {name: list(zip(found[name], column, strict=True)) for name, column in wanted.items()}
    hits = {
        name: [have == want for have, want in of if want is not None] for name, of in pairs.items()
    }
    part = {name: float(np.mean(own)) for name, own in hits.items() if own}
    every = np.all([[want in (None, have) for have, want in of] for of in pairs.values()], axis=0)
    return part | {"mean": float(np.mean(list(part.values()))), "all": float(np.mean(every))}


def chance(wanted: Columns, values: Mapping[str, int]) -> dict[str, float]:
    """What :func:`right` is on average for values drawn at random, each as often."""
    asked = {name: [one is not None for one in column] for name, column in wanted.items()}
    part = {name: 1 / values[name] for name, of in asked.items() if any(of)}
    each = [[part[name] if one else 1.0 for one in asked[name]] for name in part]
    every = float(np.mean(np.prod(each, axis=0)))
    return part | {"mean": float(np.mean(list(part.values()))), "all": every}


class CLIP(Vision):
    """The text–image space of a frozen CLIP: `Vision` with the text half beside it.

    A picture is prepared as its preprocessor_config.json says: its shorter side is resized by
    bicubic interpolation with antialiasing, rounded to whole levels, and the centre is cut out.

    References:
        | Radford et al., 2021; https://arxiv.org/abs/2103.00020

    Arguments:
        model: A local folder (config.json, preprocessor_config.json, model.safetensors and a
            tokenizer), or a name on the Hugging Face hub.

    Raises:
        UserError: At first use, when the model cannot be found or read, or reads no text.
    """

    @property
    def resizing(self) -> str:
        cut = f"centre {self.side} x {self.side}"
        return f"shorter side bicubic with antialiasing to {self.shorter} rounded, {cut}"

    @property
    def shorter(self) -> int:
        """The shorter side of a picture before the centre is cut out, in pixels."""
        size = self.processor.get("size", self.side)
        return size.get("shortest_edge", self.side) if isinstance(size, dict) else size

    def resized(self, x: Tensor) -> Tensor:
        least = min(x.shape[-2:])
        size = [length * self.shorter // least for length in x.shape[-2:]]
        x = interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
        x = x.round().clamp(0, 255)
        top, left = ((length - self.side) // 2 for length in size)
        return x[..., top : top + self.side, left : left + self.side]

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


def clip_score(pictures: Tensor, prompts: Tensor) -> Tensor:
    r"""The CLIP score of each picture with its prompt, with shape (N,).

    .. math:: 100 \, \max\big( \cos(f(x), g(u)), 0 \big)

    Published scores differ in the model, the factor (Hessel's is 2.5 where 100 stands here) and
    words put before the prompt (there "A photo depicts", here none): compare within one protocol.

    References:
        | Hessel et al., 2021, section 3; https://arxiv.org/abs/2104.08718

    Arguments:
        pictures: The embeddings f of pictures, with shape (N, d).
        prompts: The embedding g of each one's prompt, with shape (N, d).

    Raises:
        ValueError: There is not one prompt for each picture.
    """
    if pictures.shape != prompts.shape:
        raise ValueError(
            f"{len(pictures)} pictures need a prompt each, and {len(prompts)} prompts were given."
        )
    return 100 * torch.cosine_similarity(pictures, prompts).clamp(min=0)


def retrieval_accuracy(pictures: Tensor, prompts: Tensor, own: Tensor) -> tuple[float, float]:
    r"""The share of pictures that are nearer to their own prompt than to every other, and chance.

    .. math:: \frac{1}{N} \, \#\big\{ i : \cos(f_i, g_{k_i}) > \cos(f_i, g_j)
        \text{ for all } j \neq k_i \big\}, \quad \text{chance } \frac{1}{K}

    A tie is a miss, so a space that tells nothing apart scores 0.

    References:
        | Radford et al., 2021, section 3.1; https://arxiv.org/abs/2103.00020

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


def distinct(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The K distinct prompts, as they are first used, and which of them each is, (N,)."""
    index = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    return list(index), torch.tensor([index[prompt] for prompt in prompts])
