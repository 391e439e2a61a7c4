"""A model as it leaves the house: a folder with its weights, and what builds it again.

- `model.safetensors`: the weights of the denoiser, one average of them;
- `config.json`: what a checkpoint says of itself (`pipeline.checkpoint.about`), and the sha256 of
  the weights; no path of this machine but the name of a text encoder or autoencoder;
- `README.md`: a model card, and `sheet.png`, where they were made.

Nothing of it is executed, and what it names is built as from a checkpoint.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import model_folder, new_folder, sha256, whole

__all__ = ["CARD", "CONFIG", "SHEET", "find", "model_card", "push", "read", "save"]

FORMAT = "conditional-score-pipeline"
CONFIG, WEIGHTS, CARD, SHEET = "config.json", "model.safetensors", "README.md", "sheet.png"
FILES = CONFIG, WEIGHTS, CARD, SHEET


def save(
    folder: str | Path, about: Mapping[str, Any], weights: Mapping[str, Tensor], card: str = ""
) -> None:
    """Write a model into a folder that holds none.

    Arguments:
        about: What the model says of itself; its data are left out.
        weights: The weights of the denoiser, by name.
        card: The text of the model card; one that knows no more than `about` by default.

    Raises:
        UserError: The folder holds a model, or cannot be written to; the model is guided by
            another one, whose place it would have to name.
    """
    from safetensors import torch as safetensors

    if isinstance(((about["guidance"] or {}).get("init_args") or {}).get("denoiser"), str):
        raise UserError(
            "The model is guided by another one, which is not exported with it: set its guidance "
            "to ClassifierFree or None first, and give the other by --guidance when drawing."
        )
    with new_folder(os.fspath(folder), (*FILES, "*.ckpt")) as out, undone(out):
        with whole(out / WEIGHTS) as part:
            own = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
            part.write_bytes(safetensors.save(own))
        said = {"format": FORMAT, **about, "data": None, "weights": sha256(out / WEIGHTS)}
        for file, text in (
            (CARD, card or model_card(about)),
            (CONFIG, json.dumps(said, indent=2) + "\n"),
        ):
            with whole(out / file) as part:
                part.write_text(text, encoding="utf-8")


@contextmanager
def undone(folder: Path) -> Iterator[None]:
    """Nothing of a model is left of what fails, such as on a full disk."""
    try:
        yield
    except BaseException:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        raise


def read(config: Path) -> dict[str, Any]:
    """The model of a folder, in the form of a checkpoint's dictionary.

    Raises:
        UserError: It is no model of ours, it is damaged, or its weights were changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        said = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{config} cannot be read as JSON: {reason}.") from error
    if not isinstance(said, dict) or said.pop("format", None) != FORMAT:
        raise UserError(
            f"{config} is not of a model of ours; give a folder that `python -m pipeline export` "
            "wrote."
        )
    file = config.with_name(WEIGHTS)
    if not file.is_file():
        raise UserError(f"{config.parent} lacks {WEIGHTS}; export the model again.")
    if sha256(file) != said.pop("weights", None):
        raise UserError(
            f"{file} is not the file that {CONFIG} was written with; copy both again, or export "
            "the model again."
        )
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no file of safetensors: {error}; export it again.") from error
    return {"pipeline": said, "state_dict": weights, "averages": {}}


def find(name: str | Path) -> Path:
    """The folder of a model: itself, or that of a name on the Hugging Face hub.

    Raises:
        UserError: There is none, or it cannot be reached.
    """
    example = "a folder that `python -m pipeline export` wrote"
    return model_folder(str(name), FILES, _lacks, "The model", example)


def _lacks(folder: Path) -> list[str]:
    return [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]


def push(folder: str | Path, repo_id: str, private: bool = True, token: str | None = None) -> str:
    """Upload the files of an exported model, and no others, to the Hugging Face hub; its address.

    Raises:
        UserError: The folder holds no model, or the hub refuses it.
    """
    from huggingface_hub import HfApi

    folder = find(folder)
    read(folder / CONFIG)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        said = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=[*FILES])
    except Exception as error:  # HTTP, connection, login, name: each has its own family
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder} could not be uploaded as {repo_id!r}: {reason}; log in by `hf auth login`, "
            "and name OWNER/NAME."
        ) from error
    return str(said.commit_url).partition("/commit/")[0]


def model_card(
    about: Mapping[str, Any],
    facts: Mapping[str, str] | None = None,
    figures: str = "",
    sheet: str | None = None,
    license: str = "unknown",
) -> str:
    """The text of a card in Markdown, with the head that the Hugging Face hub reads.

    Arguments:
        about: What the model says of itself; see `pipeline.checkpoint.about`.
        facts: Further rows of its table, such as what it was trained on.
        figures: What an evaluation has found, with its floor and its protocol.
        sheet: The name of a picture beside the card.
        license: The licence of the weights, as the hub names licences.
    """
    conditioning, guidance = about["conditioning"], about["guidance"]
    codec = about["codec"]
    asked = "nothing: it draws without a condition"
    if conditioning is not None:
        asked = f"{said(conditioning)}; sha256 of all that makes u: `{about['fingerprint'][:16]}`"
    rows = {
        "draws": said(codec),
        "conditioned on": asked,
        "denoiser": said(about["denoiser"]),
        "sampler": said(about["sampler"]),
        "guidance": "none" if guidance is None else said(guidance),
        **(facts or {}),
    }
    if not re.fullmatch(r"[\w.+-]+", license):  # it stands in the head, which is YAML
        raise UserError(
            f"The licence is {license!r}; give a name as the hub has it, such as cc-by-4.0."
        )
    lines = ["---", f"license: {json.dumps(license)}", "library_name: conditional-score-pipeline"]
    lines += ["tags: [diffusion, score-matching]", "---", "", "# A model of p(x | u)", ""]
    lines += [f"![what it draws]({sheet})", ""] if sheet else []
    lines += ["| | |", "|---|---|", *(f"| {name} | {cell(text)} |" for name, text in rows.items())]
    lines += ["", "## Figures", "", f"```\n{figures}\n```" if figures else "Not evaluated."]
    prompt = next(iter(about["prompts"]), None)
    lines += ["", "## Use", "", "```python", "from pipeline.generator import Generator", ""]
    lines += ['generator = Generator.from_pretrained("FOLDER_OR_OWNER/NAME")']
    lines += [f"rows = list(generator([{prompt!r}], seeds=[0]))", "```", "", "## Limits", ""]
    lines += [
        "It draws what its training data show and nothing else; what it was not trained on, other "
        "prompts among them, comes out as something near to that. What it has learned by heart, "
        "and whom its pictures could harm, was not examined, unless it is said above."
    ]
    return "\n".join(lines) + "\n"


def said(node: Mapping[str, Any]) -> str:
    """A node in a line: its class, and what stands in it directly."""
    given = node.get("init_args") or {}
    plain = {k: v for k, v in given.items() if isinstance(v, bool | int | float | str | list)}
    parts = [f"{k} {v}" for k, v in plain.items() if len(str(v)) <= 60]
    inner = [said(v) for v in given.values() if isinstance(v, dict) and "class_path" in v]
    name = node["class_path"].rpartition(".")[2]
    told = f"{name} ({', '.join(parts)})" if parts else name
    return "; ".join([told, *inner])


def cell(text: str) -> str:
    """A text as the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
