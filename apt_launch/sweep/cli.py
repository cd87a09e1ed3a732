"""``python -m apt_launch.sweep status|watch|wait|resume|extend|cancel|drop|best|report|replay DIR``: a sweep after its launch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from apt_launch.allow import take_flags
from apt_launch.command_line import ending
from apt_launch.commands import command
from apt_launch.secrets import keep_private
from apt_launch.sweep.application import load
from apt_launch.sweep.backends.registry import backend
from apt_launch.sweep.control import cancel as cancelling
from apt_launch.sweep.control import extend as extending
from apt_launch.sweep.control import resume as resuming
from apt_launch.sweep.control.follow import follow, say
from apt_launch.sweep.control.ledger import Ledger, Status
from apt_launch.sweep.control.table import show
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a job failed, 2 the command line or the folder is wrong, 130 interrupted."""
    keep_private()
    with ending():
        arguments = parser().parse_args(take_flags(sys.argv[1:]))
        if isinstance(arguments.folder, Path):
            arguments.folder = arguments.folder.absolute()  # jobs and workers change directory
        sys.exit(COMMANDS[arguments.command](arguments))


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m apt_launch.sweep",
        description="Show, follow and control a sweep that was sent: by python -m apt_launch --multirun, or by any program "
        "with hydra/sweeper=apt; from any terminal.",
        epilog="Each command has a --help of its own. Example: python -m apt_launch.sweep status multirun/DATE/TIME",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("status", "show every job: state, progress, loss, when it was last seen"),
        (
            "watch",
            "follow it live: a page with curves and schedules, on this machine alone, and a table in the terminal",
        ),
        ("wait", "wait until all jobs have ended"),
        ("resume", "send again what failed, was cancelled or is missing; overrides such as launch.hours=48 may follow"),
        (
            "extend",
            "plan the same sweep with other values, and send the jobs that are new; they begin with what others have kept",
        ),
        ("cancel", "stop jobs, all or those that are named, with a checkpoint of each"),
        ("drop", "leave jobs out: they are stopped, and no longer resumed, waited for or reported; their files stay"),
        ("best", "print the best job's folder, its newest checkpoint, and the command that runs it again"),
        ("report", "write tables, plots and a page that say which job won"),
        ("replay", "what stopping losers (launch.stop) would have saved in a sweep that is done, and whether it errs"),
    ):
        one = commands.add_parser(name, help=text, description=text.capitalize() + ".", allow_abbrev=False)
        where = "the sweep's folder, as its launch printed it"
        if name == "report":
            one.add_argument("folder", metavar="DIR", type=Path, nargs="+", help=f"{where}; several are joined")
        else:
            one.add_argument("folder", metavar="DIR", type=Path, help=where)
        if name == "status":
            one.add_argument("--json", action="store_true", help="for programs: one JSON object a job and line")
        if name == "watch":
            one.add_argument("--port", type=int, help="of the page; a free one unless said otherwise")
            one.add_argument("--terminal", action="store_true", help="no page; ends with the sweep")
        if name == "resume":
            one.add_argument("--allow", metavar="PACKAGE", help="a package of yours whose classes the jobs may name")
            one.add_argument(
                "overrides",
                nargs="*",
                metavar="JOB|KEY=VALUE",
                help="numbers of jobs, all unless one is named; overrides of keys that cannot change a result",
            )
        if name == "extend":
            one.add_argument("--allow", metavar="PACKAGE", help="a package of yours whose classes the jobs may name")
            one.add_argument("--dry-run", action="store_true", help="show the new jobs, and send nothing")
            one.add_argument(
                "overrides",
                nargs="+",
                metavar="KEY=VALUES",
                help="in place of those of the sweep's command with the same keys",
            )
        if name in ("cancel", "drop"):
            one.add_argument(
                "jobs", nargs="+" if name == "drop" else "*", type=int, metavar="JOB", help="its number in the table"
            )
        if name in ("wait", "resume"):
            one.add_argument(
                "--wait", action="store_true", help=argparse.SUPPRESS if name == "wait" else "wait for them, too"
            )
        if name in ("report", "best"):
            one.add_argument(
                "--metric", metavar="NAME", help="what decides, the best wins: val/loss, or what the program returns"
            )
            better = one.add_mutually_exclusive_group()
            for word, which in (("maximize", "higher"), ("minimize", "lower")):
                better.add_argument(
                    f"--{word}", dest="direction", action="store_const", const=word, help=f"{which} values are better"
                )
        if name == "report":
            one.add_argument(
                "--against",
                metavar="WHAT",
                help="the jobs that others are compared with, seed by seed, such as study=dense; of several keys that were "
                "swept some may be named, such as moe.top_k=1: jobs are compared that are alike in the others",
            )
        if name == "replay":
            one.add_argument("--rungs", nargs="+", metavar="WHEN", help="such as 25%% 50%%, or 500st")
            for word, what in (
                ("metric", "by which settings are judged"),
                ("keep", "the share of settings that goes on, such as 1/2"),
                ("grace", "updates after settings begin to differ in which none is judged, such as 5%%"),
            ):
                one.add_argument(f"--{word}", metavar=word.upper(), help=what)
            one.add_argument(
                "--at-once", type=int, metavar="N", help="jobs beside each other; all unless said otherwise"
            )
            one.add_argument("--orders", type=int, default=200, metavar="N", help="in which jobs begin; 200")
    return parser


