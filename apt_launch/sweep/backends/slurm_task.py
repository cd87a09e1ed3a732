"""A job as a task of SLURM: what submitit calls there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from apt_launch.sweep.jobs.process import AGAIN, DONE, FAILED, perform
from apt_launch.sweep.jobs.state import read_state, transition
from apt_model.errors import ConfigError, ReportedError


def run_on_slurm(folder: str) -> float | None:
    """Run the job of ``folder`` as a task of SLURM; return its result, None if another attempt will continue it.

    Raises:
        Exception: what made it fail: the task ends with exit code 1, and SLURM's job is FAILED.
    """
    environment = os.environ
    rank = int(environment.get("SLURM_PROCID", "0"))
    cores = cores_of_task(environment)
    environment.setdefault("OMP_NUM_THREADS", cores)  # of this task, not of the whole node; read when libraries load
    _name_ranks(environment)
    job_id = task_id(environment)
    path = Path(folder)
    try:
        code = perform(
            path,
            job_id=job_id,
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            rank=rank,
            requeue=_requeue,
            on_fork=release,
        )
    except ReportedError:  # its own traceback is in the log
        code = FAILED
    if code != DONE:
        sys.stdout.flush()
        os._exit(0 if code == AGAIN else code)
    return read_state(path).loss


def task_id(environment: Mapping[str, str]) -> str:
    """Return SLURM's number of this job, as its commands take it."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def cores_of_task(environment: Mapping[str, str]) -> str:
    """Return how many cores this task has."""
    if asked := environment.get("SLURM_CPUS_PER_TASK"):
        return asked
    tasks = int(environment.get("SLURM_NTASKS_PER_NODE", "1"))
    return str(max(1, int(environment.get("SLURM_CPUS_ON_NODE", "1")) // tasks))


def _name_ranks(environment: MutableMapping[str, str]) -> None:
    """Set the variables by which ranks find each other, those of torchrun. CUDA_VISIBLE_DEVICES stays as SLURM set it."""
    world = int(environment.get("SLURM_NTASKS", "1"))
    if world == 1:
        return
    import submitit

    hosts = submitit.JobEnvironment().hostnames
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(world),
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(world // int(environment.get("SLURM_JOB_NUM_NODES", "1"))),
        MASTER_ADDR=hosts[0],
        MASTER_PORT=str(20000 + int(environment["SLURM_JOB_ID"]) % 10000),
    )


def _requeue(folder: Path) -> None:
    requeue([folder])


def requeue(folders: Sequence[Path]) -> None:
    """Give this task back to SLURM, which starts it again for the jobs in ``folders``; unless somebody cancelled it."""
    number = os.environ["SLURM_JOB_ID"]
    attempts = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1

    def change(to: Literal["cancelled", "requeued", "failed"], cause: str | None = None) -> None:
        for folder in folders:
            transition(folder, to, cause=cause, restarts=attempts if to == "requeued" else attempts - 1)

    until = time.monotonic() + 120
    while time.monotonic() < until:  # SLURM kills this process when it has taken the job back
        shown = _slurm("squeue", "-h", "-j", number, "-o", "%T")
        if shown is not None and shown.strip() in ("CANCELLED", "DEADLINE"):
            change("cancelled", "by scancel; its checkpoint is kept")
            return
        change("requeued")
        if _slurm("scontrol", "requeue", number) is not None:
            return
        time.sleep(2)
    change("failed", "SLURM did not take it back (scontrol requeue failed)")


def release(folders: Sequence[Path]) -> None:
    """Let the jobs in ``folders`` begin, which depend on the end of one that has now made their first updates.

    Where that fails they begin when that one has ended.
    """
    waiting = []
    for folder in folders:
        with suppress(ConfigError):  # a damaged state: the table names it
            state = read_state(folder)
            waiting += [state.job_id] if state.state == "submitted" and state.job_id else []
    if waiting:
        _slurm("scontrol", "update", f"JobId={','.join(waiting)}", "Dependency=")


def _slurm(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sys.stderr.write(answer.stderr)
    return answer.stdout if answer.returncode == 0 else None
