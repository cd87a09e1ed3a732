"""A job of a sweep, in the process that runs it: reads its folder's frozen config, trains, writes its state."""

from __future__ import annotations

import json
import logging.config
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from apt_launch.config.guard import keep_private
from apt_launch.config.load import parse
from apt_launch.sweep.control.ledger import Name, State, read_state, write_state
from apt_launch.sweep.lease import Holder, Lease
from apt_launch.sweep.values import from_yaml, read_frozen
from apt_model.errors import ConfigError, Interrupted, TrainingError, cause_of
from apt_model.training.checkpoint import Checkpoints

DONE: Final = 0
FAILED: Final = 1
AGAIN: Final = 75
"""Exit code of a job that was interrupted and wants to go on (EX_TEMPFAIL of sysexits.h)."""
STOPPED: Final = 130


CLUSTERS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which clusters, or people, ask a job to stop."""


class BudgetSpentError(TrainingError):
    """The job took all its hours."""


def perform(
    folder: Path,
    *,
    job_id: str | None = None,
    restart: int | None = None,
    rank: int = 0,
    requeue: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Run the job of ``folder`` in this process; return its exit code.

    Everything it prints goes to ``log.txt`` there, of ranks after the first to ``log-RANK.txt``.

    Args:
        job_id: SLURM's; None: a worker of this machine runs it.
        restart: lives of the job before this one; None: as its state says.
        requeue: gives an interrupted job back to its cluster, called while the folder is still this process's.

    Raises:
        Exception: what made it fail, already told in its state and log.
    """
    keep_private()
    # they wait until the folder is ours, and while its state is written
    signal.pthread_sigmask(signal.SIG_BLOCK, CLUSTERS)
    for number in CLUSTERS:
        signal.signal(number, _leave_early)
    _write_output_to(folder / ("log.txt" if rank == 0 else f"log-{rank}.txt"))
    _configure_logging(folder if rank == 0 else None)
    before = read_state(folder)
    about = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    lives = restart if restart is not None else before.restarts
    state = replace(before, state="running", job_id=job_id or before.job_id, restarts=lives, cause=None)
    try:
        lease = Lease(folder / "lease.json", Holder.this_process(job_id, lives)) if rank == 0 else None
    except ConfigError as error:  # the state is that of the other writer
        logging.getLogger(__name__).error("%s", error)
        raise
    try:
        return _perform(folder, about, before, state, rank, requeue)
    finally:
        if lease is not None:
            lease.release()


def _perform(
    folder: Path, about: dict[str, Any], before: State, state: State, rank: int, requeue: Callable[[Path], None]
) -> int:
    began = time.time()

    def tell(name: Name, cause: str | None = None, loss: float | None = None) -> None:
        if rank == 0:
            taken = before.seconds + time.time() - began
            write_state(folder, replace(state, state=name, cause=cause, loss=loss, seconds=taken))

    try:
        loss = _train(folder, about, state, before, rank)
    except Interrupted:
        if wants_cancel(folder):
            tell("cancelled", "on request; its checkpoint is kept")
            return STOPPED
        if before.seconds + time.time() - began >= about["hours"] * 3600:
            spent = BudgetSpentError(
                f"it took its {about['hours']:g} h. Go on with: python -m apt_launch.sweep resume {folder.parent} "
                f"launch.hours={2 * about['hours']:g}"
            )
            tell("failed", str(spent))
            raise spent from None
        tell("preempted")
        if rank == 0:
            requeue(folder)
        return AGAIN
    except Exception as error:
        cause = cause_of(error)
        tell("failed", cause)
        if isinstance(error, ConfigError):  # not told in the log by the run itself
            logging.getLogger(__name__).error("failed: %s", cause)
        raise
    tell("done", loss=loss)
    return DONE


