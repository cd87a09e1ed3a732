"""The tree of a sweep: which first updates of a job another job trains for it.

Jobs go by their numbers, or those first whose records have the rows that others need, whichever leaves less to train. Each
begins with the updates of that job before it with which it shares most, or from what an earlier job has kept.
``launch.share=auto`` does so where it is worth it: see :data:`LEAST_UPDATES`, :data:`LEAST_SHARE` and :data:`MOST_UPDATES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

from apt_launch.sweep.application import Application, Fork, JobSpec, Resources, load
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan

LEAST_UPDATES: Final = 32
"""Updates that a job must save: a job that begins with another's costs a checkpoint more, written and read."""

LEAST_SHARE: Final = 0.05
"""Of a job's updates that it must save, and of the updates of all jobs that the sweep must save."""

MOST_UPDATES: Final = 250_000
"""Of all jobs together: to compare so many takes some seconds, and ``auto`` compares no more."""


@dataclass(frozen=True)
class Source:
    """An earlier job, and the updates from which others can begin by what it has kept."""

    spec: JobSpec
    job: str
    points: tuple[int, ...]
    sweep: str | None = None


def with_tree(plan: Plan, application: Application, sources: Sequence[Source] = (), *, first: int = 0) -> Plan:
    """Return ``plan`` with where each job begins.

    Args:
        sources: earlier jobs that have kept something.
        first: the number of the first job that is planned now; those before it stay as they are.
    """
    new = [
        job for job in plan.jobs if job.number >= first and job.spec is not None and _may_share(plan, job, application)
    ]
    asked = sum(job.steps for job in new)
    if not new or (_is_auto(new) and asked > MOST_UPDATES):
        return plan
    begun = _begin(new, sources, application)
    if (order := _most_rows_first(new, application)) != new:
        begun = max(begun, _begin(order, sources, application), key=_begin_after)  # of equal ones that by number
    if _is_auto(new) and _begin_after(begun) < LEAST_SHARE * asked:
        return plan
    by_number = {job.number: job for job in begun}
    return replace(plan, jobs=tuple(by_number.get(job.number, job) for job in plan.jobs))


def _begin(jobs: Sequence[Job], sources: Sequence[Source], application: Application) -> list[Job]:
    """Return the jobs, each with where it begins: with one before it in ``jobs``, or from a source."""
    begun: list[Job] = []
    for job in jobs:
        fork = _best(job, begun, sources, application)
        begun.append(job if fork is None or not _worth_it(job, fork) else replace(job, fork=fork))
    return begun


def _begin_after(jobs: Sequence[Job]) -> int:
    """Return how many updates all jobs together begin after."""
    return sum(job.begins for job in jobs)


def _most_rows_first(jobs: Sequence[Job], application: Application) -> list[Job]:
    """Return the jobs by how many more first updates each has for the others than they have for it, equal ones as they came.

    Two jobs that compute the same differ in this where one writes more rows: the other can begin with it, and not it with the
    other, whose record lacks rows of its own.
    """
    more = dict.fromkeys((job.number for job in jobs), 0)
    for a, b in combinations(jobs, 2):
        if a.spec is None or b.spec is None or a.resources != b.resources:
            continue
        surplus = application.shared_updates(a.spec, b.spec) - application.shared_updates(b.spec, a.spec)
        more[a.number] += surplus
        more[b.number] -= surplus
    return sorted(jobs, key=lambda job: -more[job.number])


def _may_share(plan: Plan, job: Job, application: Application) -> bool:
    """Return whether the job may take part."""
    assert job.spec is not None
    limited = plan.launcher == "slurm" and plan.launcher_values.get("max_parallel") is not None
    asked = job.spec.share is True or (job.spec.share == "auto" and not limited)
    return asked and _why_alone(plan, job, application) is None


def _why_alone(plan: Plan, job: Job, application: Application) -> str | None:
    """Return why the job can share nothing. A cluster's task with several jobs, or the user's own dependency, leaves no order."""
    assert job.spec is not None
    if "dependency" in plan.launcher_values.get("additional_parameters", {}):
        return "hydra.launcher.additional_parameters.dependency leaves no other order of jobs"
    if plan.launcher_values.get("pack", 1) > 1:
        return "hydra.launcher.pack starts several jobs as one"
    return application.why_alone(job.spec)


def _is_auto(jobs: Sequence[Job]) -> bool:
    return all(job.spec is not None and job.spec.share == "auto" for job in jobs)


def _worth_it(job: Job, fork: Fork) -> bool:
    assert job.spec is not None
    return job.spec.share is True or fork.update >= max(LEAST_UPDATES, LEAST_SHARE * job.steps)


def _best(job: Job, before: Sequence[Job], sources: Sequence[Source], application: Application) -> Fork | None:
    """Return where the job begins with most updates done; of equal ones, what is there already, and then the first."""
    spec = job.spec
    assert spec is not None
    found: Fork | None = None
    for source in sources:
        if not _computes_alike(source.spec.resources, job.resources):
            continue
        shared = min(application.shared_updates(source.spec, spec), job.steps)
        point = max((point for point in source.points if point <= shared), default=0)
        if point > (found.update if found else 0):
            found = Fork(source.job, point, source.sweep)
    for other in before:
        if other.resources != job.resources or other.spec is None:  # numbers of processes change last digits
            continue
        shared = min(application.shared_updates(other.spec, spec), other.steps, job.steps)
        if shared > (found.update if found else 0) and shared > other.begins:
            found = Fork(other.folder, shared)
    return found


