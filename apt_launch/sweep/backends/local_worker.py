"""The worker of ``hydra/launcher=local``: starts jobs where there is room, and writes how those ended that could not."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apt_launch.escapes import visible
from apt_launch.lease import Holder, heartbeats, is_alive
from apt_launch.sweep.application import Fork, Resources, load
from apt_launch.sweep.backends.machine import Machine, worker_file
from apt_launch.sweep.jobs import process, trunk
from apt_launch.sweep.jobs.state import ENDED, ask_to_cancel, read_state, transition, wants_cancel
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.plan.tree import is_shared, longest_path
from apt_model.errors import ConfigError, ReportedError
from apt_model.files import write_json

MOST_RESTARTS = 20
"""Interruptions of one job after which it has failed."""

LOOK_SECONDS = 0.05
"""Between two looks whether jobs that wait for the updates of others can begin."""

GRACE_SECONDS = 60
"""Time of a cancelled job for its checkpoint."""


def work(sweep: str, name: str, names: Sequence[str], machine: Machine, max_parallel: int | None) -> None:
    """Run the jobs with the folders ``names``, as many at once as fit: what submitit calls in the worker's process."""
    os.setsid()  # Ctrl-C in the terminal is not for this process
    own = worker_file(Path(sweep), name)
    write_json(own, asdict(Holder.this_process()))
    with heartbeats(own):
        Worker(Path(sweep), names, machine, max_parallel, name=name).run()


