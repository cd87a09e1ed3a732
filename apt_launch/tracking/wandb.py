"""Weights & Biases, offline unless asked otherwise; files under ``wandb/`` in the run's folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apt_launch.tracking import Row

logger = logging.getLogger(__name__)


class WandbTracker:
    """Shows rows to W&B under the steps they have here.

    Args:
        mode: ``offline``; or ``online``, which needs a key and is offline without one.
        folder: the run's folder.
        run_id: the same for every resume in that folder, so that W&B continues one run. Under W&B's own sweep agent the
            run is the one that the agent names.
        config: what W&B shows as the run's config.
        group: the sweep that the run belongs to.
        job_type: what kind of run it is.
        job_tags: more tags; W&B takes 64 characters of each.
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
        group: str | None = None,
        job_type: str = "train",
        job_tags: Sequence[str] = (),
    ) -> None:
        import wandb

        about: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "tags": [*tags, *(tag[:64] for tag in job_tags)],
            "group": group,
            "dir": folder,
            "id": _agents_run() or run_id,
            "resume": "allow",
            "job_type": job_type,
            "config": config,
            "settings": wandb.Settings(console="off", silent=True, finish_timeout=60),
        }
        self.run = wandb.init(mode="online" if mode == "online" and _reachable(folder) else "offline", **about)
        self.run.define_metric("*", step_metric="trainer/step")

    def log(self, row: Row) -> None:
        """Send one row."""
        step = int(row["step"])
        self.run.log(row | {"trainer/step": step}, step=step)

    def close(self, state: str) -> None:
        """Finish the run; only a run that is done has exit code 0."""
        self.run.finish(exit_code=0 if state == "done" else 1)


def _agents_run() -> str | None:
    """Return the run that W&B's own agent has made for this process, if it is one that the agent started."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def _reachable(folder: Path) -> bool:
    """Say whether W&B knows us; if not, why, and what to do later."""
    import wandb

    later = f"Upload this run later with: wandb sync {folder / 'wandb' / 'offline-run-*'}"
    try:
        if wandb.login(prompt=False):
            return True
        logger.warning(
            "W&B has no API key here, so this run is kept offline. Set WANDB_API_KEY or run `wandb login`. %s", later
        )
    except wandb.Error as error:
        logger.warning("W&B cannot be reached, so this run is kept offline (%s). %s", error, later)
    return False
