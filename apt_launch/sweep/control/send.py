"""Where a sweep goes, and how it is followed: this machine or a cluster."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from apt_launch.config.load import parse
from apt_launch.config.run_config import is_neutral
from apt_launch.sweep.control import ledger
from apt_launch.sweep.control.ledger import ENDED, Ledger, Seen, State, Status, read_state
from apt_launch.sweep.plan.plan import Job, Plan, Resources
from apt_launch.sweep.values import changed_keys, flatten, read_frozen, to_yaml, unflatten
from apt_model.errors import ConfigError
from apt_model.files import refuse_place, write_json, write_whole


class Place(Protocol):
    """Where jobs run."""

    name: str
    values: dict[str, Any]
    detaches: bool  # the command returns once the jobs are sent

    def has_gpus(self) -> bool:
        """Say whether jobs can have GPUs there."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigError if a job could never run there."""

    def send(self, plan: Plan, folder: Path, jobs: Sequence[Job]) -> list[str]:
        """Send ``jobs``, whose folders are ready; return lines to tell."""

    def look(self, folder: Path, jobs: Mapping[str, State]) -> dict[str, Seen]:
        """Return the true states of ``jobs``, by folder, none of which has ended by its own word."""

    def cancel(self, folder: Path, jobs: Mapping[str, State]) -> None:
        """Stop ``jobs``; return when nothing of them runs."""


def place(name: str, values: Mapping[str, Any]) -> Place:
    """Return the place that ``hydra/launcher=name`` stands for.

    Raises:
        ConfigError: it is neither local nor slurm.
    """
    from apt_launch.config.schema import LocalLauncherConfig, SlurmLauncherConfig
    from apt_model.errors import validated

    given = {key: value for key, value in values.items() if not key.startswith("_")}
    if name == "local":
        from apt_launch.sweep.backends.local import LocalPlace

        return LocalPlace(validated(LocalLauncherConfig, given, key="hydra.launcher").model_dump())
    if name == "slurm":
        from apt_launch.sweep.backends.slurm import SlurmPlace

        return SlurmPlace(validated(SlurmLauncherConfig, given, key="hydra.launcher").model_dump())
    raise ConfigError(f"hydra/launcher: {name!r} gets no plan; choose local or slurm.")


def carry_out(plan: Plan, folder: Path, where: Place) -> None:
    """Freeze ``plan`` in ``folder``, send it to ``where``, and follow it if it runs here or ``launch.wait`` says so.

    Raises:
        ConfigError: the folder is taken, or a job can never run there; nothing has been sent.
        SystemExit: with 1 if a job failed.
    """
    refuse_place(folder, "hydra.sweep.dir")
    if (folder / "plan.yaml").exists():
        raise ConfigError(
            f"hydra.sweep.dir: {folder} already holds a sweep. Go on with it by: python -m apt_launch.sweep resume {folder}, "
            "or choose another folder."
        )
    where.check(plan)
    _check_ranks(plan)
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder)
    prepare(plan, folder, plan.jobs)
    say(f"sweep {plan.id}: {plan.told}. Folder: {folder}")
    for line in where.send(plan, folder, plan.jobs):
        say(line)
    waits = any(job.config is not None and job.config.launch.wait for job in plan.jobs)
    if where.detaches and not waits:
        say(f"It goes on without this command. Look at it by: python -m apt_launch.sweep status {folder}")
        return
    code = follow(folder)
    if code:
        raise SystemExit(code)


def _check_ranks(plan: Plan) -> None:
    """Raise ConfigError if a job has too few ranks to share experts; the first to know is who sends it."""
    for job in plan.jobs:
        experts = 1 if job.config is None else job.config.trainer.expert_parallel
        if job.resources.ranks < experts:
            raise ConfigError(
                f"trainer.expert_parallel = {experts} needs as many ranks, and job {job.number} has {job.resources.ranks} "
                "(launch.nodes x launch.tasks_per_node). Ask for more, or set it to 1."
            )


