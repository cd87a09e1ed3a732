"""TensorBoard: events under ``tensorboard/`` in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apt_launch.tracking import Row
from apt_model.errors import ConfigError


class TensorBoardTracker:
    """Writes every metric as a scalar over the step.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, *, mode: str, folder: Path, **run: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "logger: tensorboard is not installed. Run: pip install 'apt-launch[tensorboard]', or choose logger=wandb."
            ) from None
        self.writer = SummaryWriter(folder / "tensorboard")

    def log(self, row: Row) -> None:
        """Write one row."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, global_step=int(row["step"]))

    def close(self, state: str) -> None:
        """Flush and close."""
        self.writer.close()
