"""Weights & Biases, offline unless asked otherwise; files under ``wandb/`` in the run's folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from apt_launch.tracking import Row

logger = logging.getLogger(__name__)


class WandbTracker:
    """Shows rows to W&B under the steps they have here.

    Args:
        mode: ``offline``; or ``online``, which needs a key and is offline without one.
        folder: the run's folder.
        run_id: the same for every resume in that folder, so that W&B continues one run.
        config: what W&B shows as the run's config.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        entity: str | None,
        name: str | None,
        tags: list[str],
        folder: Path,
        run_id: str,
        config: dict[str, Any],
    ) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):
            logger.warning(
                "W&B has no API key here, so this run is kept offline. Set WANDB_API_KEY or run `wandb login`; upload this run "
                "later with `wandb sync %s`.",
                folder / "wandb" / "offline-run-*",
            )
            mode = "offline"
        self.run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=project,
            entity=entity,
            name=name,
            tags=tags,
            dir=folder,
            id=run_id,
            resume="allow",
            job_type="train",
            config=config,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=60),
        )
        self.run.define_metric("*", step_metric="trainer/step")

    def log(self, row: Row) -> None:
        """Send one row."""
        step = int(row["step"])
        self.run.log(row | {"trainer/step": step}, step=step)

    def close(self, state: str) -> None:
        """Finish the run; only a run that is done has exit code 0."""
        self.run.finish(exit_code=0 if state == "done" else 1)
