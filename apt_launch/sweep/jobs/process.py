"""A job of a sweep, in the process that runs it: reads its folder's frozen config, runs the application, writes its state."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from apt_launch.command_line import take_any_character
from apt_launch.commands import command
from apt_launch.escapes import escape_logs
from apt_launch.lease import Holder, Lease
from apt_launch.secrets import keep_private
from apt_launch.sweep.application import TRAINER, Application, Awaited, Fork, JobContext, Program, Result, load
from apt_launch.sweep.jobs.halving import Halving
from apt_launch.sweep.jobs.state import State, read_state, transition, wants_cancel
from apt_launch.sweep.jobs.trunk import GRAFT, cause_of_loss, has_begun, take_over, trunk, wait_for_first_rank
from apt_launch.values import read_frozen
from apt_model.errors import ConfigError, Interrupted, TrainingError, cause_of
from apt_model.files import STRICT, read_json, refuse_links

logger = logging.getLogger(__name__)

DONE: Final = 0
FAILED: Final = 1
AGAIN: Final = 75
"""Exit code of a job that was interrupted and can continue (EX_TEMPFAIL of sysexits.h)."""
STOPPED: Final = 130

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""By which clusters, or people, ask a job to stop."""


class BudgetSpentError(TrainingError):
    """The job took all its hours."""


@dataclass(frozen=True)
class About:
    """The schema of ``job.json``: what a job's process has to know beside its config."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    sweep: str
    number: int
    overrides: tuple[str, ...]
    cwd: str
    hours: float
    application: str = TRAINER
    program: Program | None = None
    fork: Fork | None = None
    forks: tuple[Awaited, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for values that no plan has."""
        if not 0 < self.hours < math.inf:
            raise ValueError("its hours must be a number above 0")


def fork_of(folder: Path) -> Fork | None:
    """Return where the job in ``folder`` begins, as its process will read it."""
    try:
        return read_json(folder / "job.json", About, remedy="sweep resume writes it anew.").fork
    except (ConfigError, FileNotFoundError):  # which the job reports
        return None


class _TrunkLostError(Exception):
    """The updates that the job was to begin with will not come by themselves."""


class _StoppedEarly(Interrupted):
    """Asked to stop before the application had begun."""


def _stop_early(number: int, frame: Any) -> None:
    raise _StoppedEarly(f"{signal.Signals(number).name} before the job began")


def perform(
    folder: Path,
    *,
    job_id: str | None = None,
    restart: int | None = None,
    rank: int = 0,
    cores: int | None = None,
    requeue: Callable[[Path], None] = lambda folder: None,
    on_fork: Callable[[Sequence[Path]], None] = lambda folders: None,
) -> int:
    """Run the job of ``folder`` in this process; return its exit code.

    What it prints goes to ``log.txt`` there, of ranks after the first to ``log-RANK.txt``.

    Args:
        job_id: SLURM's; None: a worker of this machine runs it.
        restart: attempts of the job before this one; None: as its state says.
        cores: of this machine that it may use; None: as the environment says.
        requeue: gives an interrupted job back to its cluster, called while the folder is still this process's.
        on_fork: called with the folders of jobs that can begin, since this one has come to where they do.

    Raises:
        Exception: what made it fail; its state and its log have it.
    """
    keep_private()
    # signals wait until the folder is this process's, and while its state is written
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_early)
    _write_output_to(folder / ("log.txt" if rank == 0 else f"log-{rank}.txt"))
    take_any_character()
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s", force=True)
    escape_logs(logging.root.handlers)
    before = read_state(folder)
    attempts = restart if restart is not None else before.restarts
    try:
        lease = Lease(folder / "lease.json", Holder.this_process(job_id, attempts)) if rank == 0 else None
    except ConfigError as error:  # the state is that of the other writer
        logger.error("%s", error)
        raise
    try:
        return _Attempt(folder, before, job_id, attempts, rank, cores, on_fork).perform(requeue)
    finally:
        if lease is not None:
            lease.release()


