"""One writer a folder: a lease file that names the process, whose time of change shows that it lives."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from apt_model.errors import ConfigError
from apt_model.files import read_json

INTERVAL = 2.0
"""Seconds between signs of life."""

LOST = 70
"""Exit code of a process whose lease was taken over: it has left without writing."""


@dataclass(frozen=True)
class Holder:
    """The process that may write. ``job_id`` and ``restart`` are SLURM's: a later attempt of one job may take over."""

    host: str
    pid: int
    began: str  # when the process began, as its system counts: a pid may be used again
    job_id: str | None
    restart: int
    token: str

    @classmethod
    def this_process(cls, job_id: str | None = None, restart: int = 0) -> Holder:
        """Return the calling process as a holder."""
        return cls(socket.gethostname(), os.getpid(), _began(os.getpid()), job_id, restart, uuid.uuid4().hex)

    @property
    def alive(self) -> bool | None:
        """Whether the process lives; None: it runs on another host, from where this cannot be known."""
        if self.host != socket.gethostname():
            return None
        return bool(self.began) and _began(self.pid) == self.began


def _began(pid: int) -> str:
    """Return when the process began, in its system's words; empty: there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    except OSError:
        return ""
    try:  # a system without /proc
        os.kill(pid, 0)
    except OSError:
        return ""
    return "unknown"


class Lease:
    """Held while a run writes into its folder.

    A process that finds it held takes it over from a process of this host that is gone, and from one of another host that
    shows no sign of life. From an earlier attempt of the same SLURM job it takes it over, too, and waits until that one,
    which sees the loss within ``INTERVAL``, has left. In any other case it is refused.

    Args:
        path: of the file, in the run's folder.
        holder: who asks for it.

    Raises:
        ConfigError: another process writes there.
    """

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path = path
        self.holder = holder
        self._released = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        aside = self.path.with_name(f".{self.path.name}.{self.holder.token}")
        aside.write_text(json.dumps(asdict(self.holder)), encoding="utf-8")
        try:
            try:
                os.link(aside, self.path)
                return
            except FileExistsError:
                before = read_holder(self.path)
            earlier = before is not None and self._is_later_than(before)
            if before is not None and not earlier and (before.alive or (before.alive is None and self._shows_life())):
                raise ConfigError(
                    f"{self.path.parent}: process {before.pid} on {before.host} is writing here. Wait for it or stop it, or "
                    "choose another folder."
                )
            aside.replace(self.path)
            if before is not None and earlier:
                self._wait_until_gone(before)
        finally:
            aside.unlink(missing_ok=True)
        self.check()

    def _is_later_than(self, other: Holder) -> bool:
        return other.job_id is not None and other.job_id == self.holder.job_id and other.restart < self.holder.restart

    def _shows_life(self) -> bool:
        """Watch the file for three intervals; clocks of two hosts are never compared."""
        first = _touched(self.path)
        until = time.monotonic() + 3 * INTERVAL
        while time.monotonic() < until:
            if _touched(self.path) != first:
                return True
            time.sleep(INTERVAL / 10)
        return False

    @staticmethod
    def _wait_until_gone(before: Holder) -> None:
        until = time.monotonic() + 3 * INTERVAL
        while time.monotonic() < until and before.alive is not False:
            time.sleep(INTERVAL / 20)

    def _keep(self) -> None:
        while not self._released.wait(INTERVAL):
            if self.lost:
                sys.stderr.write(f"lost the lease {self.path}: another attempt of this job writes here now. Leaving.\n")
                sys.stderr.flush()
                os._exit(LOST)
            try:
                os.utime(self.path)
            except OSError:
                continue  # a file system that is away for a moment

    @property
    def lost(self) -> bool:
        """Whether somebody else holds it now."""
        now = read_holder(self.path)
        return now is not None and now.token != self.holder.token

    def check(self) -> None:
        """End the process at once if the lease is lost: whoever took it must find nothing changed."""
        if self.lost:
            os._exit(LOST)

    def release(self) -> None:
        """Give it back."""
        self._released.set()
        self._thread.join()
        if not self.lost:
            self.path.unlink(missing_ok=True)


def read_holder(path: Path) -> Holder | None:
    """Return the holder of the lease at ``path``; None: nobody has it."""
    try:
        return read_json(path, Holder, remedy="Remove it once nobody writes here.")
    except (OSError, ConfigError):
        return None


def holder_is_alive(folder: Path) -> bool | None:
    """Return whether the process that writes into ``folder`` lives; None: it cannot be known from here."""
    holder = read_holder(folder / "lease.json")
    return False if holder is None else holder.alive


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