@dataclass(frozen=True)
class Result:
    """What came of a job, for a sweeper that chooses the next ones by it."""

    folder: str
    state: str
    loss: float | None
    told: str


def run_batch(before: Plan | None, made: Plan, folder: Path, where: Place) -> tuple[Plan, dict[str, Result]]:
    """Run the jobs of ``made`` after those of ``before`` in the same sweep; wait; return the joined plan and all results.

    A job that is done already is not run again.

    Raises:
        ConfigError: the folder holds another sweep, or a job can never run there.
    """
    refuse_place(folder, "hydra.sweep.dir")
    if before is None and (folder / "plan.yaml").exists():
        raise ConfigError(f"hydra.sweep.dir: {folder} already holds a sweep. Choose another folder.")
    where.check(made)
    _check_ranks(made)
    known = {(job.identity, job.resources) for job in before.jobs} if before else set()
    new = replace(made, jobs=tuple(job for job in made.jobs if (job.identity, job.resources) not in known))
    plan = new if before is None else before.joined(new) if new.jobs else before
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder)
    jobs = plan.jobs[len(before.jobs) if before else 0 :]
    if jobs:
        prepare(plan, folder, jobs)
        for line in where.send(plan, folder, jobs):
            say(line)
        follow(folder, only={job.folder for job in jobs})
    return plan, {
        status.job.identity: Result(status.job.folder, status.state, status.loss, status.told)
        for status in Ledger(folder).statuses(rows=False)
    }


def prepare(plan: Plan, folder: Path, jobs: Sequence[Job]) -> None:
    """Make the folders of ``jobs``, each with all that the job will read."""
    for job in jobs:
        own = folder / job.folder
        (own / ".hydra").mkdir(parents=True, exist_ok=True)
        values = plan.values(job)
        write_whole(own / "config.yaml", to_yaml(values))
        write_whole(own / ".hydra" / "overrides.yaml", to_yaml({"overrides": list(job.overrides)}))
        about = {
            "sweep": plan.id,
            "number": job.number,
            "overrides": list(job.overrides),
            "cwd": plan.cwd,
            "hours": job.resources.hours,
        }
        write_json(own / "job.json", about)
        if not (own / "state.json").exists():
            ledger.write_state(own, State())


