"""Checkpoints that are whole or not there: written aside, synced, checksummed, renamed; only then are older ones pruned.

A folder ``step-XXXXXXXX`` holds ``model.safetensors`` (the weights), ``state.pt`` (all else that a resume needs) and
``manifest.json`` with the size and sha256 of both. Finding and judging checkpoints needs no torch.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from apt_model.errors import CheckpointError, ConfigError
from apt_model.files import from_json, read_regular, sha256, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.pt"
WEIGHTS = "model.safetensors"


def name_of(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints of one run.

    One that cannot be written (a full disk, a folder that became read-only) costs no training: it is warned of, and what was
    there before stays. Only a checkpoint that the caller waits for raises.

    Args:
        folder: holds one folder for each checkpoint; made when needed.
        keep_last: the newest ones that stay.
        keep_best: those of the lowest validation loss that stay as well.
        keep_every: checkpoints after each such number of epochs stay as well; None: none for that reason.
        about: goes into each manifest as it is: what run this is.
        before: called before one is written, in the thread that writes: what it counts on must be safe by then.
        forks: steps from which other runs begin. A checkpoint that is there for that reason alone is none of the newest.
        needed: those of them whose checkpoints stay, asked whenever some are removed.
        after: called with its step when one is written, in the thread that writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        keep_every: int | None = None,
        about: Mapping[str, Any] | None = None,
        before: Callable[[], None] = lambda: None,
        forks: Collection[int] = (),
        needed: Callable[[], Collection[int]] = lambda: (),
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every = keep_every
        self.about = dict(about or {})
        self.before = before
        self.forks = forks
        self.needed = needed
        self.after = after
        self._writer: threading.Thread | None = None

    def save(self, state: Mapping[str, Any], *, step: int, wait: bool = True, **progress: Any) -> Path:
        """Write ``state`` and return its folder. ``state["model"]``, if there is one, has the weights by name.

        Args:
            step: updates made so far; names the folder.
            wait: until a crash cannot undo it; False: return once ``state`` is copied, and write in the background.
            progress: goes into the manifest: ``rows`` of metrics logged so far (those after them will be logged again by a
                resume), ``epochs`` that are complete, the validation ``loss``.

        Raises:
            CheckpointError: it could not be written, and the caller waits. Earlier checkpoints are untouched.
        """
        self.wait()
        if wait:
            return self._write(state, step, progress)
        copied = _copy(state)
        self._writer = threading.Thread(target=self._write_or_warn, args=(copied, step, progress), name="checkpoint")
        self._writer.start()
        return self.folder / name_of(step)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write_or_warn(self, state: Mapping[str, Any], step: int, progress: Mapping[str, Any]) -> None:
        try:
            self._write(state, step, progress)
        except CheckpointError as error:
            newest = self.all()[-1:]
            left = f"The newest one is {newest[0].name}." if newest else "There is none yet."
            logger.warning("%s. Training goes on without it. %s", error, left)

    def adopt(self, state: Mapping[str, Any], weights: Path, *, step: int, **progress: Any) -> Path:
        """Write ``state`` with its weights as the file of another checkpoint, where the file system has both; see :meth:`save`.

        Raises:
            CheckpointError: it could not be written.
        """
        return self._write(state, step, progress, weights)

    def _write(
        self, state: Mapping[str, Any], step: int, progress: Mapping[str, Any], adopted: Path | None = None
    ) -> Path:
        import torch
        from safetensors.torch import save_file

        final = self.folder / name_of(step)
        aside = self.folder / f".{final.name}.tmp"
        rest = dict(state)
        weights = {n: value for n, value in rest.pop("model", {}).items() if isinstance(value, torch.Tensor)}
        if "model" in state:
            rest["model"] = {name: value for name, value in state["model"].items() if name not in weights}
        written = [WEIGHTS, STATE] if "model" in state else [STATE]
        try:
            self.before()
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            if adopted is not None:
                _link(adopted, aside / WEIGHTS)
            elif WEIGHTS in written:
                save_file(_each_its_own(weights), aside / WEIGHTS)
            with (aside / STATE).open("wb") as file:
                torch.save(rest, file)
            files = {name: _fingerprint(aside / name) for name in written}
            manifest = {"step": step, **progress, "about": self.about, "files": files}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            for name in (*written, MANIFEST):
                sync(aside / name)
            sync(aside)
            if final.exists():  # the same step again: its epoch is complete now, or it was reached anew after a resume
                final.rename(_replaced(final))
            aside.rename(final)
            sync(self.folder)
        except Exception as error:  # torch reports a full disk as a RuntimeError, safetensors as its own error
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, OSError | RuntimeError) and type(error).__name__ != "SafetensorError":
                raise
            raise CheckpointError(f"the checkpoint of step {step} could not be written to {final}: {error}") from None
        self.after(step)
        self.prune()
        return final

    def prune(self) -> None:
        """Remove what need not stay; the newest one always does."""
        there = [path for path in self.all() if not path.name.startswith(".")]
        manifests = {path: _manifest_or_empty(path) for path in there}
        forks = {*map(name_of, self.forks)}
        own = [path for path in there if path.name not in forks or manifests[path].get("epochs") is not None]
        stay = {*own[-self.keep_last :], *there[-1:]}
        losses = [path for path in there if manifests[path].get("loss") is not None]
        stay |= set(sorted(losses, key=lambda path: manifests[path]["loss"])[: self.keep_best])
        if self.keep_every is not None:
            epochs = {path: manifests[path].get("epochs") for path in there}
            stay |= {path for path, done in epochs.items() if done and done % self.keep_every == 0}
        needed = {*map(name_of, self.needed())}
        stay |= {path for path in there if path.name in needed}
        for old in [*(path for path in there if path not in stay), *self.folder.glob(".step-*")]:
            shutil.rmtree(old, ignore_errors=True)

    def all(self) -> list[Path]:
        """Return the checkpoints' folders, oldest first, without a look inside."""
        there = {path.name: path for path in self.folder.glob("step-*") if path.is_dir()}
        for path in self.folder.glob(".step-*.old"):  # cut off between two renames
            there.setdefault(path.stem[1:], path)
        return [there[name] for name in sorted(there)]

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, the first one first, without a look inside."""
        return [int(path.name[5:]) for path in self.all() if re.fullmatch("step-[0-9]{8,}", path.name)]


def _each_its_own(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``weights`` with a copy of what several names share, such as tied embeddings: the format has no such thing."""
    found, taken = {}, set()
    for name, tensor in weights.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        found[name] = tensor.contiguous() if place not in taken else tensor.clone()
        taken.add(place)
    return found


