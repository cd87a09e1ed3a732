"""The check of a run before Hydra makes its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from apt_launch.command_line import make_folder, show_error
from apt_launch.config.load import load
from apt_launch.runs.folder import Checked, RunFolder
from apt_model.errors import ConfigError


class CheckBeforeStart(Callback):
    """Checks a run before Hydra makes its folder, so that a mistake leaves nothing behind.

    What came of it is handed to the task function as its attribute ``checked``.
    """

    checked: Checked | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave with exit code 2 if the config is wrong, or no folder can be there. (Hydra would warn of an exception.)"""
        try:
            folder = Path(config.hydra.run.dir)
            self.checked = RunFolder(folder).check(load(config))
            make_folder(folder, "hydra.run.dir")  # as Hydra would, which does not say what is wrong with it
        except ConfigError as error:
            show_error(error)
            raise SystemExit(2) from None

    def on_job_start(self, config: DictConfig, *, task_function: Callable[..., Any], **kwargs: Any) -> None:
        """Hand over what was checked; a job of a sweep was not."""
        task_function.checked = self.checked  # type: ignore[attr-defined]
