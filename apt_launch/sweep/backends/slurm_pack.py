"""Several jobs as one task of SLURM, which share its GPU: what submitit calls there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from apt_launch.sweep.application import Resources
from apt_launch.sweep.backends.local_worker import Worker, end_with_parent
from apt_launch.sweep.backends.machine import Machine
from apt_launch.sweep.backends.slurm_task import cores_of_task, requeue, task_id
from apt_launch.sweep.jobs.process import STOP_SIGNALS, perform
from apt_launch.sweep.jobs.state import ENDED, read_state, wants_cancel
from apt_model.errors import ConfigError

LOOK_SECONDS: Final = 1.0
"""Between two looks whether somebody cancels a single job."""


def run_packed_on_slurm(sweep: str, names: Sequence[str]) -> None:
    """Run the jobs with the folders ``names`` side by side in this task; what has ended in an earlier attempt stays."""
    folder = Path(sweep)
    left = [name for name in names if not _has_ended(folder / name)]
    if left:
        worker = PackedWorker(folder, left)
        worker.run()
        if worker.again:
            requeue([folder / name for name in worker.again])
    sys.stdout.flush()


def _has_ended(folder: Path) -> bool:
    try:
        return read_state(folder).state in ENDED
    except ConfigError:
        return False


class PackedWorker(Worker):
    """Runs all of its jobs at once; a signal for the task is one for each of them."""

    def __init__(self, sweep: Path, names: Sequence[str]) -> None:
        cores = int(cores_of_task(os.environ))
        super().__init__(sweep, names, Machine(max(cores, len(names)), (), float("inf")), len(names))
        self.resources = dict.fromkeys(names, Resources())
        self.cores_each = max(1, cores // len(names))
        self.again: list[str] = []
        self._asked: set[int] = set()
        self._looked = time.monotonic()

    def run(self) -> None:
        """Run all jobs."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)
        super().run()

    def take_over_signals(self) -> None:
        """Keep them: each is passed on."""

    def _pass_on(self, number: int, frame: Any) -> None:
        for pid in self.running:
            os.kill(pid, number)

    def be_job(self, name: str, gpus: Sequence[str], resources: Resources) -> int:
        """Run a job in this process, which was just forked, with the GPUs of the task."""
        end_with_parent()
        os.environ["OMP_NUM_THREADS"] = str(self.cores_each)
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return perform(self.sweep / name, job_id=task_id(os.environ), restart=restart, cores=self.cores_each)

    def wants_again(self, name: str) -> bool:
        """Return False: SLURM starts the whole task again."""
        self.again.append(name)
        return False

    def wait_for_one(self) -> tuple[int, int]:
        """Return process and status of the next that ends; meanwhile ask those to stop that somebody cancels."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                return pid, status
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                self._looked = time.monotonic()
                for pid, (name, _, _) in self.running.items():
                    if pid not in self._asked and wants_cancel(self.sweep / name):
                        self._asked.add(pid)
                        os.kill(pid, signal.SIGTERM)
            time.sleep(0.02)
