"""The first updates of a run, taken over from another whose first updates are the same.

Weights, optimizer and random state are the other run's. Rows of the record are those that this run would have written, with its
own scheduled values; their times are those of the run that was trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apt_launch.config.run_config import RunConfig
from apt_launch.record import Row, as_record, read_rows
from apt_launch.runs.folder import RunFolder, about
from apt_model.errors import CheckpointError, ConfigError
from apt_model.files import write_atomic
from apt_model.training.checkpoint import WEIGHTS, Checkpoints, name_of, read_manifest


def graft(config: RunConfig, folder: RunFolder, source: RunFolder, update: int) -> None:
    """Give the run of ``config`` in ``folder``, which has no checkpoint, that of ``source`` before ``update`` as its own.

    Raises:
        ConfigError: it is not there, is damaged, or was not made as planned; ``folder`` is as before.
    """
    checkpoint = source.checkpoints / name_of(update)
    try:
        manifest = read_manifest(checkpoint)
        rows = read_rows(source.metrics)[: manifest["rows"]] if manifest.get("rows") else []
    except (CheckpointError, FileNotFoundError) as error:
        raise ConfigError(f"{checkpoint}: {error}") from None
    if len(rows) < manifest.get("rows", 0):
        raise ConfigError(f"{source.metrics}: it has fewer rows than {checkpoint} knew.")
    own = own_rows(config, rows, update)
    write_atomic(folder.metrics, as_record(own))
    try:
        _write_checkpoint(config, folder, checkpoint, manifest, len(own))
    except (CheckpointError, ConfigError) as error:
        folder.metrics.unlink()
        raise ConfigError(str(error)) from None


def own_rows(config: RunConfig, rows: list[Row], update: int) -> list[Row]:
    """Return those of another run's ``rows`` that the run of ``config`` writes up to ``update``, with its scheduled values."""
    has_row = [one.has_row for one in itertools.islice(config.course.walk(), update)]
    found = []
    for row in rows:
        step = int(row["step"])
        if step >= update or ("train/loss" in row and not has_row[step]):
            continue
        values = config.program.at(config.horizon.clock_at(step))
        scheduled = {f"schedule/{name}": float(value) for name, value in values.items()}
        at = next((place for place, name in enumerate(row) if name.startswith("schedule/")), len(row))
        rest = [(name, value) for name, value in row.items() if not name.startswith("schedule/")]
        found.append(dict([*rest[:at], *scheduled.items(), *rest[at:]]))
    return found


def _write_checkpoint(
    config: RunConfig, folder: RunFolder, checkpoint: Path, manifest: Mapping[str, Any], rows: int
) -> None:
    """Write the checkpoint of another run as one of ``folder``'s; its weights are the same file where that can be."""
    from apt_model.training.saved_state import read_state

    update = int(manifest["step"])
    state = read_state(checkpoint)
    if not is_as_planned(config, state, update):
        raise ConfigError(f"{checkpoint}: that run has left updates out, so its update {update} is none of this run's.")
    state["progress"]["rows"] = rows
    state["schedule"]["horizon"] = asdict(config.horizon)
    progress = {"epochs": manifest.get("epochs"), "loss": manifest.get("loss")}
    Checkpoints(folder.checkpoints, keep_last=config.trainer.keep_last, about=about(config)).adopt(
        state, checkpoint / WEIGHTS, step=update, rows=rows, **progress
    )


def is_as_planned(config: RunConfig, state: Mapping[str, Any], update: int) -> bool:
    """Return whether a run's state is that after as many updates as its clock says, none left out."""
    clock, done = state["clock"], state["progress"]["batches_done"]
    within = -(-done // config.trainer.accumulate)
    passed: int = clock["epoch"] * config.horizon.updates_per_epoch + within
    return bool(clock["step"] == update == passed)
