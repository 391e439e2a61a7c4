"""Networks of diffusers as networks of ours."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.condition import Condition, U
from pipeline.errors import UserError
from pipeline.networks.base import Network
from pipeline.networks.layers import check_condition, check_sides, with_planes, zero

__all__ = ["Diffusers"]

# how each class names the width of a token, its input, and its last layer; what it is told besides
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "UNet2DConditionModel": ("cross_attention_dim", "sample", "conv_out", {}),
    "PixArtTransformer2DModel": (
        "caption_channels",
        "hidden_states",
        "proj_out",
        {"sample_size": 32, "use_additional_conditions": False},
    ),
}


class Diffusers(Network):
    r"""A network of diffusers, which attends to the tokens of u and has the planes of u beside x.

    It is told the time of its usual 1,000 at which the straight path has the same noise ratio,
    :math:`1000 \, \sigma / (\alpha + \sigma)`, as a real number. Its last layer begins at zero, as
    ours do. Tokens that are padding are masked; without tokens it sees a single zero.

    References:
        | Rombach et al., 2022: the UNet; https://arxiv.org/abs/2112.10752
        | Chen et al., 2023: the DiT that attends to text; https://arxiv.org/abs/2310.00426

    Arguments:
        model: Which class of diffusers.
        channels: The number C of channels of the picture.
        u_dim, planes: See :class:`pipeline.networks.Network`.
        config: What else the class takes, as in the `config.json` of its models: the widths, the
            depth, `sample_size`, …

    Raises:
        UserError: diffusers is not installed.
        ValueError: The class does not take the config.
    """

    def __init__(
        self,
        model: Literal["UNet2DConditionModel", "PixArtTransformer2DModel"],
        channels: int = 3,
        u_dim: int = 0,
        planes: int = 0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            import diffusers
        except ImportError as error:
            raise UserError(f"{model} is of diffusers: pip install diffusers.") from error
        self.channels, self.u_dim, self.planes = channels, u_dim, planes
        width, self.first, last, more = KINDS[model]
        sizes = {width: u_dim or 1, "in_channels": channels + planes, "out_channels": channels}
        own = {name: value for name, value in (config or {}).items() if not name.startswith("_")}
        if taken := sorted(sizes.keys() & own):
            raise ValueError(
                f"{', '.join(taken)} of {model} follow from the data; leave them out of config."
            )
        if model == "PixArtTransformer2DModel":  # attention as wide as its own tokens
            heads = own.get("num_attention_heads", 16), own.get("attention_head_dim", 72)
            sizes["cross_attention_dim"] = heads[0] * heads[1]
        try:
            self.net: Any = getattr(diffusers, model)(**{**more, **own, **sizes}).eval()
            zero(getattr(self.net, last))
            said = self.net.config
            of_stages = 2 ** (len(said.get("block_out_channels", "?")) - 1)
            self.multiple: int = said.get("patch_size") or of_stages
            self.try_it()
        except Exception as error:  # whatever it raises for what it cannot do
            reason = " ".join(str(error).split())
            said = f"{model} of diffusers does not take its config: {reason:.300}"
            raise ValueError(said) from error
        self.net.train()

    @torch.no_grad()
    def try_it(self) -> None:
        """Compute once: some configs can be built and not run."""
        x = torch.zeros(1, self.channels, *[2 * self.multiple] * 2)
        tokens = torch.zeros(1, 1, self.u_dim) if self.u_dim else None
        planes = torch.zeros(1, self.planes, *x.shape[2:]) if self.planes else None
        self(x, torch.zeros(1), Condition(tokens, planes))

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        check_sides(x, 2, self.multiple, f"divide by {self.multiple}; change the size.")
        check_condition(u, self.u_dim, self.planes)
        own = None if u is None else u.tokens
        tokens = x.new_zeros(len(x), 1, 1) if own is None else own  # (B, L, E)
        given = {
            self.first: with_planes(x, u),
            "timestep": 1000 * torch.sigmoid(level),
            "encoder_hidden_states": tokens,
            "encoder_attention_mask": (tokens != 0).any(dim=-1),
        }
        return self.net(**given).sample