def _train(folder: Path, about: dict[str, Any], state: State, before: State, rank: int) -> float:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CLUSTERS)
    from apt_launch.runs.train import train
    from apt_launch.tracking.deliver import Membership

    os.chdir(about["cwd"])
    config = parse(read_frozen(folder / "config.yaml"))
    if Checkpoints(folder / "checkpoints").all():
        config = config.resuming()
    else:  # an earlier life came to no checkpoint: its rows will be computed again
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    if rank == 0:
        write_state(folder, state)
    left = about["hours"] * 3600 - before.seconds
    if left <= 0:
        raise BudgetSpentError(f"it took its {about['hours']:g} h (launch.hours).")
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGUSR2))
    signal.setitimer(signal.ITIMER_REAL, left)
    member = Membership(about["sweep"], tuple(about["overrides"]))
    try:
        return train(config, folder, member)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, CLUSTERS)


def wants_cancel(folder: Path) -> bool:
    """Say whether somebody asked the job to stop for good."""
    return (folder / "cancel").exists()


def _write_output_to(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _configure_logging(folder: Path | None) -> None:
    """Log as a run of the command does; see ``conf/hydra/job_logging``."""
    from apt_launch.config.load import CONF

    text = (CONF / "hydra" / "job_logging" / "train_log.yaml").read_text(encoding="utf-8")
    settings = from_yaml(text.replace("${hydra.runtime.output_dir}", str(folder)))
    if folder is None:
        del settings["handlers"]["file"]
        settings["root"]["handlers"] = ["console"]
    logging.config.dictConfig(settings)


# --- on SLURM: what submitit calls in each task ------------------------------------------------------------------------


def run_on_slurm(folder: str) -> float | None:
    """Run the job of ``folder`` as a task of SLURM; return its validation loss, None if it goes on in another life.

    Raises:
        Exception: what made it fail: the task ends with exit code 1, and SLURM's job is FAILED.
    """
    environment = os.environ
    rank = int(environment.get("SLURM_PROCID", "0"))
    cores = environment.get("SLURM_CPUS_PER_TASK") or _cores_of_a_task(environment)
    environment.setdefault("OMP_NUM_THREADS", cores)  # of ours, not of the whole node; torch is not loaded yet
    _tell_torch(environment)
    array = environment.get("SLURM_ARRAY_JOB_ID")
    job_id = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]
    path = Path(folder)
    code = perform(
        path, job_id=job_id, restart=int(environment.get("SLURM_RESTART_COUNT", "0")), rank=rank, requeue=_requeue
    )
    if code != DONE:
        sys.stdout.flush()
        os._exit(0 if code == AGAIN else code)
    return read_state(path).loss


class _LeftEarly(Interrupted):
    """Asked to stop before training had begun."""


def _leave_early(number: int, frame: Any) -> None:
    raise _LeftEarly(f"{signal.Signals(number).name} before training began")


def _cores_of_a_task(environment: Mapping[str, str]) -> str:
    tasks = int(environment.get("SLURM_NTASKS_PER_NODE", "1"))
    return str(max(1, int(environment.get("SLURM_CPUS_ON_NODE", "1")) // tasks))


def _tell_torch(environment: Any) -> None:
    """Name what torch.distributed wants to know. CUDA_VISIBLE_DEVICES stays as SLURM set it."""
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
    """Give the job back to SLURM, which starts it again in this folder; unless somebody cancelled it."""
    number = os.environ["SLURM_JOB_ID"]
    state = read_state(folder)
    until = time.monotonic() + 120
    while time.monotonic() < until:  # SLURM kills us when it has taken the job back
        shown = _slurm("squeue", "-h", "-j", number, "-o", "%T")
        if shown is not None and shown.strip() in ("CANCELLED", "DEADLINE"):
            write_state(folder, replace(state, state="cancelled", cause="by scancel; its checkpoint is kept"))
            return
        write_state(folder, replace(state, state="requeued", restarts=state.restarts + 1))
        if _slurm("scontrol", "requeue", number) is not None:
            return
        time.sleep(2)
    write_state(folder, replace(state, state="failed", cause="SLURM did not take it back (scontrol requeue failed)"))


def _slurm(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sys.stderr.write(answer.stderr)
    return answer.stdout if answer.returncode == 0 else None