def _link(source: Path, place: Path) -> None:
    """Make ``place`` the same file as ``source``, or a copy."""
    try:
        place.hardlink_to(source)
    except OSError:  # another file system, or one without such links
        shutil.copyfile(source, place)


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


@dataclass(frozen=True)
class _File:
    """The schema of a file in a manifest."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True}

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """The schema of ``manifest.json``; callers of :meth:`Checkpoints.save` may add to it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True}

    step: int
    about: dict[str, Any]
    files: dict[str, _File]
    rows: int = 0
    epochs: int | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no checkpoint can have."""
        if min(self.step, self.rows, self.epochs or 0) < 0:
            raise ValueError("steps, rows and epochs cannot be negative")
        if not {STATE} <= set(self.files) <= {STATE, WEIGHTS}:
            raise ValueError(f"its files are not {STATE} and {WEIGHTS}")


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, without a look at the files that it names.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = checkpoint / MANIFEST
    try:
        text = read_regular(path)
        from_json(text, _Manifest, where=str(path), remedy="Remove that checkpoint: the one before it is taken then.")
    except (FileNotFoundError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint: {MANIFEST} cannot be read ({error})") from None
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def _manifest_or_empty(checkpoint: Path) -> dict[str, Any]:
    try:
        return _read_manifest(checkpoint)
    except CheckpointError:
        return {}


def _copy(state: Any) -> Any:
    """Return ``state`` with every tensor copied to the CPU: the next update may change the original."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().clone() if state.device.type == "cpu" else state.detach().cpu()
    if isinstance(state, Mapping):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return state


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
    manifest = _read_manifest(checkpoint)
    files = manifest["files"]
    for name in files:
        try:
            found = _fingerprint(checkpoint / name, files[name]["bytes"])
        except OSError as error:
            raise CheckpointError(f"{checkpoint} is damaged: {name} cannot be read ({error.strerror})") from None
        except ConfigError as error:
            raise CheckpointError(f"{checkpoint} is damaged: {error}") from None
        if found != files[name]:
            raise CheckpointError(f"{checkpoint} is damaged: {name} differs from its checksum in {MANIFEST}")
    return manifest


def load(checkpoint: Path) -> dict[str, Any]:
    """Return the state saved in ``checkpoint``, on the CPU; tensors stay in its files, and are read where they are used.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = read_manifest(checkpoint)["files"]
    try:
        state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
        if WEIGHTS in files:
            state["model"] = load_file(checkpoint / WEIGHTS) | state["model"]
    except (
        *(pickle.UnpicklingError, RuntimeError, SafetensorError, EOFError, OSError),
        *(KeyError, IndexError, TypeError, ValueError, AttributeError),  # of plain values that are not a state
    ) as error:
        raise CheckpointError(f"{checkpoint} holds something else than tensors and plain values: {error}") from None
    return state


def _fingerprint(path: Path, expected: int | None = None) -> dict[str, Any]:
    """Return size and checksum of a file; one of another size than ``expected`` is not read."""
    about = path.stat()
    if expected not in (None, about.st_size):
        return {"bytes": about.st_size}
    return {"bytes": about.st_size, "sha256": _sha256(path, about.st_size, about.st_mtime_ns, about.st_ino)}


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """Hash a file once; the last three arguments notice another one under its name."""
    return sha256(path)