class _Attempt:
    """One attempt at a job; its first rank writes the state."""

    def __init__(
        self,
        folder: Path,
        before: State,
        job_id: str | None,
        attempts: int,
        rank: int,
        cores: int | None,
        on_fork: Callable[[Sequence[Path]], None],
    ) -> None:
        self.folder = folder
        self.before = before
        self.job_id = job_id
        self.attempts = attempts
        self.rank = rank
        self.cores = cores
        self.on_fork = on_fork
        self.began = time.time()
        self.halving: Halving | None = None
        try:
            self.about = read_json(folder / "job.json", About, remedy="sweep resume writes it anew.")
        except (ConfigError, FileNotFoundError) as error:
            self._end("failed", cause=cause_of(error))
            logger.error("failed: %s", cause_of(error))
            raise
        self.hours = self.about.hours

    @property
    def hours_key(self) -> str:
        """The key that gives the job its hours."""
        return "launch.hours" if self.about.program is None else "hydra.launcher.hours"

    @property
    def seconds(self) -> float:
        """Taken by all attempts so far."""
        return self.before.seconds + time.time() - self.began

    def perform(self, requeue: Callable[[Path], None]) -> int:
        """Run the application; write how that ended, and return the exit code."""
        try:
            if self.rank == 0 and wants_cancel(self.folder):
                raise _StoppedEarly("cancelled before it began")
            result = self._run()
        except Interrupted:
            if wants_cancel(self.folder):
                kept = load(self.about.application, self.about.program).has_checkpoint(self.folder)
                self._end("cancelled", cause="on request; its checkpoint is kept" if kept else "on request")
                return STOPPED
            if self.halving is not None and self.halving.stopped is not None:
                self._end("stopped", cause=str(self.halving.stopped), loss=self.halving.last)
                return DONE
            if self.seconds >= self.hours * 3600:
                spent = BudgetSpentError(
                    f"it took its {self.hours:g} h. Continue it by: "
                    + command("apt_launch.sweep", "resume", self.folder.parent, f"{self.hours_key}={2 * self.hours:g}")
                )
                self._end("failed", cause=str(spent))
                raise spent from None
            self._end("preempted")
            if self.rank == 0:
                requeue(self.folder)
            return AGAIN
        except _TrunkLostError as lost:
            if self.rank == 0:
                transition(self.folder, "planned", cause=str(lost))
            return DONE
        except Exception as error:
            cause = cause_of(error)
            self._end("failed", cause=cause)
            if isinstance(error, ConfigError):  # of other errors the application has logged more
                logger.error("failed: %s", cause)
            raise
        self._end("done", loss=result.value)
        return DONE

    def _end(
        self,
        to: Literal["cancelled", "failed", "preempted", "done", "stopped"],
        *,
        cause: str | None = None,
        loss: float | None = None,
    ) -> None:
        if self.rank == 0:
            transition(
                self.folder,
                to,
                cause=cause,
                loss=loss,
                job_id=self.job_id,
                restarts=self.attempts,
                seconds=self.seconds,
            )

    def _run(self) -> Result:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        refuse_links(
            self.folder, f"job {self.about.number}"
        )  # put there since it was sent, or since an earlier attempt
        application = load(self.about.application, self.about.program)
        os.chdir(self.about.cwd)
        values = read_frozen(self.folder / "config.yaml")
        resume = self._begin(application, values)
        if not resume:  # rows of an attempt that came to no checkpoint will be computed again
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        if self.rank == 0:
            transition(self.folder, "running", job_id=self.job_id, restarts=self.attempts)
        self.halving = Halving.of(self.folder) if self.rank == 0 else None
        left = self.hours * 3600 - self.before.seconds
        if left <= 0:
            raise BudgetSpentError(f"it took its {self.hours:g} h ({self.hours_key}).")
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGUSR2))
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            return application.run(self.folder, values, self._context(resume))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def _begin(self, application: Application, values: Mapping[str, Any]) -> bool:
        """Take over the updates of another job, if this one shares any; return whether there is something to continue from.

        Raises:
            _TrunkLostError: nobody has made them, or will.
        """
        there = application.has_checkpoint(self.folder)
        if (fork := self.about.fork) is None or (self.rank == 0 and (self.folder / GRAFT).exists()):
            return there
        if there:
            if self.rank == 0:  # an earlier attempt was killed when it had taken them over
                has_begun(application, self.folder, fork, fork.update)
            return True
        if self.rank:
            if not wait_for_first_rank(self.folder):
                raise _TrunkLostError
        elif trunk(application, self.folder.parent, fork) in ("lost", "to come"):
            raise _TrunkLostError(cause_of_loss(self.folder.parent, fork))
        else:
            take_over(application, self.folder, values, fork)
        return application.has_checkpoint(self.folder)

    def _forked(self, update: int) -> None:
        folders = [
            self.folder.parent / name for fork in self.about.forks if fork.update == update for name in fork.jobs
        ]
        if folders:
            self.on_fork(folders)

    def _context(self, resume: bool) -> JobContext:
        return JobContext(
            sweep=self.about.sweep,
            number=self.about.number,
            overrides=self.about.overrides,
            rank=self.rank,
            attempt=self.attempts,
            resume=resume,
            cores=self.cores,
            judge=self.halving,
            forks=self.about.forks,
            on_fork=self._forked,
        )


def _write_output_to(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
