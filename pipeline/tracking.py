"""Where a run is written down: CSV always, and Weights & Biases, offline without a login."""

import csv
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import whole

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

__all__ = ["loggers"]

PATIENCE = 30  # seconds that a server has to answer in


def loggers(run: Path, project: str, config: dict[str, Any], step: int = 0) -> "list[Logger]":
    """The loggers of a run, each told all that is to be known of it, `config`.

    `WANDB_MODE` is obeyed where it is set ("online", "offline", "disabled"). A resumed run
    continues its own W&B run. Where the server does not answer the run is kept offline, with a
    word: compute nodes often reach none. `step` are the steps that the run has behind it. A run
    of a W&B sweep has the id that the sweep gives it, `WANDB_RUN_ID`.
    """
    found: list[Logger] = [_csv(run, step)]
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode != "disabled":
        found.append(_wandb(run, project, mode))
    for logger in found:
        logger.log_hyperparams(config)
    return found


def _csv(run: Path, step: int) -> "CSVLogger":
    """The run's `csv/metrics.csv`, gone on with; what came after the checkpoint comes again."""
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.loggers.csv_logs import ExperimentWriter

    class Writer(ExperimentWriter):
        def _check_log_dir_exists(self) -> None:
            """Nothing is deleted."""

    logger = CSVLogger(run, name="csv", version="", flush_logs_every_n_steps=1)
    logger._experiment = writer = Writer(logger.log_dir)
    file = Path(writer.metrics_file_path)
    if file.exists():
        try:
            with file.open(newline="", encoding="utf-8") as opened:
                table = csv.DictReader(opened)
                writer.metrics_keys = list(table.fieldnames or [])
                rows = [row for row in table if before(row, step)]
        except (csv.Error, ValueError) as error:
            said = f"{file} is no longer the table that the run wrote ({error})"
            raise UserError(f"{said}; move it away to go on with a new one.") from error
        with whole(file) as part, part.open("w", newline="", encoding="utf-8") as opened:
            kept = csv.DictWriter(opened, writer.metrics_keys)
            kept.writeheader()
            kept.writerows(rows)
    return logger


def before(row: dict[str, Any], step: int) -> bool:
    """Whether a row is whole and was written before a step."""
    number = row.get("step") or ""
    return number.isdecimal() and int(number) < step and None not in row.values()


def _wandb(run: Path, project: str, mode: str) -> "WandbLogger":
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    offline = mode == "offline"
    # offline there is no page to point to
    silent = offline or os.environ.get("WANDB_SILENT", "").lower() in ("true", "1")
    logger = WandbLogger(
        name=run.name,
        project=project,
        save_dir=run,
        id=_identity(run),
        resume="allow",
        offline=offline,
        mode=mode,  # or W&B has made up its mind when it was asked for a key
        log_model=False,
        settings=wandb.Settings(silent=silent, init_timeout=PATIENCE, login_timeout=PATIENCE),
    )
    try:
        logger.experiment  # noqa: B018  it is opened at the first look
    except Exception as error:  # whatever a client meets on its way to a server
        reason = " ".join(str(error).split())[:200]
        if offline:
            raise UserError(
                f"Weights & Biases does not take the run ({reason}): correct --project, "
                f"WANDB_RUN_ID or {run / 'wandb-id'}, or set WANDB_MODE=disabled."
            ) from error
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
    kept = file.read_text("utf-8", "replace").strip() if file.exists() else ""
    if not kept:
        kept = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        file.write_text(kept, encoding="utf-8")
    return kept
