"""Where a run is written down: CSV always, Weights & Biases online when logged in and offline
otherwise.
"""

import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger, WandbLogger

__all__ = ["loggers"]

PATIENCE = 30  # seconds that a server has to answer in


def loggers(run: Path, project: str, config: dict[str, Any]) -> "list[Logger]":
    """The loggers of a run.

    `WANDB_MODE` is obeyed where it is set ("online", "offline", "disabled"). A resumed run
    continues its own W&B run. Where the server does not answer the run is kept offline, with a
    word: compute nodes often reach none.

    Arguments:
        run: The run's folder.
        project: The W&B project.
        config: All that is to be known about the run; it is written into each logger.
    """
    from lightning.pytorch.loggers import CSVLogger

    found: list[Logger] = [CSVLogger(run, name="csv")]
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode != "disabled":
        found.append(_wandb(run, project, mode))
    for logger in found:
        logger.log_hyperparams(config)
    return found


def _wandb(run: Path, project: str, mode: str) -> "WandbLogger":
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        name=run.name,
        project=project,
        save_dir=run,
        id=_identity(run),
        resume="allow",
        offline=mode == "offline",
        mode=mode,  # or W&B has made up its mind when it was asked for a key
        log_model=False,
        settings=wandb.Settings(
            init_timeout=PATIENCE,
            login_timeout=PATIENCE,
            # offline there is no page to point to
            silent=mode == "offline"
            or os.environ.get("WANDB_SILENT", "").lower() in ("true", "1"),
        ),
    )
    try:
        logger.experiment  # noqa: B018  it is opened at the first look
    except Exception as error:  # whatever a client meets on its way to a server
        if mode == "offline":
            raise
        reason = " ".join(str(error).split())[:200]
        print(
            f"warning: Weights & Biases cannot be reached ({reason}); the run is kept offline in "
            f"{run / 'wandb'}, and `wandb sync` sends it later.",
            file=sys.stderr,
        )
        wandb.teardown()  # whose process holds on to the run's id
        return _wandb(run, project, "offline")
    return logger


def _logged_in() -> bool:
    """Whether W&B has a key for its server: from the environment, or put by `wandb login`."""
    import wandb

    try:
        # Its greeting names the user: it asks the server who that is, and waits.
        wandb.setup(settings=wandb.Settings(silent=True))
        return wandb.login(prompt=False, verify=False)
    except Exception:  # a key that is none, a settings file that cannot be read
        return False


def _identity(run: Path) -> str:
    """The id of the run's W&B run, kept in its folder."""
    file = run / "wandb-id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()
