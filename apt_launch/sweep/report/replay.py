"""What stopping losers would have done to a sweep that is finished: the rule, replayed on its records."""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apt_launch.record import read_rows
from apt_launch.rows import rank
from apt_launch.sweep.application import load
from apt_launch.sweep.control.rungs import described, rule_of
from apt_launch.sweep.jobs.halving import Member, Point, Rule, Setting, judge
from apt_launch.sweep.jobs.state import read_state
from apt_launch.sweep.options import StopConfig
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError


@dataclass(frozen=True)
class Replay:
    """What came of many orders in which the jobs might have begun."""

    rule: Rule
    jobs: int
    at_once: int
    asked: int
    """Updates of all jobs."""
    trained: Sequence[int]
    """Those that each order would have trained."""
    winner: str
    """The setting that is best at the end."""
    winner_stopped: int
    """Orders in which it would have been stopped."""
    left_out: int = 0
    """Jobs that have no complete record."""

    def __str__(self) -> str:
        orders, mean = len(self.trained), statistics.fmean(self.trained)
        left = f", {self.left_out} jobs without a complete record left out" if self.left_out else ""
        return "\n".join(
            (
                *described(self.rule),
                f"{self.jobs} jobs, {self.at_once} at once, in {orders} orders{left}",
                f"updates asked: {self.asked:,}; trained: {mean:,.0f} on average ({min(self.trained):,} to "
                f"{max(self.trained):,}): {1 - mean / self.asked:.0%} less",
                f"the winner, {self.winner}, would have been stopped in {self.winner_stopped} of {orders} orders",
            )
        )


def replay(folder: Path, stop: StopConfig, *, at_once: int | None = None, orders: int = 200) -> Replay:
    """Replay ``stop`` on the records of the sweep in ``folder``.

    Jobs take an equal time for an update. They begin in an order that is drawn anew each time, the same at each call.

    Args:
        at_once: jobs that run beside each other; None: all of them.
        orders: how many are drawn.

    Raises:
        ConfigError: fewer than two settings have complete records with the metric.
    """
    plan = Plan.read(folder)
    application = load(plan.application, plan.program)
    rule = rule_of(plan, application, stop)
    if rule is None:
        raise ConfigError("--rungs: none is given, and launch.stop.rungs names none. Give some: --rungs 25% 50%.")
    steps, records = {}, {}
    for job in plan.jobs:
        own = folder / job.folder
        if read_state(own).state != "done":
            continue
        rows = read_rows(own / "metrics.jsonl")
        if points := rule.points(rows):
            records[job.folder] = points
            steps[job.folder] = job.steps or int(max(row["step"] for row in rows)) + 1
    complete = [setting for setting in rule.settings if any(job in records for job in setting.jobs)]
    if len(complete) < 2:
        raise ConfigError(
            f"{folder}: fewer than two of its settings have a finished job that has recorded {rule.metric}. A replay needs a "
            "sweep that is done: sweep wait DIR."
        )

    def end(setting: Setting) -> float:
        return rank(statistics.fmean(records[job][-1].value for job in setting.jobs if job in records), rule.direction)

    winner = min(complete, key=end)
    draw = random.Random(0)
    trained, lost = [], 0
    slots = at_once or len(records)
    for _ in range(orders):
        order = draw.sample(sorted(records), len(records))
        updates, stopped = run(rule, records, steps, order, slots)
        trained.append(updates)
        lost += winner.name in stopped
    return Replay(
        rule,
        len(records),
        min(slots, len(records)),
        sum(steps.values()),
        trained,
        winner.name,
        lost,
        len(plan.jobs) - len(records),
    )


def run(
    rule: Rule, records: Mapping[str, Sequence[Point]], steps: Mapping[str, int], order: Sequence[str], at_once: int
) -> tuple[int, set[str]]:
    """Return how many updates are trained, and which settings are stopped, if jobs begin in ``order``, ``at_once`` of them.

    Args:
        records: of each job, as it would be if the job came to its end; those without one are no part of the sweep.
        steps: the updates of each.
    """
    waiting = deque(order)
    began: dict[str, int] = {}
    seen: dict[str, int] = dict.fromkeys(records, 0)
    decided: set[tuple[str, int]] = set()
    stopped: set[str] = set()
    trained: dict[str, int] = {}
    events: list[tuple[int, int, str]] = []  # when, which in the order, whose point or end

    def begin(now: int) -> None:
        job = waiting.popleft()
        began[job] = now
        heapq.heappush(events, (now + _next(job), order.index(job), job))

    def _next(job: str) -> int:
        """Return after how many updates the job has its next point, or its end."""
        points = records[job]
        return points[seen[job]].updates if seen[job] < len(points) else steps[job]

    for _ in range(min(at_once, len(order))):
        begin(0)
    while events:
        now, place, job = heapq.heappop(events)
        if job in trained:
            continue
        if seen[job] >= len(records[job]):
            trained[job] = steps[job]
            if waiting:
                begin(now)
            continue
        seen[job] += 1
        heapq.heappush(events, (began[job] + _next(job), place, job))
        setting = rule.setting_of(job)
        assert setting is not None
        for rung in setting.rungs:
            if (setting.name, rung) in decided or records[job][seen[job] - 1].updates < rung:
                continue
            members = {one: Member(points[: seen[one]]) for one, points in records.items()}
            decision = judge(rule, setting, rung, members)
            if decision is None:
                break
            decided.add((setting.name, rung))
            if decision.stop:
                stopped.add(setting.name)
                for one in setting.jobs:
                    if one in began and one not in trained:
                        trained[one] = min(now - began[one], steps[one])
                        if waiting:
                            begin(now)
                break
    return sum(trained.values()), stopped