class Worker:
    """Starts jobs where there is room, and notes how they ended."""

    def __init__(
        self,
        sweep: Path,
        names: Sequence[str],
        machine: Machine,
        max_parallel: int | None,
        *,
        name: str | None = None,
    ) -> None:
        self.sweep = sweep
        self.name = name  # by which the jobs' states say whose they are
        self.machine = machine
        self.running: dict[int, tuple[str, Resources, tuple[str, ...]]] = {}
        self.free_gpus = list(machine.gpus)
        self.max_parallel = max_parallel or machine.cores
        self.cancelled = False
        self.plan = Plan.read(sweep)
        self.application = load(self.plan.application, self.plan.program)
        self.forks: dict[str, Fork] = {}
        self.waiting = list(names)
        if is_shared(self.plan):
            self.forks = {name: fork for name in names if (fork := process.fork_of(sweep / name)) is not None}
            paths = longest_path(self.plan)
            self.waiting.sort(key=lambda name: -paths[name])
        self.resources = {name: self.plan.by_folder[name].resources for name in names}
        at_once = max(1, min(len(names), self.max_parallel, *(machine.room_for(r) for r in self.resources.values())))
        self.cores_each = max(1, machine.cores // at_once)

    def run(self) -> None:
        """Run all jobs."""
        self.take_over_signals()
        self.application.preload(self.plan.values(self.plan.jobs[0]))
        gc.collect()
        gc.freeze()  # what is shared with the jobs is never touched again
        while self.waiting or self.running:
            while not self.cancelled and (name := self.take_next()) is not None:
                self._start(name)
            if not self.running and (self.cancelled or not self.waiting):
                break
            pid, status = self.wait_for_one()
            if pid in self.running:
                self._note_end(pid, os.waitstatus_to_exitcode(status))
        for name in self.waiting:
            transition(self.sweep / name, "cancelled", cause="before it began")

    def take_over_signals(self) -> None:
        """Have a signal cancel all jobs."""
        signal.signal(signal.SIGTERM, self._cancel)

    def wait_for_one(self) -> tuple[int, int]:
        """Return process and status of the next that ends; process 0, where it is time to see which jobs can begin."""
        if not any(name in self.forks for name in self.waiting):
            return os.wait()
        time.sleep(LOOK_SECONDS)
        return os.waitpid(-1, os.WNOHANG) if self.running else (0, 0)

    def may_begin(self, name: str) -> bool:
        """Return whether nobody is about to make the updates that a job begins with; if they are lost, it finds out."""
        fork = self.forks.get(name)
        if fork is None or trunk.trunk(self.application, self.sweep, fork) != "to come":
            return True
        if fork.job in self.waiting or any(fork.job == running for running, _, _ in self.running.values()):
            return False
        return not is_alive(worker_file(self.sweep, read_state(fork.place(self.sweep)).job_id))

    def be_job(self, name: str, gpus: Sequence[str], resources: Resources) -> int:
        """Run a job in this process, which was just forked; return its exit code."""
        return _be_job(self.sweep / name, gpus, resources.cpus or self.cores_each)

    def wants_again(self, name: str) -> bool:
        """Return whether a job that was interrupted is to be started again by this worker."""
        return not self.cancelled

    def take_next(self) -> str | None:
        """Return the first waiting job that there is room for, which then waits no more; None: there is none."""
        taken = [resources for _, resources, _ in self.running.values()]
        cores = self.machine.cores - sum(r.cpus or 1 for r in taken)
        memory = self.machine.mem_gb - sum(r.mem_gb or 0 for r in taken)
        if len(self.running) >= self.max_parallel:
            return None
        for name in self.waiting:
            wanted = self.resources[name]
            fits = (wanted.cpus or 1) <= cores and (wanted.gpus or 0) <= len(self.free_gpus)
            if fits and (wanted.mem_gb or 0) <= memory and self.may_begin(name):
                self.waiting.remove(name)
                return name
        return None

    def _start(self, name: str) -> None:
        if self.name is not None and read_state(self.sweep / name).job_id not in (None, self.name):
            return  # cancelled while it waited, and sent again since
        if wants_cancel(self.sweep / name):
            transition(self.sweep / name, "cancelled", cause="before it began")
            return
        resources = self.resources[name]
        gpus = tuple(self.free_gpus[: resources.gpus or 0])
        del self.free_gpus[: len(gpus)]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = process.FAILED
            try:
                code = self.be_job(name, gpus, resources)
            except ReportedError:
                pass  # its own traceback is in the log
            except BaseException:
                import traceback

                sys.stderr.write(visible(traceback.format_exc()))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self.running[pid] = (name, resources, gpus)

    def _note_end(self, pid: int, code: int) -> None:
        name, _, gpus = self.running.pop(pid)
        self.free_gpus += gpus
        folder = self.sweep / name
        state = read_state(folder)
        if code == process.AGAIN and self.wants_again(name):
            if state.restarts < MOST_RESTARTS:
                transition(folder, "requeued", restarts=state.restarts + 1)
                self.waiting.append(name)
            else:
                transition(folder, "failed", cause=f"interrupted {MOST_RESTARTS} times")
        elif code == process.AGAIN and not self.cancelled:
            pass  # whoever runs this worker starts the job again
        elif state.state not in ENDED and not (code == process.DONE and state.state == "planned"):
            cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            if code == -signal.SIGKILL:
                cause += ", perhaps by a lack of memory"
            transition(folder, "cancelled" if self.cancelled else "failed", cause=cause)

    def _cancel(self, number: int, frame: Any) -> None:
        """Ask every job to stop, and kill those that have not after :data:`GRACE_SECONDS`."""
        self.cancelled = True
        for pid, (name, _, _) in self.running.items():
            with suppress(
                ConfigError, OSError
            ):  # a handler ends no worker: the job then stops as one that is preempted
                ask_to_cancel(self.sweep / name)
            os.kill(pid, signal.SIGTERM)

        def kill(number: int, frame: Any) -> None:
            for pid in self.running:
                os.kill(pid, signal.SIGKILL)

        signal.signal(signal.SIGALRM, kill)
        signal.alarm(GRACE_SECONDS)


def _be_job(folder: Path, gpus: Sequence[str], cores: int) -> int:
    """Run a job in a process just forked; return its exit code."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    os.environ["OMP_NUM_THREADS"] = str(cores)
    return process.perform(folder, cores=cores)


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the worker ends: no job outlives it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
