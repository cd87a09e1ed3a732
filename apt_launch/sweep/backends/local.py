"""``hydra/launcher=local``: jobs in processes of their own on this machine, as many at once as there is room for.

One worker, started through submitit and apart from the terminal, loads the application's libraries once and forks a process
for each job: a job that is killed ends no other.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apt_launch.lease import Holder, holder_is_alive, is_alive, read_holder
from apt_launch.sweep.backends.local_worker import GRACE_SECONDS, work
from apt_launch.sweep.backends.machine import Machine, visible_gpus, worker_file
from apt_launch.sweep.jobs.state import ObservedState, State, transition
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError
from apt_model.files import refuse_link, write_json


class LocalBackend:
    """This machine."""

    name = "local"
    detaches = False

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    def has_gpus(self) -> bool:
        """Return whether jobs can have GPUs here."""
        return bool(visible_gpus())

    def check(self, plan: Plan) -> None:
        """Make sure that every job fits.

        Raises:
            ConfigError: one does not, even alone.
        """
        machine = Machine.here()
        problems = []
        for job in plan.jobs:
            wanted = job.resources
            if wanted.ranks > 1:
                problems.append(
                    f"launch.tasks_per_node: job {job.number} has several ranks, which need hydra/launcher=slurm."
                )
            elif machine.room_for(wanted) < 1:
                problems.append(
                    f"launch: job {job.number} ({job.label}) wants {wanted}, and this machine has {machine.cores} cores, "
                    f"{len(machine.gpus)} GPUs and {machine.mem_gb:.0f} GB."
                )
        if problems:
            raise ConfigError(*problems)

    def send(self, plan: Plan, folder: Path, jobs: Sequence[Job]) -> list[str]:
        """Start a worker for ``jobs``; return lines for the user."""
        import submitit

        machine = Machine.here()
        own = folder / ".submitit"
        refuse_link(own)
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"worker-{len(list(own.glob('worker-*.json')))}"
        write_json(worker_file(folder, name), asdict(Holder.this_process()))  # until the worker names itself
        for job in jobs:
            transition(folder / job.folder, "submitted", job_id=name)
        executor = submitit.LocalExecutor(own)
        executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
        kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
        try:  # Ctrl-C and a closed terminal are for us, not for the worker
            names = [job.folder for job in jobs]
            _workers.append(executor.submit(work, str(folder), name, names, machine, self.values.get("max_parallel")))
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
        return [
            f"{len(jobs)} jobs on {machine.cores} cores" + (f" and {len(machine.gpus)} GPUs" if machine.gpus else "")
        ]

    def poll(self, folder: Path, jobs: Mapping[str, State]) -> dict[str, ObservedState]:
        """Return the observed state of each of ``jobs``, none of which has ended by its own account."""
        workers = {job_id: worker_file(folder, job_id) for job_id in {state.job_id for state in jobs.values()}}
        holders = {job_id: read_holder(path) for job_id, path in workers.items()}
        alive = {
            job_id: is_alive(workers[job_id]) if holder is None or holder.host == socket.gethostname() else holder.alive
            for job_id, holder in holders.items()
        }
        observed = {}
        for name, state in jobs.items():
            running = state.state == "running"
            holder = holders[state.job_id]
            if alive[state.job_id] is None and holder is not None:
                observed[name] = ObservedState("unknown", f"it was started on {holder.where}; ask there")
            elif alive[state.job_id]:
                observed[name] = ObservedState("running" if running else "requeued" if state.restarts else "pending")
            elif running and holder_is_alive(folder / name):
                observed[name] = ObservedState("running")
            else:
                observed[name] = ObservedState("failed", "the worker that ran it is gone", final=True)
        return observed

    def cancel(self, folder: Path, jobs: Mapping[str, State], *, whole: bool = True) -> None:
        """Stop ``jobs``, and with ``whole`` their workers; return when they are gone.

        Raises:
            ConfigError: a worker's pid counts elsewhere, where a signal from here would reach another process or none.
        """
        holders = {job_id: read_holder(worker_file(folder, job_id)) for job_id in {s.job_id for s in jobs.values()}}
        elsewhere = [
            f"{folder}: the worker is process {holder.pid} on {holder.where}, which cannot be signalled from here. Cancel the "
            "sweep there."
            for job_id, holder in holders.items()
            if holder is not None and holder.alive is None and is_alive(worker_file(folder, job_id))
        ]
        if elsewhere:
            raise ConfigError(*elsewhere)
        if not whole:
            for name in jobs:  # one that waits is not started
                (folder / name / "cancel").touch()
            stop_writers([folder / name for name in jobs])
            return
        for holder in holders.values():
            if holder is None or not holder.alive:
                continue
            os.kill(holder.pid, signal.SIGTERM)
            until = time.monotonic() + GRACE_SECONDS + 10
            while holder.alive and time.monotonic() < until:
                time.sleep(0.05)
            if holder.alive:
                os.killpg(holder.pid, signal.SIGKILL)


def stop_writers(folders: Sequence[Path]) -> None:
    """Ask the processes that write into ``folders`` to stop; return when they are gone. Late ones are killed."""
    asked = {}
    for folder in folders:
        holder = read_holder(folder / "lease.json")
        if holder is not None and holder.alive:
            os.kill(holder.pid, signal.SIGTERM)
            asked[folder] = holder
    until = time.monotonic() + GRACE_SECONDS
    while asked and time.monotonic() < until:
        asked = {folder: holder for folder, holder in asked.items() if holder.alive}
        time.sleep(0.02)
    for holder in asked.values():
        os.kill(holder.pid, signal.SIGKILL)


_workers: list[Any] = []
"""submitit's handles of the workers that this process started: as long as it runs, it reaps them."""
