"""What a model says of itself: written once, read once.

A checkpoint is the dictionary that Lightning saves, or a smaller one of the same form:

- "pipeline": how to build denoiser, codec, conditioning, sampler, guidance and data again, as
  nodes of `pipeline.building`; the fingerprint of the conditioning; prompts to draw when none are
  given; the version of all this;
- "state_dict": the trained weights, each name with "denoiser." before it;
- "averages": averages of them, by name.

A model that was exported (`pipeline.exported`) is read as a checkpoint of one set of weights.

It is read without executing anything in it, and may name members of the families above only.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline import exported
from pipeline.averaging import LONGEST, reconstruct
from pipeline.building import brief, build, describe
from pipeline.codec import Codec
from pipeline.conditioning import Conditioning
from pipeline.denoisers import Denoiser
from pipeline.errors import UserError
from pipeline.files import sha256, whole
from pipeline.guidance import Guidance
from pipeline.samplers import Sampler

__all__ = ["BEFORE", "LAST", "Checkpoint", "about", "averages", "differences", "locate", "write"]

VERSION = 1  # of what stands under "pipeline"
PREFIX = "denoiser."  # of the names of weights, in a LightningModule that has a denoiser
LAST, BEFORE = "last.ckpt", "before.ckpt"  # a run's newest checkpoint, and the one before it
KEYS = ("denoiser", "codec", "conditioning", "fingerprint", "sampler", "guidance", "data")

T = TypeVar("T")


def about(
    denoiser: Denoiser,
    codec: Codec,
    conditioning: Conditioning | None,
    sampler: Sampler,
    guidance: Guidance | None = None,
    data: Any = None,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """What a model says of itself, plain data all of it.

    Arguments:
        codec: What makes rows of x.
        conditioning: What makes u of prompts; `None` for an unconditional model.
        sampler: How to draw where nothing else is said.
        guidance: How to guide, likewise.
        data: The data module it was trained on, where there is one.
        prompts: What to draw where nothing else is said.

    Raises:
        UserError: A part cannot be described; see `pipeline.building.describe`.
    """
    node = describe(data)
    if node is not None and "conditioning" in node["init_args"]:
        node["init_args"]["conditioning"] = None  # it is said once
    return {
        "version": VERSION,
        "denoiser": describe(denoiser),
        "codec": describe(codec),
        "conditioning": describe(conditioning),
        "fingerprint": conditioning.fingerprint() if conditioning else None,
        "sampler": describe(sampler),
        "guidance": describe(guidance),
        "data": node,
        "prompts": list(dict.fromkeys(map(str, prompts))),
    }


def write(
    path: str | Path,
    denoiser: Denoiser,
    codec: Codec,
    conditioning: Conditioning | None,
    sampler: Sampler,
    guidance: Guidance | None = None,
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a model that was trained from Python, to be drawn from like any other.

    Arguments:
        denoiser, codec, conditioning, sampler, guidance: See `about`.
        averages: Averages of the denoiser's weights, by name; the first is what is drawn with.

    Raises:
        UserError: A part cannot be described.
    """
    said = about(denoiser, codec, conditioning, sampler, guidance)
    kept = {"trained": denoiser.state_dict(), **(averages or {})}
    named = {
        name: {f"{PREFIX}{key}": w.detach().cpu() for key, w in weights.items()}
        for name, weights in kept.items()
    }
    content = {"pipeline": said, "state_dict": named.pop("trained"), "averages": named}
    with whole(path) as part, part.open("wb") as file:
        torch.save(content, file)


