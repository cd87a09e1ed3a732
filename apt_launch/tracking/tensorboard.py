"""TensorBoard: events under ``tensorboard/`` in the run's folder."""

from __future__ import annotations

from pathlib import Path

from apt_launch.record import Row


class TensorBoardTracker:
    """Writes every metric as a scalar over the step; a resume writes those of before anew."""

    def __init__(self, *, mode: str, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for earlier in (folder / "tensorboard").glob("events.out.tfevents.*"):
            earlier.unlink()
        self.writer = SummaryWriter(folder / "tensorboard")

    def log(self, row: Row) -> None:
        """Write one row."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, global_step=int(row["step"]))

    def close(self, state: str) -> None:
        """Flush and close."""
        self.writer.close()