def status(arguments: argparse.Namespace) -> int:
    """Show the jobs."""
    ledger = Ledger(arguments.folder)
    statuses = ledger.statuses()
    if arguments.json:
        for one in statuses:
            sys.stdout.write(json.dumps(_as_json(one)) + "\n")
    else:
        show(ledger.plan, statuses, arguments.folder)
    return 1 if any(one.state == "failed" for one in statuses) else 0


def watch(arguments: argparse.Namespace) -> int:
    """Follow the jobs live."""
    from apt_launch.sweep.watch.watch import watch

    return watch(arguments.folder, port=arguments.port, page=not arguments.terminal)


def wait(arguments: argparse.Namespace) -> int:
    """Wait for the jobs."""
    return follow(arguments.folder)


def resume(arguments: argparse.Namespace) -> int:
    """Send jobs again."""
    plan = Plan.read(arguments.folder)
    numbers = [int(word) for word in arguments.overrides if word.isdecimal()]
    overrides = [word for word in arguments.overrides if not word.isdecimal()]
    number = resuming.resume(arguments.folder, overrides, numbers)
    if not number:
        say("Nothing to send: every job is done or on its way.")
        return 0
    if arguments.wait or not backend(plan.launcher, plan.launcher_values).detaches:
        return follow(arguments.folder)
    say(f"Look at it by: {command('apt_launch.sweep', 'status', arguments.folder)}")
    return 0


def extend(arguments: argparse.Namespace) -> int:
    """Send jobs that are new."""
    plan = Plan.read(arguments.folder)
    if not extending.extend(arguments.folder, arguments.overrides, dry_run=arguments.dry_run):
        say("Nothing to send: the sweep has all of these jobs.")
        return 0
    if arguments.dry_run or backend(plan.launcher, plan.launcher_values).detaches:
        return 0
    return follow(arguments.folder)


def cancel(arguments: argparse.Namespace) -> int:
    """Cancel the jobs."""
    statuses = cancelling.cancel(arguments.folder, arguments.jobs)
    show(Plan.read(arguments.folder), statuses, arguments.folder)
    return 0


def drop(arguments: argparse.Namespace) -> int:
    """Drop jobs."""
    statuses = cancelling.drop(arguments.folder, arguments.jobs)
    show(Plan.read(arguments.folder), statuses, arguments.folder)
    return 0


def best(arguments: argparse.Namespace) -> int:
    """Print the best job: folder, checkpoint if there is one, command, a line each."""
    from apt_launch.sweep.report.findings import find

    ledger = Ledger(arguments.folder)
    states = {one.job.folder: one.state for one in ledger.statuses(rows=False)}
    findings = find(arguments.folder, states, arguments.metric, direction=arguments.direction)
    trial = findings.best
    if trial is None:
        raise ConfigError(
            f"{arguments.folder}: no job has recorded {findings.metric} yet. Wait for one: sweep wait DIR."
        )
    own = arguments.folder / trial.job.folder
    say(str(ledger.application.output(own, ledger.plan.values(trial.job), trial.job.number)))
    if (checkpoint := newest(own / "checkpoints")) is not None:
        say(str(checkpoint))
    say(findings.command(trial))
    return 0


def newest(checkpoints: Path) -> Path | None:
    """Return the youngest entry of a folder of checkpoints; None: it has none."""
    found = [path for path in checkpoints.iterdir() if not path.name.startswith(".")] if checkpoints.is_dir() else []
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def report(arguments: argparse.Namespace) -> int:
    """Write the report."""
    from apt_launch.sweep.report.findings import Source
    from apt_launch.sweep.report.report import write_report

    sources = []
    for folder in dict.fromkeys(folder.absolute() for folder in arguments.folder):
        statuses = Ledger(folder).statuses(rows=False)
        states = {one.job.folder: one.state for one in statuses}
        sources.append(Source(folder, states, {one.job.folder: one.cause for one in statuses}))
    first, *others = sources
    for path in write_report(
        first.folder,
        first.states,
        arguments.metric,
        first.causes,
        arguments.against,
        direction=arguments.direction,
        others=others,
    ):
        sys.stdout.write(f"{path}\n")
    return 0


def replay(arguments: argparse.Namespace) -> int:
    """Replay the rule by which losers are stopped."""
    from apt_launch.sweep.options import StopConfig
    from apt_launch.sweep.report.replay import replay
    from apt_model.errors import validated

    plan = Plan.read(arguments.folder)
    application = load(plan.application, plan.program)
    planned = application.check(plan.values(plan.jobs[0])).stop
    given = {key: value for key in StopConfig.model_fields if (value := getattr(arguments, key, None)) is not None}
    stop = validated(StopConfig, (planned.model_dump() if planned is not None else {}) | given, key="launch.stop")
    for key in ("at_once", "orders"):
        if (number := getattr(arguments, key)) is not None and number < 1:
            raise ConfigError(f"--{key.replace('_', '-')}: {number} is no number of jobs or orders. Give at least 1.")
    say(str(replay(arguments.folder, stop, at_once=arguments.at_once, orders=arguments.orders)))
    return 0


COMMANDS = {
    **{"status": status, "watch": watch, "wait": wait, "resume": resume, "cancel": cancel},
    **{"extend": extend, "drop": drop, "best": best, "report": report, "replay": replay},
}


def _as_json(one: Status) -> dict[str, Any]:
    return {
        "number": one.job.number,
        "folder": str(one.folder),
        "overrides": list(one.job.overrides),
        "state": one.state,
        "cause": one.cause,
        "job_id": one.job_id,
        "restarts": one.restarts,
        "loss": one.loss,
        "age": one.age,
        "phase": one.phase,
        "row": dict(one.row),
        "damaged_rows": one.damaged_rows,
    }