class Checkpoint:
    """A checkpoint that was opened.

    Arguments:
        path: A file, the folder of a run, whose `last.ckpt` is taken, or of an exported model.
        trust: Packages beside our own whose classes it may name.

    Attributes:
        about: What the model says of itself.

    Raises:
        UserError: There is no such file, it is damaged, it was not written by this package, or by
            a later version of it.
    """

    def __init__(self, path: str | Path, trust: Sequence[str] = ()) -> None:
        self.trust = trust
        self.path, self.content = load_newest(locate(path))
        self.about = self.content["pipeline"]
        if (version := self.about.get("version")) != VERSION:
            raise UserError(
                f"{self.path} is of version {version!r} and this program reads version {VERSION}; "
                "use the program that wrote it."
            )
        if lacks := [key for key in KEYS if key not in self.about]:
            raise UserError(f"{self.path} does not say its {lacks[0]}; it may be damaged.")
        prompts, kept = self.prompts, averages(self.content)
        sound = {  # of what is not built
            "data": is_node(self.about["data"]),
            "fingerprint": isinstance(self.about["fingerprint"], str | None),
            "prompts": isinstance(prompts, list) and all(isinstance(p, str) for p in prompts),
            "averages": is_averages(kept),
        }
        if wrong := [name for name, is_sound in sound.items() if not is_sound]:
            said = f"{self.path} has something else than it should for its {wrong[0]}"
            raise UserError(f"{said}; it may be damaged.")

    @property
    def sha256(self) -> str:
        return sha256(self.path)

    @property
    def prompts(self) -> list[str]:
        """What to draw where nothing else is said."""
        return self.about.get("prompts", [])

    def part(self, name: str, kind: type[T]) -> T:
        """A part of the model, built."""
        try:
            return build(self.about[name], kind, self.trust)
        except UserError as error:
            raise UserError(f"The checkpoint {self.path} cannot be built: {error}") from error

    def optional(self, name: str, kind: type[T]) -> T | None:
        return None if self.about[name] is None else self.part(name, kind)

    def conditioning(self) -> Conditioning | None:
        """What makes u, if it still is what the model was trained with."""
        found = self.optional("conditioning", Conditioning)
        if found is not None and found.fingerprint() != self.about["fingerprint"]:
            raise UserError(
                f"{self.path} was trained with another {type(found).__name__} than is here now: "
                f"put back what {self.about['conditioning'].get('init_args')} named then."
            )
        return found

    def denoiser(self, average: str | None = None, device: torch.device | str = "cpu") -> Denoiser:
        """The denoiser with its weights, in evaluation mode.

        Arguments:
            average: The name of an average of the weights, or "trained"; the first average, where
                there is one, by default. A length that is none of the names is made of what the
                run kept; see `pipeline.averaging`.
            device: Where it is to be.
        """
        denoiser, weights = self.part("denoiser", Denoiser), self.weights(average)
        try:
            for name, own in denoiser.state_dict().items():
                kind = (weights[name] if name in weights else own).dtype
                if kind.is_floating_point != own.dtype.is_floating_point:
                    raise TypeError(f"{name} is of {kind} and not of {own.dtype}")
            denoiser.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[min(1, len(lines) - 1)].strip()
            said = f"The weights in {self.path} do not fit its network ({reason:.200})"
            raise UserError(f"{said}; it may be damaged.") from error
        try:
            if torch.device(device).type == "meta":
                raise RuntimeError("nothing is computed there")
            denoiser = denoiser.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--device {device} cannot hold {self.path}: {reason}; name cpu, cuda or cuda:1."
            ) from error
        return denoiser.eval().requires_grad_(False)

    def weights(self, average: str | None = None) -> dict[str, Tensor]:
        """The weights of the denoiser, by name; see `denoiser`."""
        return {k.removeprefix(PREFIX): w for k, w in self._weights(average).items()}

    def _weights(self, average: str | None) -> dict[str, Tensor]:
        trained, kept = self.content["state_dict"], averages(self.content)
        name = average or next(iter(kept), "trained")
        if name == "trained" or name in kept:
            return trained | kept.get(name, {})
        own = {length: w for one, w in kept.items() if (length := as_length(one))}
        length = as_length(name)
        if length is None or len(own) < 2:
            also = "; any length needs pipeline.callbacks.PowerEMA in training" if length else ""
            has = ", ".join(["trained", *kept])
            raise UserError(f"{self.path} has no average {name!r}; it has {has}{also}.")
        step = self.content.get("global_step", 0)
        return trained | reconstruct(self.path.parent, step, length, own)

    def data(self, kind: type[T]) -> T:
        """The data module it was trained on."""
        node, conditioning = self.about["data"], self.conditioning()
        if node is None:
            raise UserError(
                f"{self.path} does not say its data, being exported or trained from Python; give "
                "the checkpoint of its run."
            )
        given = node.get("init_args") or {}
        if "conditioning" in given:
            given = {**given, "conditioning": conditioning}
        return build({**node, "init_args": given}, kind, self.trust)


def is_node(value: Any) -> bool:
    """Whether it is what `describe` gives for a part, or for none."""
    given = value.get("init_args") if isinstance(value, dict) else None
    named = value is None or (isinstance(value, dict) and isinstance(value.get("class_path"), str))
    return named and isinstance(given, dict | None)


def is_averages(value: Any) -> bool:
    """Whether it is weights by name, by the name of an average."""
    return isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())


def differences(old: Any, new: Any, at: str) -> Iterator[str]:
    """Where two descriptions differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            inner = at if key == "init_args" else f"{at}.{key}"
            yield from differences(old[key], new[key], inner)
    elif old != new:
        yield f"{at} is {brief(new)}, and was {brief(old)}"


def as_length(name: str) -> float | None:
    """The relative length that an average is named after, where it is one."""
    try:
        length = float(name)
    except ValueError:
        return None
    return length if 1e-4 < length < LONGEST else None


def averages(content: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The averages of the weights in a checkpoint, by name."""
    return content.get("averages", {})


def locate(path: str | Path | None) -> Path:
    """The file of a checkpoint: itself, the `last.ckpt` in a run's folder, the configuration in an
    exported model's, or the newest run's checkpoint.
    """
    if path is not None:
        path = Path(path).expanduser()
        inside = [path / name for name in (LAST, exported.CONFIG)]
        found = [file for file in inside if file.is_file()] or inside
        return found[0] if path.is_dir() else path
    found = sorted(Path("runs").glob(f"*/*/{LAST}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(
            "There is no trained model in runs/: `make train` makes one, or give --checkpoint."
        )
    return found[-1]


def load_newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """What a checkpoint holds, and its file: of a run's last one that is torn, the one before."""
    before = path.with_name(BEFORE)
    try:
        return path, load(path)
    except UserError as error:
        if path.name != LAST or not before.is_file():
            raise
        print(f"warning: {error} The one before, {before}, is taken.", file=sys.stderr)
        return before, load(before)


def load(path: Path) -> dict[str, Any]:
    """The dictionary in a file, read without executing anything in it."""
    if path.name == exported.CONFIG:
        content = exported.read(path)
        weights = content["state_dict"]
        return content | {"state_dict": {f"{PREFIX}{k}": w for k, w in weights.items()}}
    if not path.is_file():
        raise UserError(
            f"There is no checkpoint {path}; `make train` makes one in runs/, or name another."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no pickle provoke
        raise UserError(
            f"{path} cannot be read as a checkpoint; it may be cut short or another kind of file."
        ) from error
    said = content.get("pipeline") if isinstance(content, dict) else None
    if not isinstance(said, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(
            f"{path} does not say how to build its model, so it was not written by `python -m "
            "pipeline fit`; write it with pipeline.checkpoint.write, or build a Generator from "
            "your own denoiser."
        )
    return content
