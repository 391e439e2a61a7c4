"""A model card: what a model is, for whoever finds it."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

__all__ = ["model_card"]


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
    lines = ["---", f"license: {license}", "library_name: conditional-score-pipeline"]
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