def _computes_alike(a: Resources, b: Resources) -> bool:
    """Return whether jobs with such resources compute the same last digits: numbers of processes and cores change them."""
    return (a.nodes, a.tasks_per_node, a.gpus, a.cpus) == (b.nodes, b.tasks_per_node, b.gpus, b.cpus)


def is_shared(plan: Plan) -> bool:
    """Return whether any job begins with the updates of another."""
    return any(job.fork is not None for job in plan.jobs)


def outline(plan: Plan) -> Iterator[str]:
    """Yield what is trained once and what that saves, in lines for the user."""
    if is_shared(plan):
        yield "First updates that are trained once:"
        yield from (f"  {line}" for line in tree_lines(plan))
    yield from saved(plan)


def saved(plan: Plan) -> Iterator[str]:
    """Yield what the tree saves; where ``launch.share=true`` or ``launch.reuse`` asks for it and there is nothing, why."""
    yield from _not_reused(plan)
    if is_shared(plan):
        yield saving(plan)
        return
    asking = [job for job in plan.jobs if job.spec is not None and job.spec.share is True]
    if not asking:
        return
    why = _why_not(plan, asking, "no job has first updates in common with an earlier one")
    yield f"launch.share=true: each job trains all of its updates: {why}"


def _not_reused(plan: Plan) -> Iterator[str]:
    reusing = [job for job in plan.jobs if job.spec is not None and job.spec.reuse is not None]
    if not reusing or any(job.fork is not None and job.fork.sweep is not None for job in plan.jobs):
        return
    specs = [job.spec for job in reusing if job.spec is not None]
    if not any(spec.share for spec in specs):
        why = "launch.share=false"
    elif any(spec.share is True for spec in specs):
        why = _why_not(plan, reusing, "no job has first updates in common with one that has kept them")
    elif sum(job.steps for job in plan.jobs) > MOST_UPDATES:
        why = f"launch.share=auto compares no more than {MOST_UPDATES:,} updates"
    else:
        less = (
            f"it would save less than {LEAST_UPDATES} updates or {LEAST_SHARE * 100:g} %; launch.share=true takes any"
        )
        why = _why_not(plan, reusing, less)
    folders = ", ".join(sorted({str(spec.reuse) for spec in specs}))
    yield f"launch.reuse={folders}: no job begins with what is kept there: {why}"


def _why_not(plan: Plan, jobs: Sequence[Job], otherwise: str) -> str:
    """Return why none of the jobs can share anything; ``otherwise``: one of them could."""
    application = load(plan.application, plan.program)
    reasons = [_why_alone(plan, job, application) for job in jobs]
    known = dict.fromkeys(reason for reason in reasons if reason is not None)
    return otherwise if None in reasons else "; ".join(known)


def saving(plan: Plan) -> str:
    """Return what the tree saves, in a line."""
    asked = sum(job.steps for job in plan.jobs)
    trained = asked - _begin_after(plan.jobs)
    hours = ""
    if plan.gpu_hours:
        less = sum(job.resources.gpu_hours * job.begins / job.steps for job in plan.jobs if job.steps)
        hours = f"; of {plan.gpu_hours:,.4g} GPU-hours {less:,.4g} less"
    return f"{len(plan.jobs)} jobs, {asked:,} updates asked, {trained:,} trained: {1 - trained / asked:.0%} less{hours}".replace(
        "%", " %"
    )


def tree_lines(plan: Plan) -> Iterator[str]:
    """Yield the tree as text: a line a job, below the one that it begins with."""
    children = _children(plan)

    def below(job: Job, indent: str) -> Iterator[str]:
        members = children.get(job.folder, [])
        for number, other in enumerate(members):
            last = number == len(members) - 1
            yield f"{indent}{'└' if last else '├'} from {other.begins:,}: {_name(other)}"
            yield from below(other, indent + ("  " if last else "│ "))

    for job in children.get(None, []):
        source = (
            "" if job.fork is None else f" from {job.begins:,} of {job.fork.job} in {job.fork.sweep or 'this sweep'}"
        )
        yield f"job {job.number}{source}, to {job.steps:,}" + (f"  {job.label}" if job.label else "")
        yield from below(job, "  ")


def tree(plan: Plan) -> Iterator[Job]:
    """Yield the jobs, each before those that begin with it."""
    children = _children(plan)
    waiting = list(reversed(children.get(None, [])))
    while waiting:
        job = waiting.pop()
        yield job
        waiting += reversed(children.get(job.folder, []))


def _children(plan: Plan) -> dict[str | None, list[Job]]:
    """Return the jobs that begin with each one, by its folder, in order; None: with none that is here."""
    folders = {job.folder for job in plan.jobs}
    found: dict[str | None, list[Job]] = {}
    for job in sorted(plan.jobs, key=lambda job: (job.begins, job.number)):
        inside = job.fork is not None and job.fork.sweep is None and job.fork.job in folders
        found.setdefault(job.fork.job if job.fork is not None and inside else None, []).append(job)
    return found


def _name(job: Job) -> str:
    return f"job {job.number}" + (f"  {job.label}" if job.label else "")


def longest_path(plan: Plan) -> dict[str, int]:
    """Return how many updates come one after another from where each job begins, in it or in those that begin with it."""
    found: dict[str, int] = {}
    for job in reversed([*tree(plan)]):
        below = [fork.update - job.begins + found[name] for fork in plan.awaited(job) for name in fork.jobs]
        found[job.folder] = max([job.steps - job.begins, *below])
    return found