def say(line: str) -> None:
    """Tell the user."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# --- following ---------------------------------------------------------------------------------------------------------


def follow(folder: Path, only: set[str] | None = None) -> int:
    """Tell of each job as it changes, until all have ended; then show the table. Return the exit code.

    Ctrl-C asks whether to leave the jobs running or to cancel them.

    Raises:
        KeyboardInterrupt: the user left or cancelled.
    """
    from apt_launch.sweep.__main__ import show

    book = Ledger(folder)
    told: dict[str, str] = {}
    pause = 0.05
    with collected_interrupts() as interrupts:
        while True:
            statuses = [s for s in book.statuses(rows=False) if only is None or s.job.folder in only]
            for status in statuses:
                name = status.job.folder
                if told.get(name) != status.state and status.state not in ("planned", "submitted", "pending"):
                    say(_line(status))
                    pause = 0.05
                told[name] = status.state
            if all(status.final or status.state == "planned" for status in statuses):
                break
            until = time.monotonic() + pause
            while not interrupts and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
            if interrupts:
                interrupts.clear()
                _leave_or_cancel(folder)
            pause = min(pause * 1.2, 0.2 if book.plan.launcher == "local" else 5.0)
    if only is None:
        show(book.plan, book.statuses(), folder)
    return 0 if all(status.state == "done" for status in statuses) else 1


@contextmanager
def collected_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C meanwhile: an exception may come where Python swallows it, in a destructor for instance."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _line(status: Status) -> str:
    loss = f"  val/loss {status.loss:.4f}" if status.loss is not None else ""
    again = f" (life {status.restarts + 1})" if status.restarts and status.state == "running" else ""
    cause = f": {status.cause}" if status.cause and status.state in ("failed", "cancelled", "unknown") else ""
    return f"{status.job.number:>4}  {status.state:<9}{again}{loss}  {status.job.label}{cause}"


def _leave_or_cancel(folder: Path) -> None:
    """Ask what Ctrl-C means; without somebody to ask, the jobs go on. Once more is an answer, too."""
    leave = f"The jobs go on. Look at them by: python -m apt_launch.sweep status {folder}"
    answer = ""
    if sys.stdin.isatty():
        collecting = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            answer = (
                input("\nLeave the jobs running, cancel them, or go on waiting? [leave/cancel/wait] ").strip().lower()
            )
        except (KeyboardInterrupt, EOFError):
            answer = "leave"
        finally:
            signal.signal(signal.SIGINT, collecting)
    if answer.startswith("w"):
        return
    if answer.startswith("c"):
        cancel(folder)
        say("All cancelled; their checkpoints are kept.")
    else:
        say(leave)
    raise KeyboardInterrupt


def cancel(folder: Path) -> list[Status]:
    """Cancel every job of the sweep that has not ended; return the states when nothing of it runs any more.

    Raises:
        ConfigError: there is no sweep, or the cluster does not answer.
    """
    book = Ledger(folder)
    open_ones = {
        job.folder: state for job in book.plan.jobs if (state := read_state(folder / job.folder)).state not in ENDED
    }
    sent = {name: state for name, state in open_ones.items() if state.state != "planned"}
    if sent:
        place(book.plan.launcher, book.plan.launcher_values).cancel(folder, sent)
    for name in open_ones:
        state = read_state(folder / name)
        if state.state not in ENDED:
            ledger.write_state(folder / name, replace(state, state="cancelled", cause="on request"))
    return book.statuses()


def resume(folder: Path, overrides: Sequence[str] = ()) -> int:
    """Send again what failed, was cancelled, or is missing; return how many jobs that is.

    Args:
        overrides: of keys that cannot change a result, such as ``launch.hours=48``.

    Raises:
        ConfigError: a key cannot change, a job's folder holds another config than the plan, or nobody knows what became
            of a job.
    """
    book = Ledger(folder)
    changed = _parsed(overrides)
    if refused := sorted(key for key in changed if not is_neutral(key)):
        raise ConfigError(
            *(f"{key}: a resume cannot change it, for it would be another run. Start a new sweep." for key in refused)
        )
    statuses = book.statuses(rows=False)
    problems = [status.told for status in statuses if status.state == "unknown" and not status.final]
    wanted = {s.job.number for s in statuses if s.state in ("failed", "cancelled", "planned", "unknown")}
    jobs = []
    for job in book.plan.jobs:
        values = {**book.plan.shared, **job.differs}
        if job.number in wanted:
            problems += _differences(folder / job.folder, values)
            values |= changed
            launch = parse(unflatten(values)).launch
            gpus = job.resources.gpus if launch.gpus is None else launch.gpus
            job = replace(job, resources=Resources.of(launch, gpus))
        jobs.append((job, values))
    if problems:
        raise ConfigError(*problems)
    plan = book.plan.with_values(jobs)
    again = [job for job in plan.jobs if job.number in wanted]
    if not again:
        return 0
    where = place(plan.launcher, plan.launcher_values)
    where.check(replace(plan, jobs=tuple(again)))
    plan.write(folder)
    for job in again:
        (folder / job.folder / "cancel").unlink(missing_ok=True)
    prepare(plan, folder, again)
    for line in where.send(plan, folder, again):
        say(line)
    return len(again)


def _differences(folder: Path, planned: Mapping[str, Any]) -> list[str]:
    """Say where the config in a job's folder is not the one that was planned."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    differ = [key for key in changed_keys(flatten(read_frozen(path)), planned) if not is_neutral(key)]
    return [f"{key}: {path} says otherwise than plan.yaml. Put it back, or remove the folder." for key in differ]


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))}
