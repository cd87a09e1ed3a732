"""Checkpoints that are whole or not there: written aside, synced, checksummed, renamed.

A folder ``step-XXXXXXXX`` holds ``state.pt`` and ``manifest.json`` with the size and sha256 of every file. Finding and
judging checkpoints needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_model.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.pt"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder for each checkpoint; made when needed.
        keep_last: how many stay; older ones are removed after a newer one is safe.
        about: goes into each manifest as it is: what run this is.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, about: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.about = dict(about or {})

    def save(self, state: Mapping[str, Any], *, step: int, rows: int = 0) -> Path:
        """Write ``state`` (tensors and plain values) and return its folder; once this returns, a crash cannot undo it.

        Args:
            step: updates made so far; names the folder.
            rows: rows of metrics logged so far; those after them will be logged again by a resume.

        Raises:
            CheckpointError: the disk is full, the folder cannot be written. Earlier checkpoints are untouched.
        """
        import torch

        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{final.name}.tmp"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            with (aside / STATE).open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            manifest = {
                "step": step,
                "rows": rows,
                "about": self.about,
                "files": {STATE: _fingerprint(aside / STATE)},
            }
            with (aside / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(aside)
            replaced = self.folder / f".{final.name}.old"
            if final.exists():  # the same step again: its epoch is complete now, or it was reached anew after a resume
                final.rename(replaced)
            aside.rename(final)
            _sync_folder(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(f"the checkpoint of step {step} could not be written to {final}: {error}") from None
        for old in self.all()[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def all(self) -> list[Path]:
        """Return the checkpoints' folders, oldest first, without a look inside."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint in ``folder`` that is whole, and why newer ones were passed over."""
    passed_over = []
    for path in reversed(Checkpoints(folder).all()):
        try:
            read_manifest(path)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return path, passed_over
    return None, passed_over


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, after comparing every file with it.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint: {MANIFEST} cannot be read ({error})") from None
    for name, expected in files.items():
        try:
            found = _fingerprint(checkpoint / name)
        except OSError as error:
            raise CheckpointError(f"{checkpoint} is damaged: {name} cannot be read ({error.strerror})") from None
        if found != expected:
            raise CheckpointError(f"{checkpoint} is damaged: {name} differs from its checksum in {MANIFEST}")
    return manifest


def load(checkpoint: Path) -> dict[str, Any]:
    """Return the state saved in ``checkpoint``, on the CPU.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    import pickle

    import torch

    read_manifest(checkpoint)
    try:
        state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} holds something else than tensors and plain values: {error}") from None
    return state


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
