"""Sends a planned sweep to its backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apt_launch.command_line import make_folder
from apt_launch.commands import command
from apt_launch.sweep.application import Fork, load
from apt_launch.sweep.backends.base import Backend
from apt_launch.sweep.control.follow import follow, say
from apt_launch.sweep.control.ledger import Ledger
from apt_launch.sweep.control.rungs import described, rule_for, rule_of, write_rule
from apt_launch.sweep.jobs.trunk import GRAFT, has_begun, trunk
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.plan.tree import outline, saved
from apt_launch.sweep.programs.secrets import write_secrets
from apt_launch.values import to_yaml
from apt_model.errors import ConfigError
from apt_model.files import read_regular, refuse_link, refuse_links, refuse_place, write_atomic, write_json


def show_plan(plan: Plan, folder: Path, where: Backend) -> None:
    """Show what would be sent; nothing is written, and nothing is sent.

    Raises:
        ConfigError: a job can never run there.
    """
    where.check(plan)
    _check_ranks(plan)
    say(f"sweep of {plan.summary}, {plan.launcher}. Folder: {folder}. Nothing is sent.")
    for job in plan.jobs:
        say(f"{job.number:>4}  {job.label or 'as the config says'}  ({job.resources})")
    for line in outline(plan):
        say(line)
    if plan.gpu_hours:
        say(f"at most {plan.gpu_hours:g} GPU-hours")
    spec = plan.jobs[0].spec
    rule = rule_of(plan, load(plan.application, plan.program), spec.stop if spec is not None else None)
    for line in described(rule) if rule is not None else ():
        say(line)


def carry_out(plan: Plan, folder: Path, where: Backend, snapshot_mb: float = 0.0) -> None:
    """Freeze ``plan`` in ``folder``, send it to ``where``, and follow it if it runs here or ``launch.wait`` says so.

    Raises:
        ConfigError: the folder is taken, or a job can never run there; nothing has been sent.
        SystemExit: with 1 if a job failed.
    """
    refuse_place(folder, "hydra.sweep.dir")
    if (folder / "plan.yaml").exists():
        raise ConfigError(
            f"hydra.sweep.dir: {folder} already holds a sweep. Continue it by: "
            f"{command('apt_launch.sweep', 'resume', folder)}, "
            "or choose another folder."
        )
    where.check(plan)
    _check_ranks(plan)
    make_folder(folder, "hydra.sweep.dir")
    _freeze_code(plan, folder, snapshot_mb)
    plan.write(folder)
    write_secrets(folder, plan.secrets)
    rule = prepare(plan, folder, plan.jobs)
    say(f"sweep {plan.id}: {plan.summary}. Folder: {folder}")
    for line in rule:
        say(line)
    for line in saved(plan):
        say(line)
    for line in where.send(plan, folder, plan.jobs):
        say(line)
    waits = any(job.spec is not None and job.spec.wait for job in plan.jobs)
    if where.detaches and not waits:
        say(f"It continues without this command. Look at it by: {command('apt_launch.sweep', 'status', folder)}")
        return
    code = follow(folder)
    if code:
        raise SystemExit(code)


def _freeze_code(plan: Plan, folder: Path, most_mb: float) -> None:
    """Copy the program's code if the plan says so."""
    if plan.program is not None and plan.program.snapshot is not None:
        from apt_launch.sweep.programs.snapshot import take

        say(take(Path(plan.program.snapshot), folder, most_mb))


def _check_ranks(plan: Plan) -> None:
    """Raise ConfigError if a job has fewer ranks than it needs; who sends it is the first to know."""
    for job in plan.jobs:
        if job.spec is not None and job.resources.ranks < job.spec.min_ranks:
            raise ConfigError(
                f"{job.spec.min_ranks_key} = {job.spec.min_ranks} needs as many ranks, and job {job.number} has "
                f"{job.resources.ranks} (launch.nodes x launch.tasks_per_node). Ask for more, or set it to 1."
            )


@dataclass(frozen=True)
class Outcome:
    """What came of a job, for a sweeper that chooses the next ones by it."""

    folder: str
    state: str
    loss: float | None
    summary: str
    returned: Any = None  # by the program, as far as JSON has it; else the same as ``loss``


