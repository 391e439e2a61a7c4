"""Where a run is written down: CSV always, Weights & Biases online when logged in and offline
otherwise.
"""

import os
import secrets
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

__all__ = ["loggers"]


def loggers(run: Path, project: str, config: dict[str, Any]) -> list[Logger]:
    """The loggers of a run.

    `WANDB_MODE` is obeyed where it is set ("online", "offline", "disabled"). A resumed run
    continues its own W&B run.

    Arguments:
        run: The run's folder.
        project: The W&B project.
        config: All that is to be known about the run; it is written into each logger.
    """
    found: list[Logger] = [CSVLogger(run, name="csv")]
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")  # there is no page to point to
    if mode != "disabled":
        found.append(
            WandbLogger(
                name=run.name,
                project=project,
                save_dir=run,
                id=_identity(run),
                resume="allow",
                offline=mode == "offline",
                log_model=False,
            )
        )
    for logger in found:
        logger.log_hyperparams(config)
    return found


def _logged_in() -> bool:
    """Whether there is a key for the W&B server: in the environment, or put by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc().authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False


def _identity(run: Path) -> str:
    """The id of the run's W&B run, kept in its folder."""
    file = run / "wandb-id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()
