"""One writer a folder: a lease file that names the process, whose time of change shows that it is running."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from apt_model.errors import ConfigError
from apt_model.files import open_new, read_json, refuse_link

INTERVAL = 2.0
"""Seconds between two heartbeats: changes of the file's time."""

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
    boot: str = ""  # of the system, since when pids count; empty: a holder of an earlier version, or a system without
    pid_namespace: str = ""  # in which the pid counts: containers may share a host's name, and not its pids

    @classmethod
    def this_process(cls, job_id: str | None = None, restart: int = 0) -> Holder:
        """Return the calling process as a holder."""
        own = (socket.gethostname(), os.getpid(), _began("self"), job_id, restart, uuid.uuid4().hex)
        return cls(*own, _boot(), _pid_namespace())

    @property
    def alive(self) -> bool | None:
        """Whether the process runs; None: its pid counts elsewhere, on another host, in another container or before a boot."""
        if self.host != socket.gethostname() or not _shows_own_namespace():
            return None
        if (self.boot and self.boot != _boot()) or (self.pid_namespace and self.pid_namespace != _pid_namespace()):
            return None
        return bool(self.began) and _began(str(self.pid)) == self.began

    @property
    def where(self) -> str:
        """The place where its pid counts, in words."""
        if self.alive is None and self.host == socket.gethostname():
            return f"{self.host}, in another container or before the machine's last start"
        return self.host


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""


def _shows_own_namespace() -> bool:
    """Return whether ``/proc`` has the pids that this process counts by; a new namespace may still have the old one's."""
    try:
        return str(Path("/proc/self").readlink()) == str(os.getpid())
    except OSError:
        return True  # a system without /proc


def _began(pid: str) -> str:
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
        os.kill(os.getpid() if pid == "self" else int(pid), 0)
    except OSError:
        return ""
    return "unknown"


class Lease:
    """Held while a run writes into its folder.

    A process that finds it held takes it over from a process that is gone, and from one whose pid counts elsewhere and that
    has no heartbeat. From an earlier attempt of the same SLURM job it takes it over, too, and waits until that one,
    which sees the loss within ``INTERVAL``, has left. In any other case it is refused.

    Args:
        path: of the file, in the run's folder.
        holder: who asks for it.

    Raises:
        ConfigError: another process writes there, or a link is in the file's place.
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
        with open_new(aside) as file:
            file.write(json.dumps(asdict(self.holder)).encode())
        try:
            try:
                os.link(aside, self.path)
                return
            except FileExistsError:
                refuse_link(self.path)
                before = read_holder(self.path)
            earlier = before is not None and self._is_later_than(before)
            if before is not None and not earlier and is_alive(self.path):
                raise ConfigError(
                    f"{self.path.parent}: process {before.pid} on {before.where} is writing here. Wait for it or stop it, or "
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
                os.utime(self.path, follow_symlinks=False)
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


def holder_is_alive(folder: Path) -> bool:
    """Return whether the process that writes into ``folder`` runs."""
    return is_alive(folder / "lease.json")


def is_alive(path: Path) -> bool:
    """Return whether the process that the file at ``path`` names runs: by its pid where that counts here, else by heartbeats.

    Heartbeats are awaited for three intervals; clocks of two hosts are never compared.
    """
    holder = read_holder(path)
    if holder is None:
        return False
    if holder.alive is not None:
        return holder.alive
    first = _touched(path)
    until = time.monotonic() + 3 * INTERVAL
    while time.monotonic() < until:
        if _touched(path) != first:
            return True
        time.sleep(INTERVAL / 10)
    return False


@contextmanager
def heartbeats(path: Path) -> Iterator[None]:
    """Touch the file at ``path`` every interval, from a process of its own that ends with this one.

    A thread would do, too, but for processes that this one forks meanwhile.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            while os.getppid() == parent:
                with suppress(OSError):  # a file system that is away for a moment
                    os.utime(path, follow_symlinks=False)
                time.sleep(INTERVAL)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # it was waited for
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _touched(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0
