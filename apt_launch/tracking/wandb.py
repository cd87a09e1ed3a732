"""Weights & Biases, offline unless asked otherwise; files under ``wandb/`` in the run's folder."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_launch.commands import command
from apt_launch.record import Row

logger = logging.getLogger(__name__)

START_TIMEOUT = 30.0
FINISH_TIMEOUT = 45.0
"""Seconds that W&B's client may take."""


class WandbTracker:
    """Shows rows to W&B under the steps they have here, each once: what the service has already is skipped.

    Rows of one step (the last update of an epoch and its validation) are one row there. The service takes no row for a step
    that it has, so the last update of an epoch waits for its validation.

    Args:
        mode: ``offline``; or ``online``, which needs a key and is offline without one, or while the service is away.
        folder: the run's folder.
        run_id: the same for every attempt of the run.
        config: what W&B shows as the run's config.
        updates_per_epoch: planned; see above.
        group: the sweep that the run belongs to.
        job_type: what kind of run it is.
        job_tags: more tags; W&B takes 64 characters of each.
        fallback: whether ``online`` may become offline; otherwise it raises.
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
        updates_per_epoch: int,
        group: str | None = None,
        job_type: str = "train",
        job_tags: Sequence[str] = (),
        fallback: bool = True,
    ) -> None:
        import wandb

        about: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "tags": [*tags, *(tag[:64] for tag in job_tags)],
            "group": group,
            "dir": folder,
            "id": run_id,
            "resume": "allow",
            "job_type": job_type,
            "config": config,
            "settings": wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,  # and no diff: provenance.json has one, without lines that look like secrets
                init_timeout=START_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
            ),
        }
        self.updates_per_epoch = updates_per_epoch
        self._held: Row = {}
        with contextlib.ExitStack() as quiet, _abandoning_client():
            quiet.enter_context(_its_threads_quiet())
            self.run: Any = self._online(about, fallback=fallback) if mode == "online" else None
            if self.run is None:
                _put_earlier_away(folder / "wandb")
                self.run = wandb.init(mode="offline", **about)
            self.run.define_metric("*", step_metric="trainer/step")
            self._quiet = quiet.pop_all()  # until the run is finished
        self.delivered = self.run.starting_step - 1
        """The last step that the service has."""
        self.sent = 0
        """Rows sent from here."""

    @staticmethod
    def _online(about: dict[str, Any], *, fallback: bool) -> Any:
        """Return a run that the service knows; None, with a message, if there is no key or no answer."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        try:
            if not wandb.login(prompt=False):
                raise wandb.errors.UsageError("there is no API key here. Set WANDB_API_KEY or run `wandb login`")
            run = wandb.init(mode="online", **about)
        except wandb.Error as error:
            if not fallback:
                raise
            _abandon_client()
            logger.warning(
                "W&B: %s. This run is kept offline; deliver it later with: %s",
                str(error).strip().splitlines()[0].rstrip("."),
                command("apt_launch.sync", about["dir"]),
            )
            return None
        logger.info("W&B: %s", run.url)
        return run

    def log(self, row: Row) -> None:
        """Take one row; it is sent when the next step begins."""
        if self._held and row["step"] != self._held["step"]:
            self._send()
        self._held |= row

    def _send(self) -> None:
        step = int(self._held["step"])
        if step > self.delivered:
            with _abandoning_client():
                self.run.log(self._held | {"trainer/step": step}, step=step)
            self.sent += 1
        self._held = {}

    def close(self, state: str) -> None:
        """Finish the run; one that failed or was interrupted has exit code 1."""
        if self._held and not (self._awaits_validation() and state != "done"):
            self._send()
        with self._quiet, _abandoning_client():
            self.run.finish(exit_code=0 if state in ("done", "running", "stopped") else 1)

    def _awaits_validation(self) -> bool:
        return (int(self._held["step"]) + 1) % self.updates_per_epoch == 0 and "val/loss" not in self._held


def mode_of(asked: str, environment: Mapping[str, str] = os.environ) -> tuple[str, str | None]:
    """Return the mode that W&B's own variables leave of the ``asked`` one, and the variable that has changed it.

    They can only take away: a run that asks for ``offline`` stays so where WANDB_MODE says online.
    """
    if asked == "disabled":
        return asked, None
    if environment.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on", "t", "y"):
        return "disabled", f"WANDB_DISABLED={environment['WANDB_DISABLED']}"
    given = environment.get("WANDB_MODE", "").strip().lower()
    mode = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}.get(given, asked)
    return mode, None if mode == asked else f"WANDB_MODE={given}"


def _abandon_client() -> None:
    """Leave a client that is dead, or that waits for a service which is away: the process's end would wait for it."""
    import wandb

    def leave() -> None:
        with contextlib.suppress(Exception):
            wandb.teardown()

    thread = threading.Thread(target=leave, name="wandb teardown", daemon=True)
    thread.start()
    thread.join(timeout=2)  # it has let go of the client by then, if not yet ended it


@contextlib.contextmanager
def _abandoning_client() -> Iterator[None]:
    """Leave the client if what is done with it fails."""
    try:
        yield
    except Exception:
        _abandon_client()
        raise


@contextlib.contextmanager
def _its_threads_quiet() -> Iterator[None]:
    """Log, not print, what ends a thread of W&B's client meanwhile: when its process dies, the next row fails and says so."""
    import wandb

    place = str(Path(wandb.__file__).parent)
    others = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        frames = traceback.extract_tb(ended.exc_traceback)
        if ended.exc_value is not None and any(frame.filename.startswith(place) for frame in frames):
            name = ended.thread.name if ended.thread else "a thread"
            logger.debug("%s of W&B's client has ended: %s", name, ended.exc_value, exc_info=ended.exc_value)
        else:
            others(ended)

    threading.excepthook = hook
    try:
        yield
    finally:
        if threading.excepthook is hook:  # whoever came later calls it still
            threading.excepthook = others


def _put_earlier_away(folder: Path) -> None:
    """Make room for a whole offline run: what earlier attempts left of it is kept, out of the way of ``wandb sync``."""
    for earlier in folder.glob("offline-run-*"):
        (folder / "earlier").mkdir(exist_ok=True)
        earlier.rename(folder / "earlier" / earlier.name)
