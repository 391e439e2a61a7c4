"""Conditions: what is done to their rows, with tokens, with planes, and with both at once."""

import pytest
import torch
from torch import Tensor

from pipeline.condition import Condition, align, mirror
from pipeline.noise import Noise

KINDS = pytest.mark.parametrize("kind", ["tokens", "planes", "both"])
WHERE = torch.tensor([False, True, True])


def made(kind: str, rows: int, length: int = 2, key: str = "u") -> Condition:
    noise = Noise(key, length)
    tokens = noise.normal(torch.zeros(rows, length, 3, dtype=torch.float64))
    planes = noise.normal(torch.zeros(rows, 1, 4, 5, dtype=torch.float64))
    return Condition(None if kind == "planes" else tokens, None if kind == "tokens" else planes)


def parts(u: Condition) -> dict[str, Tensor]:
    return {name: part for name, part in vars(u).items() if part is not None}


def same(a: Condition, b: Condition) -> bool:
    """To the last bit, and the same parts."""
    one, two = parts(a), parts(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def of_rows(u: Condition) -> list[Condition]:
    return [u[i : i + 1] for i in range(len(u))]


@KINDS
def test_rows_are_taken(kind: str) -> None:
    u = made(kind, 3)
    assert len(u) == 3 and len(Condition()) == 0
    for rows in (slice(1, 3), torch.tensor([2, 0, 2]), [1, 1], WHERE):
        taken = u[rows]
        assert parts(taken).keys() == parts(u).keys()
        assert all(torch.equal(part, parts(u)[name][rows]) for name, part in parts(taken).items())


@KINDS
def test_parts_are_changed_alike(kind: str) -> None:
    u = made(kind, 3)
    assert same(u.map(torch.neg).map(torch.neg), u)
    assert all(part.dtype == torch.float32 for part in parts(u.to(torch.float32)).values())
    assert u.nbytes == 8 * 3 * {"tokens": 6, "planes": 20, "both": 26}[kind]
    copy = u.clone()
    assert same(copy, u)
    for part in parts(copy).values():
        part.zero_()
    assert not any(same(one, other) for one, other in zip(of_rows(copy), of_rows(u), strict=True))


@KINDS
def test_padding_is_zero_tokens_behind(kind: str) -> None:
    u = made(kind, 3)
    assert u.padded(2) is u
    padded = u.padded(5)
    assert padded.planes is u.planes
    if u.tokens is not None:
        assert padded.tokens is not None and padded.tokens.shape == (3, 5, 3)
        assert torch.equal(padded.tokens[:, :2], u.tokens) and padded.tokens[:, 2:].eq(0).all()
    longest, shorter = align([made(kind, 1, 4), u])
    assert same(longest, made(kind, 1, 4)) and same(shorter, u.padded(4))


@pytest.mark.parametrize("null_length", [1, 2, 4])
@KINDS
def test_null_takes_the_place_of_rows(kind: str, null_length: int) -> None:
    u, null = made(kind, 3), made(kind, 1, null_length, "null")
    length = max(2, null_length)
    replaced = of_rows(u.replaced(null, WHERE))
    for one, row, dropped in zip(replaced, of_rows(u), WHERE, strict=True):
        assert same(one, (null if dropped else row).padded(length))


@pytest.mark.parametrize("part", ["tokens", "planes"])
@KINDS
def test_null_takes_the_place_of_a_part(kind: str, part: str) -> None:
    """The other part stays, and what a condition has not does not come."""
    u, null = made(kind, 3), made(kind, 1, 4, "null")
    found, whole = u.replaced(null, WHERE, part), u.replaced(null, WHERE)
    kept = parts(u.padded(4))
    assert parts(found).keys() == kept.keys()
    for name, value in parts(found).items():
        assert torch.equal(value, parts(whole)[name] if name == part else kept[name])


@pytest.mark.parametrize("null_length", [1, 2, 4])
@KINDS
def test_null_stands_first_beside_the_condition(kind: str, null_length: int) -> None:
    u, null = made(kind, 3).to(torch.float32), made(kind, 1, null_length, "null")
    length = max(2, null_length)
    both = u.beside(null)
    assert len(both) == 6
    # the null condition is given the type of the other
    assert same(both[:3], null.to(torch.float32).padded(length).expand(3))
    assert same(both[3:], u.padded(length))
    assert all(part.dtype == torch.float32 for part in parts(both).values())


@KINDS
def test_a_stack_is_as_long_as_its_longest(kind: str) -> None:
    conditions = [made(kind, rows, length) for rows, length in ((1, 1), (2, 3), (1, 2))]
    stack = Condition.stack(conditions)
    expected = [row.padded(3) for u in conditions for row in of_rows(u)]
    assert len(stack) == 4
    assert all(same(one, row) for one, row in zip(of_rows(stack), expected, strict=True))


@KINDS
def test_planes_are_turned_and_tokens_are_not(kind: str) -> None:
    u = made(kind, 3)
    turned = u.mirrored(WHERE)
    assert turned.tokens is u.tokens
    assert (turned.planes is None) == (u.planes is None)
    if u.planes is not None:
        assert torch.equal(turned.planes, mirror(u.planes, WHERE))
        assert same(turned.mirrored(WHERE), u)


def test_a_mirror_turns_left_to_right() -> None:
    x = torch.tensor([[[1, 2, 3], [4, 5, 6]]]).expand(3, 1, 2, 3)
    assert mirror(x, WHERE).tolist() == [
        [[[1, 2, 3], [4, 5, 6]]],
        [[[3, 2, 1], [6, 5, 4]]],
        [[[3, 2, 1], [6, 5, 4]]],
    ]


@KINDS
def test_repeat_is_all_rows_and_expand_its_only_row(kind: str) -> None:
    u = made(kind, 3)
    assert same(u.repeat(2), u[[0, 1, 2, 0, 1, 2]]) and same(u.repeat(1), u)
    assert same(u[:1].expand(4), u[[0, 0, 0, 0]])


def test_conditions_of_other_parts_do_not_go_together() -> None:
    tokens, planes = torch.ones(2, 1, 3), torch.ones(2, 1, 4, 4)
    u, null = Condition(tokens, planes), Condition(tokens[:1])
    for join in (u.beside, lambda other: u.replaced(other, torch.tensor([True, False]))):
        with pytest.raises(ValueError, match="the same parts"):
            join(null)


def test_a_block_of_columns_is_left_out() -> None:
    u = made("both", 3)
    left = u.without(slice(1, 3), WHERE)
    assert torch.equal(left.planes, u.planes)
    assert torch.equal(left.tokens[0], u.tokens[0])
    assert torch.equal(left.tokens[1:, :, :1], u.tokens[1:, :, :1])
    assert (left.tokens[1:, :, 1:] == 0).all()
