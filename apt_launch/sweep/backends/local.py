"""``hydra/launcher=local``: jobs in processes of their own on this machine, as many at once as there is room for.

One worker, started through submitit and apart from the terminal, loads torch once and forks a process for each job: a job
that dies takes nothing with it.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apt_launch.runs.provenance import packages
from apt_launch.sweep.control.ledger import ENDED, Seen, State, holder_is_alive, read_state, write_state
from apt_launch.sweep.jobs import process as job_process
from apt_launch.sweep.lease import Holder, read_holder
from apt_launch.sweep.plan.plan import Job, Plan, Resources
from apt_model.errors import ConfigError
from apt_model.files import write_json

MOST_RESTARTS = 20
"""Interruptions of one job after which it is given up."""

GRACE_SECONDS = 60
"""What a cancelled job has for its checkpoint."""


@dataclass(frozen=True)
class Machine:
    """What there is to share out."""

    cores: int
    gpus: tuple[str, ...]
    mem_gb: float

    @classmethod
    def here(cls) -> Machine:
        """Return what this machine has; GPUs are those of CUDA_VISIBLE_DEVICES where that is set."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            mem_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        except (ValueError, OSError):
            mem_gb = float("inf")
        return cls(cores, _gpus(), mem_gb)

    def room_for(self, resources: Resources) -> int:
        """Return how many jobs like that fit at once."""
        limits = [self.cores // (resources.cpus or 1)]
        if resources.gpus:
            limits.append(len(self.gpus) // resources.gpus)
        if resources.mem_gb:
            limits.append(int(self.mem_gb // resources.mem_gb))
        return min(limits)


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part for part in visible.split(",") if part.strip() and part.strip() != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    return tuple(str(number) for number, line in enumerate(told.splitlines()) if line.startswith("GPU "))


class LocalPlace:
    """This machine."""

    name = "local"
    detaches = False

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    def has_gpus(self) -> bool:
        """Say whether jobs can have GPUs here."""
        return bool(_gpus())

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
        """Start a worker for ``jobs``; return what to tell."""
        import submitit

        machine = Machine.here()
        own = folder / ".submitit"
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"worker-{len(list(own.glob('worker-*.json')))}"
        write_json(_worker_file(folder, name), asdict(Holder.this_process()))  # until the worker names itself
        for job in jobs:
            before = read_state(folder / job.folder)
            write_state(folder / job.folder, State("submitted", name, before.restarts, seconds=before.seconds))
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

    def look(self, folder: Path, jobs: Mapping[str, State]) -> dict[str, Seen]:
        """Return the true state of each of ``jobs``, none of which has ended by its own word."""
        holders = {job_id: read_holder(_worker_file(folder, job_id)) for job_id in {s.job_id for s in jobs.values()}}
        seen = {}
        for name, state in jobs.items():
            holder = holders[state.job_id]
            alive = holder.alive if holder is not None else False
            running = state.state == "running"
            if alive is None:
                where = holder.host if holder else "another host"
                seen[name] = Seen("unknown", f"it was started on {where}; ask there")
            elif alive:
                seen[name] = Seen("running" if running else "requeued" if state.restarts else "pending")
            elif running and holder_is_alive(folder / name):
                seen[name] = Seen("running")
            else:
                seen[name] = Seen("failed", "the worker that ran it is gone", final=True)
        return seen

    def cancel(self, folder: Path, jobs: Mapping[str, State]) -> None:
        """Stop the workers of ``jobs`` and what they run; return when they are gone."""
        for job_id in {state.job_id for state in jobs.values()}:
            holder = read_holder(_worker_file(folder, job_id))
            if holder is None or not holder.alive:
                continue
            os.kill(holder.pid, signal.SIGTERM)
            until = time.monotonic() + GRACE_SECONDS + 10
            while holder.alive and time.monotonic() < until:
                time.sleep(0.05)
            if holder.alive:
                os.killpg(holder.pid, signal.SIGKILL)


_workers: list[Any] = []
"""submitit's handles of the workers that this process started: as long as it lives, it reaps them."""


def _worker_file(folder: Path, name: str | None) -> Path:
    return folder / ".submitit" / f"{name}.json"


def work(sweep: str, name: str, names: Sequence[str], machine: Machine, max_parallel: int | None) -> None:
    """Run the jobs with the folders ``names``, as many at once as fit; what submitit calls in the worker."""
    os.setsid()  # Ctrl-C in the terminal is not for us
    write_json(_worker_file(Path(sweep), name), asdict(Holder.this_process()))
    Worker(Path(sweep), names, machine, max_parallel).run()


class Worker:
    """Starts jobs where there is room, and notes how they ended."""

    def __init__(self, sweep: Path, names: Sequence[str], machine: Machine, max_parallel: int | None) -> None:
        self.sweep = sweep
        self.machine = machine
        self.waiting = list(names)
        self.running: dict[int, tuple[str, Resources, tuple[str, ...]]] = {}
        self.free_gpus = list(machine.gpus)
        self.max_parallel = max_parallel or machine.cores
        self.cancelled = False
        plan = Plan.read(sweep)
        self.with_wandb = any("wandb" in str(plan.values(job)["logger"]["_target_"]) for job in plan.jobs[:1])
        self.resources = {name: plan.by_folder[name].resources for name in names}
        at_once = max(1, min(len(names), self.max_parallel, *(machine.room_for(r) for r in self.resources.values())))
        self.cores_each = max(1, machine.cores // at_once)

    def run(self) -> None:
        """Run all jobs."""
        signal.signal(signal.SIGTERM, self._cancel)
        _load_libraries(with_wandb=self.with_wandb)
        while self.waiting or self.running:
            while not self.cancelled and (name := self._next()) is not None:
                self._start(name)
            if not self.running:
                break
            pid, status = os.wait()
            if pid in self.running:
                self._note_end(pid, os.waitstatus_to_exitcode(status))
        for name in self.waiting:
            write_state(
                self.sweep / name, replace(read_state(self.sweep / name), state="cancelled", cause="before it began")
            )

    def _next(self) -> str | None:
        """Take the first waiting job that there is room for."""
        taken = [resources for _, resources, _ in self.running.values()]
        cores = self.machine.cores - sum(r.cpus or 1 for r in taken)
        memory = self.machine.mem_gb - sum(r.mem_gb or 0 for r in taken)
        if len(self.running) >= self.max_parallel:
            return None
        for name in self.waiting:
            wanted = self.resources[name]
            fits = (wanted.cpus or 1) <= cores and (wanted.gpus or 0) <= len(self.free_gpus)
            if fits and (wanted.mem_gb or 0) <= memory:
                self.waiting.remove(name)
                return name
        return None

    def _start(self, name: str) -> None:
        resources = self.resources[name]
        gpus = tuple(self.free_gpus[: resources.gpus or 0])
        del self.free_gpus[: len(gpus)]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = job_process.FAILED
            try:
                code = _be_job(self.sweep / name, gpus, resources.cpus or self.cores_each)
            except BaseException:
                import traceback

                traceback.print_exc()
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
        if code == job_process.AGAIN and not self.cancelled:
            if state.restarts < MOST_RESTARTS:
                write_state(folder, replace(state, state="requeued", restarts=state.restarts + 1))
                self.waiting.append(name)
            else:
                write_state(folder, replace(state, state="failed", cause=f"interrupted {MOST_RESTARTS} times"))
        elif state.state not in ENDED:
            cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            if code == -signal.SIGKILL:
                cause += ", perhaps for want of memory"
            ended = replace(state, state="cancelled" if self.cancelled else "failed", cause=cause)
            write_state(folder, ended)

    def _cancel(self, number: int, frame: Any) -> None:
        """Ask every job to stop, and see to it that they do."""
        self.cancelled = True
        for pid, (name, _, _) in self.running.items():
            (self.sweep / name / "cancel").touch()
            os.kill(pid, signal.SIGTERM)

        def kill(number: int, frame: Any) -> None:
            for pid in self.running:
                os.kill(pid, signal.SIGKILL)

        signal.signal(signal.SIGALRM, kill)
        signal.alarm(GRACE_SECONDS)


def _load_libraries(*, with_wandb: bool) -> None:
    """Load, once for all jobs, what each of them uses."""
    used = [
        "torch._dynamo",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "apt_launch.runs.train",
        "apt_launch.runs.summary",
    ]
    used += ["apt_launch.runs.drill", "apt_launch.runs.console", "apt_model.gpt", "apt_model.training.trainer"]
    for name in [*used, *(["wandb"] if with_wandb else [])]:
        importlib.import_module(name)
    packages()
    gc.collect()
    gc.freeze()  # what is shared with the jobs is never touched again


def _be_job(folder: Path, gpus: Sequence[str], cores: int) -> int:
    """Run a job in a process just forked."""
    import torch

    _end_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    os.environ["OMP_NUM_THREADS"] = str(cores)
    torch.set_num_threads(cores)
    return job_process.perform(folder)


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the worker dies: no job stays behind alone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
