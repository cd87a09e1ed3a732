"""``launch.drill``: interrupt a run on purpose, and prove that it continues exactly.

Half-way the run stops as it would for a cluster's signal, with a checkpoint. The interrupted process then continues a little
by itself, in its memory only: what it computes there is what an uninterrupted run would have. The attempt that continues from
the checkpoint must give the same rows and the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from apt_launch.config.run_config import RunConfig
from apt_model.errors import Interrupted, TrainingError
from apt_model.files import STRICT, read_json, write_json

if TYPE_CHECKING:
    from apt_model.training.base import BaseTrainer
    from apt_model.training.callbacks import Callback, TrainerView

logger = logging.getLogger(__name__)

LENGTH = 8
"""Updates that are compared."""

NOT_COMPARED = ("time", "tokens_per_second", "mfu")


class Drilled(Interrupted):
    """The run was interrupted on purpose."""


@dataclass(frozen=True)
class SavedDrill:
    """The schema of ``drill.json``: what an uninterrupted run would have computed next."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    step: int
    until: int
    rows: tuple[dict[str, float], ...]
    weights: str
    verified: bool

    def __post_init__(self) -> None:
        """Refuse rows of no step."""
        if not all("step" in row for row in self.rows):
            raise ValueError("a row has no step")


class Drill:
    """The drill of the run in ``folder``, as far as it has come; without ``launch.drill`` it does nothing."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.path = folder / "drill.json"
        self.wanted = config.launch.drill
        self.half = config.horizon.steps // 2
        self.last = config.horizon.steps
        self.saved: SavedDrill | None = None
        if self.wanted and self.path.exists():
            remedy = "Remove it, and the drill is made at the next start; or set launch.drill=false."
            self.saved = read_json(self.path, SavedDrill, remedy=remedy)
        self._trainer: BaseTrainer | None = None

    @property
    def to_come(self) -> bool:
        """Whether the interruption is still ahead."""
        return self.wanted and self.saved is None

    def stop_or(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a request to stop when the drill wants it, or when ``stop`` says so."""

        def asked() -> bool:
            half_way = self.to_come and self._trainer is not None and self._trainer.clock.step >= self.half
            return half_way or stop()

        return asked

    @property
    def callbacks(self) -> list[Callback]:
        """What compares, in the attempt after the interruption."""
        from apt_model.training.callbacks import Callback

        if self.saved is None or self.saved.verified:
            return []

        class Compare(Callback):
            def __init__(self, path: Path, saved: SavedDrill) -> None:
                self.path, self.saved = path, saved
                self.rows = {row["step"]: row for row in saved.rows}

            def on_step(self, trainer: TrainerView) -> None:
                step = trainer.clock.step
                if step in self.rows and trainer.last_row.get("step") == step and "train/loss" in trainer.last_row:
                    _compare(self.rows[step], _comparable(trainer.last_row))
                if step == self.saved.until - 1:
                    digest = weights(trainer)  # on every rank, one of which notes it
                    if digest != self.saved.weights:
                        raise TrainingError(
                            f"drill: the weights after step {step} are not those of the uninterrupted run."
                        )
                    if not _is_other_rank():
                        write_json(self.path, asdict(replace(self.saved, verified=True)))
                    logger.info(
                        "drill: interrupted before step %d, continued exactly: %d rows and all weights after step %d are "
                        "those of the uninterrupted run, bit for bit",
                        self.saved.step,
                        len(self.rows),
                        step,
                    )

        return [Compare(self.path, self.saved)]

    def fit(self, trainer: BaseTrainer) -> None:
        """Train; where the drill stopped it, note what an uninterrupted run would have computed next.

        Raises:
            Drilled: the drill stopped it.
            Interrupted: something else did.
        """
        self._trainer = trainer
        try:
            trainer.fit()
        except Interrupted as interrupted:
            if not self.to_come or trainer.clock.step < self.half:
                raise
            self._go_on_in_memory(trainer)
            raise Drilled(str(interrupted)) from None

    def _go_on_in_memory(self, trainer: BaseTrainer) -> None:
        rows: list[dict[str, float]] = []
        begun = trainer.clock.step
        until = min(begun + LENGTH, self.last)
        trainer.resume = trainer.checkpoints = None
        trainer.callbacks.callbacks.clear()
        if not _is_other_rank():
            trainer.log = rows.append
        trainer.loop = replace(trainer.loop, log_every=1)
        trainer.stop_requested = lambda: trainer.clock.step >= until
        with contextlib.suppress(Interrupted):
            trainer.fit()
        saved = {
            "step": begun,
            "until": until,
            "rows": [_comparable(row) for row in rows if "train/loss" in row],
            "weights": weights(trainer),
            "verified": False,
        }
        if not _is_other_rank():
            write_json(self.path, saved)


def _is_other_rank() -> bool:
    from apt_model.training.distributed import Ranks

    return bool(Ranks.of_group().rank)


def _comparable(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in NOT_COMPARED}


def _compare(expected: dict[str, float], found: dict[str, float]) -> None:
    """Raise if ``found`` differs anywhere; ``expected`` was logged in full, which not every row is."""
    names = sorted(name for name in found if expected.get(name) != found[name])
    if names:
        differences = ", ".join(f"{name} {found.get(name)!r} instead of {expected.get(name)!r}" for name in names[:3])
        raise TrainingError(f"drill: step {expected['step']} is not that of the uninterrupted run: {differences}.")


def weights(trainer: TrainerView) -> str:
    """Return the sha256 of all weights and buffers; every rank calls it."""
    import torch

    from apt_model.training.sharding import full_tensor

    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            digest.update(full_tensor(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
