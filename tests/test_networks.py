"""Networks: their layers against written formulas, and what they do with a condition."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pipeline.condition import Condition, U
from pipeline.networks import MLP, Diffusers, DiT, Network, UNet
from pipeline.networks import dit as transformer
from pipeline.networks.layers import (
    CrossAttention,
    LevelEmbedding,
    SelfAttention,
    attend,
    fold,
    pool,
    unfold,
    width_groups,
)
from pipeline.networks.unet import Block, _places
from pipeline.noise import Noise

WAYS = {
    "concat": {"concat": 3, "modulate": False},
    "modulate": {"modulate": True},
    "attend": {"modulate": False, "attend": (0, 1)},
    "all": {"concat": 3, "modulate": True, "attend": (1,), "attention": (1,)},
}
E = 6
BORROWED: dict[str, dict] = {
    "UNet2DConditionModel": {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "sample_size": 8,
    },
}
CANNOT_RUN = {
    "UNet2DConditionModel": ({"num_class_embeds": 10}, "does not take its config: .*class_labels"),
    "PixArtTransformer2DModel": ({"use_additional_conditions": True}, "does not take its config"),
}
CLOSE = 1e-10  # float64, after some thousand roundings


def normal(*shape: int, key: str = "x") -> Tensor:
    return Noise(key, *shape).normal(torch.zeros(shape, dtype=torch.float64))


def awake(network: nn.Module) -> nn.Module:
    """In float64 and with every parameter drawn, those that start at zero too."""
    noise = Noise("awake")
    for p in network.double().parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 4
        p.data.copy_(noise.normal(p) / math.sqrt(fan_in))
    return network


def unet(**settings: object) -> nn.Module:
    given: dict = {"channels": 1, "u_dim": E, "widths": (16, 32), "blocks": 1} | settings
    return awake(UNet(**given))


def dit(**settings: object) -> nn.Module:
    given: dict = {"channels": 1, "u_dim": E, "width": 24, "depth": 2, "head_width": 12}
    return awake(DiT(**given | settings))


def mlp(**settings: object) -> nn.Module:
    given: dict = {"x_dim": 3, "u_dim": E, "width": 16, "depth": 2} | settings
    return awake(MLP(**given))


def borrowed(model: str, u_dim: int = E, **settings: object) -> tuple[nn.Module, Tensor]:
    given: dict = {"channels": 1, "u_dim": u_dim, "config": BORROWED[model]} | settings
    return awake(Diffusers(model, **given)), normal(4, 1, 8, 8)


def tokens(n: int, length: int = 3) -> Tensor:
    return normal(n, length, E, key="u")


def condition(n: int, length: int = 3) -> Condition:
    return Condition(tokens(n, length))


def pictures(way: str, u_dim: int = E) -> tuple[nn.Module, Tensor]:
    return unet(u_dim=u_dim, **WAYS[way]), normal(4, 1, 8, 8)


def patches(u_dim: int = E) -> tuple[nn.Module, Tensor]:
    return dit(u_dim=u_dim), normal(4, 1, 8, 8)


def signals(way: str, u_dim: int = E) -> tuple[nn.Module, Tensor]:
    made = dit(u_dim=u_dim, dims=1) if way == "DiT" else unet(u_dim=u_dim, dims=1, **WAYS[way])
    return made, normal(4, 1, 24)


def vectors(u_dim: int = E) -> tuple[nn.Module, Tensor]:
    return mlp(u_dim=u_dim), normal(4, 3)


# what makes a network and an input for it, for each way to take u
Make = Callable[..., tuple[nn.Module, Tensor]]
TAKERS = [pytest.param(partial(pictures, way), id=way) for way in WAYS]
TAKERS.append(pytest.param(patches, id="DiT"))
TAKERS.append(pytest.param(vectors, id="MLP"))
TAKERS += [pytest.param(partial(signals, way), id=f"1-D {way}") for way in (*WAYS, "DiT")]
if importlib.util.find_spec("diffusers"):
    TAKERS += [
        pytest.param(partial(borrowed, model), id=f"diffusers {model}") for model in BORROWED
    ]
LEVEL = torch.tensor([-5.0, -1.0, 0.5, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("make", TAKERS)
def test_it_depends_on_u_x_and_level(make: Make) -> None:
    network, x = make()
    u = condition(4)
    y = network(x, LEVEL, u)
    assert y.shape == x.shape and y.isfinite().all()
    size = y.abs().mean(dim=tuple(range(1, y.ndim)))
    for other in (
        network(x, LEVEL, u.map(lambda tokens: tokens.flip(0) * 2)),
        network(x, LEVEL, u.map(torch.zeros_like)),
        network(x, LEVEL + 0.3, u),
        network(x + 0.1, LEVEL, u),
    ):
        # a per mille of the output at least, in every row: 1e7 times the rounding of a blind one
        change = (other - y).abs().amax(dim=tuple(range(1, y.ndim)))
        assert (change > 1e-3 * size).all()


@pytest.mark.parametrize("make", TAKERS)
def test_rows_do_not_mix(make: Make) -> None:
    network, x = make()
    u = condition(4)
    y = network(x, LEVEL, u)
    for i in range(4):
        row = slice(i, i + 1)
        assert torch.allclose(network(x[row], LEVEL[row], u[row]), y[row], atol=CLOSE)


@pytest.mark.parametrize("make", TAKERS)
def test_padding_changes_nothing(make: Make) -> None:
    network, x = make()
    u = tokens(4)
    y = network(x, LEVEL, Condition(u))
    assert torch.allclose(network(x, LEVEL, Condition(u).padded(8)), y, atol=CLOSE)
    # and rows of unequal length in one batch are each what they are alone
    u[1, 1:] = 0
    u[2, 2:] = 0
    y = network(x, LEVEL, Condition(u))
    for i, length in ((1, 1), (2, 2)):
        row = slice(i, i + 1)
        alone = network(x[row], LEVEL[row], Condition(u[row, :length]))
        assert torch.allclose(y[row], alone, atol=CLOSE)


@pytest.mark.parametrize("make", TAKERS)
def test_nothing_but_padding_is_finite(make: Make) -> None:
    """The null condition of classes: zeros. Its gradients are finite beside a row that is not."""
    network, x = make()
    u = tokens(4)
    u[::2] = 0
    y = network(x, LEVEL, Condition(u.requires_grad_()))
    y.square().sum().backward()
    assert y.isfinite().all() and u.grad is not None and u.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    null = Condition(torch.zeros(4, 1, E).double())
    assert torch.allclose(network(x, LEVEL, null)[::2], y[::2])


@pytest.mark.parametrize("make", TAKERS)
def test_gradients_reach_every_parameter(make: Make) -> None:
    network, x = make()
    (network(x, LEVEL, condition(4)) * normal(*x.shape, key="g")).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and (p.grad != 0).any(), name


@pytest.mark.parametrize("make", TAKERS)
def test_a_number_as_a_condition_keeps_its_size(make: Make) -> None:
    """Vectors make (1, v) of a number v; two numbers of one sign must not look the same."""
    network, x = make(u_dim=2)
    u = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 50.0], [1.0, -3.0]]).double()[:, None]
    x, level = x[:1].expand_as(x), LEVEL[:1].expand(4)
    y = network(x, level, Condition(u)).flatten(1)
    for i in range(4):
        for j in range(i):
            assert (y[i] - y[j]).abs().max() > 1e-4  # 1e5 times the rounding of a blind network


def test_concat_modulate_and_pool_see_the_mean_of_the_tokens() -> None:
    u = condition(4)
    mean = u.map(lambda tokens: tokens.mean(dim=1, keepdim=True))
    for network, x in (
        (unet(**WAYS["concat"]), normal(4, 1, 8, 8)),
        (unet(**WAYS["modulate"]), normal(4, 1, 8, 8)),
        (mlp(), normal(4, 3)),
    ):
        assert torch.allclose(network(x, LEVEL, u), network(x, LEVEL, mean), atol=CLOSE)
    attend = unet(**WAYS["attend"])
    x = normal(4, 1, 8, 8)
    assert not torch.allclose(attend(x, LEVEL, u), attend(x, LEVEL, mean), rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("patch", [1, 2])
def test_unet_sizes(channels: int, size: int, patch: int) -> None:
    network = unet(channels=channels, patch=patch, **WAYS["all"])
    x = normal(2, channels, size, size)
    y = network(x, LEVEL[:2], condition(2))
    assert y.shape == x.shape
    # a nudge of one pixel changes its own surroundings the most: nothing is transposed on the way
    nudged = x.clone()
    nudged[:, :, 1, size - 2] += 1e-3
    change = (network(nudged, LEVEL[:2], condition(2)) - y).abs().sum(dim=(0, 1))
    top = change.flatten().argmax().item()
    assert abs(top // size - 1) <= 4 and abs(top % size - (size - 2)) <= 4


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("make", [unet, dit])
def test_signals(make: Callable, patch: int) -> None:
    network = make(channels=2, patch=patch, dims=1)
    x, u = normal(2, 2, 64), condition(2)
    y = network(x, LEVEL[:2], u)
    assert y.shape == x.shape
    nudged = x.clone()
    nudged[:, :, 41] += 1  # its own surroundings move the most
    change = (network(nudged, LEVEL[:2], u) - y).abs().sum(dim=(0, 1))
    assert abs(change.argmax().item() - 41) <= 4 * patch


def test_a_signal_is_a_picture_of_one_row() -> None:
    """Of a 3×3 kernel the middle row alone meets a picture of height 1."""
    line = unet(dims=1, widths=(16,), patch=1, **WAYS["concat"])
    flat = unet(dims=2, widths=(16,), patch=1, **WAYS["concat"])
    for name, p in flat.named_parameters():
        own = line.state_dict()[name]
        if p.ndim < 4:
            p.data = own
        else:
            p.data[:, :, p.shape[2] // 2] = own
    x, u = normal(4, 1, 12), condition(4)
    assert torch.allclose(line(x, LEVEL, u), flat(x[:, :, None], LEVEL, u)[:, :, 0], atol=CLOSE)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_fold(patch: int) -> None:
    x = normal(2, 3, 12)
    h = fold(x, patch)
    assert h.shape == (2, 3 * patch, 12 // patch) and torch.equal(unfold(h, patch), x)
    for k in range(patch):
        assert torch.equal(h[:, k::patch], x[:, :, k::patch])
    same = fold(x[:, :, None].expand(-1, -1, patch, -1), patch)  # the first row of each square
    assert torch.equal(same.unflatten(1, (3, patch, patch))[:, :, 0, :, 0].flatten(1, 2), h)


def test_a_network_of_other_dims_says_what_it_takes() -> None:
    for network, x, said in (
        (unet(), normal(4, 1, 8), "A picture of 8 does not"),
        (dit(dims=1), normal(4, 1, 8, 8), "A signal of 8×8 does not"),
    ):
        with pytest.raises(ValueError, match=said):
            network(x, LEVEL, condition(4))
    with pytest.raises(ValueError, match="A signal of 10 does not fold 2 .* multiples of 4"):
        unet(dims=1)(normal(4, 1, 10), LEVEL, condition(4))


def test_unet_takes_oblongs_and_three_stages() -> None:
    network = unet(channels=3, widths=(16, 24, 32), blocks=2, attention=(2,), attend=(1, 2))
    x = normal(2, 3, 8, 16)
    assert network(x, LEVEL[:2], condition(2)).shape == x.shape


@pytest.mark.parametrize(
    ("shape", "widths", "patch", "fold"),
    [
        ((7, 8), (16,), 2, 2),
        ((8, 6), (16, 16), 2, 4),
        ((9, 9), (16, 16), 1, 2),
        ((12, 12), (16, 16, 16), 2, 8),
    ],
)
def test_odd_sizes_say_what_would_do(
    shape: tuple[int, int], widths: tuple[int, ...], patch: int, fold: int
) -> None:
    network = unet(u_dim=0, widths=widths, patch=patch)
    with pytest.raises(ValueError, match=f"{shape[0]}×{shape[1]} .* multiples of {fold}"):
        network(normal(1, 1, *shape), LEVEL[:1])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attention": (2,)}, "attention"),
        ({"attend": (-1,), "u_dim": 4}, "attend"),
        ({"concat": 2}, "need a condition"),
        ({"attend": (0,)}, "need a condition"),
        ({"u_dim": 4, "modulate": False}, "u is not used"),
    ],
)
def test_unet_bad_arguments(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        UNet(**settings)


@pytest.mark.parametrize(
    "network",
    [UNet(1, E, (16, 32), 1, attend=(1,)), DiT(1, E, 32, 2, head_width=16), MLP(3, E, 16)],
)
def test_a_new_network_answers_zero_and_soon_heeds_level_and_u(network: nn.Module) -> None:
    """Zero at first, so D = c_skip y; a few steps later it depends on level and u."""
    picture = not isinstance(network, MLP)
    x = (normal(4, 1, 8, 8) if picture else normal(4, 3)).float()
    level, u = LEVEL.float(), condition(4).to(torch.float32)
    assert network(x, level, u).eq(0).all()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    # three: the output layer, then what it reads, then what that reads were zero or unread
    for _ in range(3):
        loss = (network(x, level, u) - x * level.reshape(-1, *[1] * (x.ndim - 1))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y = network(x, level, u)
    for other in (network(x, level + 1, u), network(x, level, u.map(torch.neg))):
        assert (other - y).abs().max() > 1e-5 * y.abs().max()  # 100 float32 eps


def test_unconditional_networks() -> None:
    for network, x in (
        (unet(u_dim=0, attention=(0, 1)), normal(4, 1, 8, 8)),
        (dit(u_dim=0), normal(4, 1, 8, 8)),
        (mlp(u_dim=0), normal(4, 3)),
    ):
        y = network(x, LEVEL)
        assert y.shape == x.shape
        assert torch.equal(y, network(x, LEVEL, None))
        y.sum().backward()
        assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("model", BORROWED)
def test_a_network_of_diffusers(model: str) -> None:
    """It is what diffusers computes at the time of the level, the planes of u beside x."""
    pytest.importorskip("diffusers")
    network, x = borrowed(model, planes=2)
    u = Condition(tokens(4), normal(4, 2, 8, 8, key="planes"))
    ratio = LEVEL.exp()
    told = {"timestep": 1000 * ratio / (1 + ratio), "encoder_hidden_states": u.tokens}
    expected = network.net(torch.cat((x, u.planes), dim=1), **told).sample
    # diffusers turns the time into waves in float32, an angle of 1,000 at most
    assert torch.allclose(network(x, LEVEL, u), expected, rtol=1e-3, atol=1e-4)
    without, x = borrowed(model, u_dim=0)
    without(x, LEVEL).sum().backward()
    assert all(p.grad is not None for p in without.parameters())
    fresh = Diffusers(model, 1, E, config=BORROWED[model])
    assert fresh(x.float(), LEVEL.float(), condition(4).to(torch.float32)).eq(0).all()
    with pytest.raises(ValueError, match="7×8 does not divide by 2"):
        without(x[:, :, :7], LEVEL)
    for wrong, said in (
        ({"width": 3}, f"{model} of diffusers does not take its config: .*'width'"),
        ({"in_channels": 4, "out_channels": 8}, "in_channels, out_channels of .* follow from the"),
        ({"attention_head_dim": "a"}, "does not take its config"),
        CANNOT_RUN[model],
    ):
        with pytest.raises(ValueError, match=said):
            Diffusers(model, 1, E, config=BORROWED[model] | wrong)


def test_mlp_formula() -> None:
    network = mlp(depth=1)
    x, u = normal(4, 3), tokens(4, 1)
    h = torch.cat((x, u[:, 0], network.level(LEVEL)), dim=1)
    h = h @ network.input.weight.T + network.input.bias
    norm, first, _, second = network.blocks[0]
    z = (h - h.mean(dim=1, keepdim=True)) / (
        h.var(dim=1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    z = first(z * norm.weight + norm.bias)
    h = h + second(z * torch.sigmoid(z))
    expected = network.output(h * torch.sigmoid(h))
    assert torch.allclose(network(x, LEVEL, Condition(u)), expected, atol=CLOSE)


def test_pool() -> None:
    u = tokens(3, 4)
    u[0, 2:] = 0
    u[1] = 0
    u[2, 0, 0] = 0  # a token with one zero is no padding
    expected = torch.stack((u[0, :2].mean(dim=0), torch.zeros(E).double(), u[2].mean(dim=0)))
    assert torch.allclose(pool(u), expected, atol=1e-15)


def test_level_embedding() -> None:
    embedding = LevelEmbedding(8).double()
    seen = []
    embedding.layers.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    assert embedding(LEVEL).shape == (4, 8)
    omega = torch.tensor([1 / 16 * 128 ** (k / 3) for k in range(4)]).double()  # 1/16 to 8
    angle = LEVEL[:, None] * omega
    # omega is kept in float32: 8 levels of 5 times 6e-8 of rounding
    assert torch.allclose(seen[0], torch.cat((angle.cos(), angle.sin()), dim=1), atol=1e-5)
    assert not embedding.state_dict().keys() & {"omega"}  # a constant, in no checkpoint


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Attention head by head and row by row; a row whose tokens are all masked gets 0."""
    rows = []
    for b in range(len(q)):
        if not mask[b].any():
            rows.append(torch.zeros_like(q[b]))
            continue
        parts = []
        width = q.shape[-1] // heads
        for h in range(heads):
            c = slice(h * width, (h + 1) * width)
            scores = q[b, :, c] @ k[b, mask[b]][:, c].T / math.sqrt(width)
            parts.append(scores.softmax(dim=-1) @ v[b, mask[b]][:, c])
        rows.append(torch.cat(parts, dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16(masked: bool) -> None:
    """On a processor plain products take the place of the fused kernel, forward and back."""
    q, k, v = (normal(3, n, 8).bfloat16().requires_grad_() for n in (4, 5, 5))
    mask = torch.ones(3, 5, dtype=torch.bool)
    if masked:
        mask[0, 3:], mask[1] = False, False
    heads = [x[:, None] for x in (q, k, v)]
    y = attend(*heads, mask[:, None, None] if masked else None)[:, 0]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = softmax_attention(*exact, 1, mask)
    y.sum().backward()
    expected.sum().backward()
    pairs = [(y, expected), *((a.grad, b.grad) for a, b in zip((q, k, v), exact, strict=True))]
    for low, full in pairs:
        # each of three roundings is of 2⁻⁹ of numbers of size 1, and five are added
        assert torch.allclose(low.double(), full, atol=0.05)
    if masked:
        assert (y[1] == 0).all() and (v.grad[1] == 0).all() and (v.grad[0, 3:] == 0).all()


def layer_norm(x: Tensor) -> Tensor:
    """Of each example over all channels and places, (B, C, H, W)."""
    z = x.flatten(1)
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return z.reshape(x.shape)


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (64, 2), (96, 3)])
def test_self_attention(width: int, heads: int) -> None:
    layer = awake(SelfAttention(width))
    x = normal(2, width, 3, 4)
    z = layer_norm(x) * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    q, k, v = layer.qkv(z.flatten(2).transpose(1, 2)).split(width, dim=-1)
    mixed = layer.out(softmax_attention(q, k, v, heads, torch.ones(2, 12, dtype=torch.bool)))
    expected = x + mixed.transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x), expected, atol=CLOSE)
    assert torch.equal(SelfAttention(width)(x.float()), x.float())  # nothing at first


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (64, 2), (96, 3)])
def test_cross_attention(width: int, heads: int) -> None:
    layer = awake(CrossAttention(width, E))
    x, u = normal(3, width, 3, 4), tokens(3, 5)
    u[0, 3:] = 0
    u[1] = 0
    u[2, :, 0] = 0  # tokens with one zero are no padding
    mask = (u.abs().sum(dim=-1) > 0) & torch.ones(3, 5, dtype=torch.bool)
    z = layer_norm(x) * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    q = layer.q(z.flatten(2).transpose(1, 2))
    scaled = u / (u.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * layer.norm_u.weight
    k, v = layer.kv(scaled).split(width, dim=-1)
    mixed = layer.out(softmax_attention(q, k, v, heads, mask))
    expected = x + mixed.transpose(1, 2).reshape(x.shape)
    assert torch.allclose(layer(x, u), expected, atol=CLOSE)
    assert torch.equal(layer(x, u)[1], x[1])  # exactly nothing where all is padding
    assert torch.equal(CrossAttention(width, E)(x.float(), u.float()), x.float())


@pytest.mark.parametrize(("width_in", "width"), [(32, 32), (16, 48)])
def test_block(width_in: int, width: int) -> None:
    block = awake(Block(width_in, width, 8))
    x, c = normal(2, width_in, 5, 6), normal(2, 8)

    def group_norm(x: Tensor) -> Tensor:  # groups of 16 channels
        return torch.cat([layer_norm(part) for part in x.split(16, dim=1)], dim=1)

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    h = group_norm(x) * block.norm_1.weight[:, None, None] + block.norm_1.bias[:, None, None]
    h = group_norm(block.conv_1(silu(h)))
    scale, shift = (z[:, :, None, None] for z in block.modulation(c).split(width, dim=1))
    skip = x if width_in == width else block.skip(x)
    expected = skip + block.conv_2(silu(h * (1 + scale) + shift))
    assert torch.allclose(block(x, c), expected, atol=CLOSE)


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def turn(n: int, width: int) -> tuple[Tensor, Tensor]:
    angles = normal(n, width // 2, key="angles")
    return angles.cos(), angles.sin()


def test_attention_of_a_transformer() -> None:
    layer = awake(transformer.Attention(24, 12))
    x, mask = normal(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    q, k, v = layer.qkv(x).split(24, dim=-1)
    angles = turn(5, 12)

    def prepared(z: Tensor, scale: Tensor) -> Tensor:
        heads = [rms_norm(head) * scale for head in z.split(12, dim=-1)]
        pairs = [torch.complex(head[..., :6], head[..., 6:]) for head in heads]
        spun = [pair * torch.complex(*angles) for pair in pairs]
        return torch.cat([part for z in spun for part in (z.real, z.imag)], dim=-1)

    q, k = prepared(q, layer.scale_q), prepared(k, layer.scale_k)
    expected = layer.out(softmax_attention(q, k, v, 2, mask))
    assert torch.allclose(layer(x, angles, mask[:, None, None]), expected, atol=CLOSE)


def test_block_of_a_transformer() -> None:
    block = awake(transformer.Block(24, 12))
    x, c, angles = normal(2, 5, 24), normal(2, 24, key="c"), turn(5, 12)
    parts = block.modulation(c)[:, None].split(24, dim=-1)
    h = x + parts[2] * block.attention(rms_norm(x) * (1 + parts[0]) + parts[1], angles, None)
    gate, value = block.feed.both(rms_norm(h) * (1 + parts[3]) + parts[4]).chunk(2, dim=-1)
    expected = h + parts[5] * block.feed.out(gate * torch.sigmoid(gate) * value)
    assert torch.allclose(block(x, c, angles, None), expected, atol=CLOSE)
    assert block.feed.out.in_features == 64  # 8/3 of 24
    fresh = transformer.Block(24, 12).double()
    assert torch.equal(fresh(x, c, angles, None), x)  # nothing at first


def test_queries_meet_keys_by_how_far_they_are() -> None:
    """Rotary places: a product depends on the difference of two places alone."""
    places = torch.tensor([[0.0, 0.0], [2, 1], [3, -4], [5, -3]]).double()
    angles = transformer._angles(places, 12)
    q, k = (
        transformer.turned(normal(1, 12, key=key).expand(4, 12), (angles.cos(), angles.sin()))
        for key in ("q", "k")
    )
    product = q @ k.T
    assert torch.allclose(product[0, 1], product[2, 3], atol=CLOSE)  # both (2, 1) apart
    assert torch.allclose(product.diagonal(), product[0, 0].expand(4), atol=CLOSE)
    assert (product[0, 1] - product[1, 0]).abs() > 1e-3  # and on its sign


def test_a_transformer_sees_where_a_patch_is_and_every_word() -> None:
    network = dit()
    out = network(torch.zeros(1, 1, 8, 8).double(), LEVEL[:1], condition(1))
    squares = out.unfold(2, 2, 2).unfold(3, 2, 2).reshape(16, 4)
    assert (torch.cdist(squares, squares) + torch.eye(16) > 1e-6).all()
    swapped = condition(1).map(lambda tokens: tokens.flip(1))  # words have no order: the text
    y = network(normal(1, 1, 8, 8), LEVEL[:1], condition(1))  # encoder has put it into them
    assert torch.allclose(network(normal(1, 1, 8, 8), LEVEL[:1], swapped), y, atol=CLOSE)
    without = condition(1)  # the mean of the others, so that the average is the same
    assert without.tokens is not None
    same = without.map(lambda tokens: rms_norm(tokens).mean(dim=1, keepdim=True))
    assert (network(normal(1, 1, 8, 8), LEVEL[:1], same) - y).abs().max() > 1e-3


@pytest.mark.parametrize(("size", "patch"), [((8, 8), 2), ((8, 12), 4), ((4, 6), 1)])
def test_a_transformer_of_oblongs(size: tuple[int, int], patch: int) -> None:
    network, x = dit(channels=2, patch=patch), normal(4, 2, *size)
    y = network(x, LEVEL, condition(4))
    assert y.shape == x.shape
    nudged = x.clone()
    nudged[:, :, -1, -1] += 1  # the last patch: its own answer moves the most
    move = (network(nudged, LEVEL, condition(4)) - y).abs().amax(dim=(0, 1))
    assert move[-patch:, -patch:].max() == move.max()


def test_a_transformer_refuses() -> None:
    for head_width in (6, 16):
        with pytest.raises(ValueError, match=f"head_width = {head_width} must be a multiple of 4"):
            DiT(width=24, head_width=head_width)
    with pytest.raises(ValueError, match="7×8 does not divide into patches of 2"):
        dit(u_dim=0)(normal(1, 1, 7, 8), LEVEL[:1])


def test_width_groups() -> None:
    assert [width_groups(w) for w in (16, 48, 96, 24, 20, 7)] == [1, 3, 6, 3, 5, 7]


def test_attention_is_where_it_was_asked_for() -> None:
    network = UNet(1, E, (16, 16, 16), 2, attention=(1,), attend=(2,))
    for stages in (list(network.down), list(network.up)[::-1]):
        for k, stage in enumerate(stages):
            for s in stage:  # type: ignore[union-attr]
                assert isinstance(s.attention, SelfAttention) == (k == 1)
                assert (s.cross is not None) == (k == 2)
    assert network.middle.cross is not None  # the middle is of the coarsest stage


def test_low_precision_keeps_the_condition() -> None:
    """Under autocast to bfloat16, as on a GPU: finite, near float32, all padding included."""
    network = unet(**WAYS["all"]).float()
    x, u = normal(4, 1, 8, 8).float(), tokens(4).float()
    u[0] = 0
    y = network(x, LEVEL.float(), Condition(u))
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x, LEVEL.float(), Condition(u)).float()
    # 8 bits, some dozen layers: 5% of the output's own size
    assert (low - y).square().mean().sqrt() < 0.05 * y.square().mean().sqrt()


def test_dropout_is_of_training_alone() -> None:
    torch.manual_seed(0)
    network = awake(unet(**WAYS["all"] | {"dropout": 0.3})).float()
    x, u = normal(4, 1, 8, 8).float(), Condition(tokens(4).float())
    torch.manual_seed(1)
    one, two = (network.train()(x, LEVEL.float(), u) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(one, network(x, LEVEL.float(), u)) and not torch.equal(one, two)
    three, four = (network.eval()(x, LEVEL.float(), u) for _ in range(2))
    assert torch.equal(three, four) and not torch.equal(one, three)


def test_coordinates() -> None:
    (line,) = _places(torch.zeros(2, 5, 3))[1]
    assert torch.equal(line, torch.tensor([-1.0, 0.0, 1.0]))
    y, x = _places(torch.zeros(2, 5, 3, 4))[1]
    assert torch.equal(y[:, 0], torch.tensor([-1.0, 0.0, 1.0])) and torch.equal(y[:, 0], y[:, 3])
    assert torch.allclose(x[0], torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))
    blank = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    for told in (False, True):
        network = unet(u_dim=0, modulate=False, coordinates=told, widths=(8,), blocks=1)
        out = network(blank, LEVEL[:1])
        # two places far from every border, which five convolutions behind a fold by 2 do not reach
        same = torch.allclose(out[..., 24:26, 24:26], out[..., 36:38, 36:38], atol=CLOSE)
        assert same is not told


def with_planes(n: int, channels: int = 1, size: int = 8) -> Condition:
    return Condition(planes=normal(n, channels, size, size, key="planes"))


@pytest.mark.parametrize("way", [None, *WAYS, "DiT"])
def test_it_depends_on_the_planes(way: str | None) -> None:
    """Alone, and beside tokens that are taken in one way or another."""
    if way == "DiT":
        network = dit(planes=2)
    else:
        network = unet(u_dim=E, planes=2, **WAYS[way]) if way else unet(u_dim=0, planes=2)
    x, planes = normal(4, 1, 8, 8), with_planes(4, 2).planes
    u = Condition(tokens(4) if way else None, planes)
    y = network(x, LEVEL, u)
    size = y.abs().mean(dim=(1, 2, 3))
    for k in range(2):
        nudged = planes.clone()
        nudged[:, k] += 0.1
        change = (network(x, LEVEL, Condition(u.tokens, nudged)) - y).abs().amax(dim=(1, 2, 3))
        assert (change > 1e-3 * size).all()  # 1e7 times the rounding of a blind network
    for i in range(4):
        row = slice(i, i + 1)
        assert torch.allclose(network(x[row], LEVEL[row], u[row]), y[row], atol=CLOSE)


@pytest.mark.parametrize("patch", [1, 2])
def test_planes_stand_beside_x(patch: int) -> None:
    """The lecture's (x, u): a network of as many more channels, of whose output the first are
    taken, is the same function of cat(x, planes).
    """
    network = unet(channels=1, planes=2, u_dim=0, patch=patch)
    wide = unet(channels=3, u_dim=0, patch=patch)
    weights, first = network.state_dict(), patch**2  # x comes before the planes
    for name, own in (("output.weight", wide.output.weight), ("output.bias", wide.output.bias)):
        weights[name] = torch.cat((weights[name], own[first:]))
    wide.load_state_dict(weights)
    x, u = normal(4, 1, 8, 8), with_planes(4, 2)
    expected = wide(torch.cat((x, u.planes), dim=1), LEVEL)[:, :1]
    assert torch.allclose(network(x, LEVEL, u), expected, atol=CLOSE)


def test_planes_are_where_a_network_takes_them_and_as_large_as_x() -> None:
    network, x = unet(u_dim=0, planes=1), normal(4, 1, 8, 8)
    with pytest.raises(ValueError, match="planes of u are of 4×4 and x is of 8×8"):
        network(x, LEVEL, with_planes(4, size=4))
    for u, count in ((None, 0), (Condition(), 0), (with_planes(4, 2), 2)):
        with pytest.raises(ValueError, match=f"takes 1 planes of u and was given {count}"):
            network(x, LEVEL, u)
    with pytest.raises(ValueError, match=f"condition of width 0 and was given {E}"):
        network(x, LEVEL, Condition(tokens(4), with_planes(4).planes))
    for blind, x_t in ((unet(), x), (dit(), x), (mlp(), normal(4, 3))):
        with pytest.raises(ValueError, match="takes 0 planes of u and was given 1"):
            blind(x_t, LEVEL, Condition(tokens(4), with_planes(4).planes))


def test_a_network_says_what_it_takes() -> None:
    class Plain(Network):
        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            return x

    assert (Plain().u_dim, Plain().planes) == (0, 0)
    assert (mlp().u_dim, mlp().planes) == (E, 0)
    network = unet(channels=3, planes=2)
    assert (network.channels, network.u_dim, network.planes) == (3, E, 2)
    with pytest.raises(TypeError):
        Network()  # type: ignore[abstract]