def run_batch(
    before: Plan | None, batch: Plan, folder: Path, where: Backend, snapshot_mb: float = 0.0
) -> tuple[Plan, dict[str, Outcome]]:
    """Run the jobs of ``batch`` after those of ``before`` in the same sweep; wait; return the joined plan and all results.

    A job that is done already is not run again.

    Raises:
        ConfigError: the folder holds another sweep, or a job can never run there.
    """
    refuse_place(folder, "hydra.sweep.dir")
    if before is None and (folder / "plan.yaml").exists():
        raise ConfigError(f"hydra.sweep.dir: {folder} already holds a sweep. Choose another folder.")
    where.check(batch)
    _check_ranks(batch)
    known = {(job.identity, job.resources) for job in before.jobs} if before else set()
    new = replace(batch, jobs=tuple(job for job in batch.jobs if (job.identity, job.resources) not in known))
    plan = new if before is None else before.joined(new) if new.jobs else before
    make_folder(folder, "hydra.sweep.dir")
    if before is None:
        _freeze_code(plan, folder, snapshot_mb)
    plan.write(folder)
    write_secrets(folder, plan.secrets)
    jobs = plan.jobs[len(before.jobs) if before else 0 :]
    if jobs:
        prepare(plan, folder, jobs)
        for line in where.send(plan, folder, jobs):
            say(line)
        follow(folder, only={job.folder for job in jobs})
    return plan, {
        status.job.identity: Outcome(
            status.job.folder, status.state, status.loss, status.summary, _returned(status.folder, status.loss)
        )
        for status in Ledger(folder).statuses(rows=False)
    }


def _returned(folder: Path, loss: float | None) -> Any:
    try:
        return json.loads(read_regular(folder / "result.json"))["returned"]
    except (FileNotFoundError, ConfigError, ValueError, KeyError, TypeError):
        return loss


def prepare(plan: Plan, folder: Path, jobs: Sequence[Job]) -> list[str]:
    """Make the folders of ``jobs`` with all that each will read; return lines for the user: where settings are judged.

    Raises:
        ConfigError: a link in a job's folder, or in its place, leads elsewhere; nothing was written.
    """
    for job in jobs:
        own = folder / job.folder
        refuse_link(own)
        refuse_links(own, f"job {job.number}")
    application = load(plan.application, plan.program)
    rule = rule_for(plan, application, jobs)
    sent = {job.folder for job in jobs}
    for job in jobs:
        own = folder / job.folder
        (own / ".hydra").mkdir(parents=True, exist_ok=True)
        values = plan.values(job)
        write_atomic(own / "config.yaml", to_yaml(values))
        write_atomic(own / ".hydra" / "overrides.yaml", to_yaml({"overrides": list(job.overrides)}))
        about: dict[str, Any] = {
            "sweep": plan.id,
            "number": job.number,
            "overrides": list(job.overrides),
            "cwd": plan.cwd,
            "hours": job.resources.hours,
            "application": plan.application,
        }
        if plan.program is not None:
            about["program"] = asdict(plan.program)
        comes = job.fork is not None and _comes(plan, folder, job.fork, sent)
        if job.fork is not None and comes:
            about["fork"] = asdict(job.fork)
        write_json(own / "job.json", about | _awaited(plan, job))
        if job.fork is not None and not application.has_checkpoint(own):
            (own / GRAFT).unlink(missing_ok=True)
            if not comes:  # nobody keeps anything for it
                has_begun(application, own, job.fork, 0)
    for job in plan.jobs:  # others begin with what it has kept: those that are new, too
        if job.folder not in sent and (forks := _awaited(plan, job)):
            path = folder / job.folder / "job.json"
            if path.exists():
                write_json(path, json.loads(read_regular(path)) | forks)
    return write_rule(folder, rule)


def _awaited(plan: Plan, job: Job) -> dict[str, Any]:
    forks = [asdict(fork) for fork in plan.awaited(job)]
    return {"forks": forks} if forks else {}


def _comes(plan: Plan, folder: Path, fork: Fork, sent: set[str]) -> bool:
    """Return whether the updates that ``fork`` asks for are there, or somebody is to make them: else the job does."""
    if fork.sweep is None and fork.job in sent:
        return True
    return trunk(load(plan.application, plan.program), folder, fork) in ("ready", "to come")
