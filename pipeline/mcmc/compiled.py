"""A step of many chains as one compiled program."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.noise import Noise

__all__ = ["compiled"]

Parts = Sequence[Any]  # tensors, and None
Step = Callable[[Parts, Noise], Parts]


class Listened(Noise):
    """Another noise, and a list of what was asked of it."""

    def __init__(self, noise: Noise) -> None:
        self.noise, self.asked = noise, list[Callable[[Noise], Tensor]]()

    def normal(self, like: Tensor) -> Tensor:
        like = torch.empty_like(like)
        self.asked.append(lambda noise: noise.normal(like))
        return self.noise.normal(like)

    def uniform(self, n: int) -> Tensor:
        self.asked.append(lambda noise: noise.uniform(n))
        return self.noise.uniform(n)


class Given(Noise):
    """Numbers that were drawn before, in the order in which they are asked for."""

    def __init__(self, numbers: Iterator[Tensor]) -> None:
        self.numbers = numbers

    def normal(self, like: Tensor) -> Tensor:
        return next(self.numbers)

    def uniform(self, n: int) -> Tensor:
        return next(self.numbers)


def compiled(step: Step) -> Step:
    """A function of tensors, any of which may be `None`, and of a `Noise`, that gives tensors too,
    compiled: what its many small operations are, those of a gradient too, becomes a few loops over
    memory, and the numbers are the same but for rounding.

    The first call is not compiled and shows what is asked of the noise; the second is traced with
    that drawn before, which takes some seconds and, on a CPU, a C++ compiler. All calls must have
    the same shapes, ask for the same, and take the same way: no `if` may look at a number.

    Raises:
        UserError: In the second call: it cannot be compiled.
    """
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    asked: list[Callable[[Noise], Tensor]] = []
    outside: list[bool] = []  # which of the results are tensors
    program: Callable[..., Sequence[Tensor]] | None = None

    def call(parts: Parts, noise: Noise) -> Parts:
        nonlocal program
        if not outside:
            listened = Listened(noise)
            found = step(parts, listened)
            asked.extend(listened.asked)
            outside.extend(part is not None for part in found)
            return found
        inside = [part is not None for part in parts]
        tensors = [part for part in parts if part is not None]
        tensors += [draw(noise) for draw in asked]

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            own = [next(given) if there else None for there in inside]
            return [part for part in step(own, Given(given)) if part is not None]

        if program is None:
            try:
                copies = [part.clone() for part in tensors]  # tracing computes, in place too
                made: Any = torch._inductor.compile(make_fx(flat)(*copies), [*tensors])
                found, program = iter(made(*tensors)), made
            except Exception as error:  # tracer and compiler have many of their own
                reason = " ".join(str(error).split())[:200]
                said = f"The chains cannot be compiled: {reason}; leave compile out."
                raise UserError(said) from error
        else:
            found = iter(program(*tensors))
        return [next(found) if there else None for there in outside]

    return call
