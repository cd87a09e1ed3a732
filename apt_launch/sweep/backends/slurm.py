"""``hydra/launcher=slurm``: job arrays through submitit, and the states that SLURM knows."""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from apt_launch.sweep.application import Application, Resources, load
from apt_launch.sweep.backends.slurm_pack import run_packed_on_slurm
from apt_launch.sweep.backends.slurm_task import release, run_on_slurm
from apt_launch.sweep.jobs.process import fork_of
from apt_launch.sweep.jobs.state import ENDED, ObservedState, State, ask_to_cancel, read_state, transition
from apt_launch.sweep.jobs.trunk import trunk
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError
from apt_model.files import open_regular, refuse_link

AWAY: Final = re.compile(
    r"contact slurm controller|Socket timed out|Connection refused|Transport endpoint|Zero Bytes|slurmctld|"
    r"temporarily unable|Network is unreachable",
    re.IGNORECASE,
)
"""In the errors of SLURM's commands when the controller does not answer."""

FAILURES: Final = {
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "it could not end before its deadline",
    "FAILED": "it left with an error",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it took more memory than it had (launch.mem_gb)",
    "TIMEOUT": "it reached its time limit before it could write a checkpoint (hydra.launcher.signal_delay_s)",
    "COMPLETED": "SLURM says COMPLETED, but it wrote no result",
}
LAST_BYTES: Final = 1 << 16
"""Of a log, in which its last line is looked for."""

QUEUED: Final = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
RUNNING: Final = frozenset({"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"})
PREEMPTED: Final = frozenset({"PREEMPTED", "SUSPENDED", "STOPPED"})


def slurm_parameters(resources: Resources, values: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return a job's resources and the launcher's YAML as submitit's parameters."""
    limit = resources.hours * 60
    if resources.time_limit_minutes is not None:
        limit = min(limit, resources.time_limit_minutes)
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": max(1, math.ceil(limit)),
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus,
        "mem": f"{math.ceil(resources.mem_gb * 1024)}MB" if resources.mem_gb else None,
        "signal_delay_s": values["signal_delay_s"],
        "stderr_to_stdout": True,
        "setup": values["setup"] or None,
        "srun_args": ["--kill-on-bad-exit=1", *values["srun_args"]],
        "array_parallelism": values["max_parallel"] or 10**6,
        "additional_parameters": {"requeue": True, **values["additional_parameters"]},
    }
    if values["gres"]:
        parameters["gres"] = values["gres"]
    elif resources.gpus:
        parameters["gpus_per_node"] = resources.gpus
    for key in ("partition", "account", "qos", "constraint", "exclude"):
        parameters[key] = values[key]
    return {key: value for key, value in parameters.items() if value is not None}


def inherited_lines(application: Application) -> list[str]:
    """Return lines of a job script that give a job what it inherits of its sender, whatever the cluster does with the rest."""
    return [f"export {name}={shlex.quote(value)}" for name, value in application.environment().items()]


NAME: Final = re.compile(r"[A-Za-z0-9_\[(][A-Za-z0-9_.,:@+=/%&|*()\[\]-]*")
"""What names a partition, an account, nodes or devices: letters, digits and ``_.,:@+=/%&|*()[]-``, and no ``-`` first."""

PARAMETER: Final = re.compile(r"[a-z][a-z0-9_-]*")
"""The name of one of sbatch's parameters."""

LINE: Final = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]*")
"""One line of text, tabs allowed."""

OWN: Final = frozenset({"output", "error", "array", "wrap"})
"""Parameters of sbatch that a sweep sets itself, or that stand in the way of its job scripts."""


def check_parameters(values: Mapping[str, Any]) -> None:
    """Make sure that each value of the launcher is one line where it stands in a job script.

    Raises:
        ConfigError: with every problem found.
    """
    problems = []
    for key in ("partition", "account", "qos", "constraint", "exclude", "gres"):
        value = values[key]
        if value is not None and not NAME.fullmatch(value):
            problems.append(
                f"hydra.launcher.{key}: {value!r} cannot stand in a job script. Use letters, digits and _.,:@+=/%&|*()[]- , "
                "on one line."
            )
    lines = [("python", values["python"])]
    for key in ("setup", "srun_args"):
        lines += [(f"{key}.{number}", line) for number, line in enumerate(values[key])]
    for key, value in values["additional_parameters"].items():
        bare = str(key).replace("_", "-")
        if not PARAMETER.fullmatch(str(key)) or bare in OWN:
            problems.append(
                f"hydra.launcher.additional_parameters.{key}: no parameter of sbatch that may be set here. Use its long name, "
                f"without --, in small letters; {', '.join(sorted(OWN))} belong to the sweep."
            )
        if value is not None and not isinstance(value, str | int | float):
            problems.append(
                f"hydra.launcher.additional_parameters.{key}: {value!r} is not one value. Give text or a number."
            )
        lines.append((f"additional_parameters.{key}", value))
    for name, line in lines:
        if isinstance(line, str) and not LINE.fullmatch(line):
            problems.append(
                f"hydra.launcher.{name}: {line!r} has a line break or a control character. A job script takes one line here; "
                "give each line of setup as an entry of its own."
            )
    if problems:
        raise ConfigError(*problems)


class SlurmBackend:
    """A cluster that this machine can submit to."""

    name = "slurm"
    detaches = True

    def __init__(self, values: Mapping[str, Any]) -> None:
        check_parameters(values)
        self.values = dict(values)

    def has_gpus(self) -> bool:
        """Return whether nodes of the partition have GPUs.

        Raises:
            ConfigError: SLURM is not here.
        """
        partition = self.values["partition"]
        found = self._patiently(lambda: ask("sinfo", "-h", "-o", "%G", *(["-p", partition] if partition else [])))
        return "gpu" in found

    def check(self, plan: Plan) -> None:
        """Make sure that SLURM's commands are here.

        Raises:
            ConfigError: they are not.
        """
        if self.values["pack"] > 1 and (several := [job for job in plan.jobs if job.resources.ranks > 1]):
            raise ConfigError(
                f"hydra.launcher.pack: job {several[0].number} has several ranks, and such jobs share no task. Set it to 1."
            )
        for command in ("sbatch", "srun", "squeue"):
            if shutil.which(command) is None:
                raise ConfigError(
                    f"hydra/launcher: there is no {command} on this machine's PATH. Submit from a login node of the cluster, "
                    "or choose hydra/launcher=local."
                )

    def send(self, plan: Plan, folder: Path, jobs: Sequence[Job]) -> list[str]:
        """Submit one array for each set of equal resources, split where SLURM limits it; return lines for the user.

        Jobs that begin with the updates of another one of them are arrays of their own, which depend on that job's end. It
        takes the dependency away as soon as it has made those updates: see :func:`release`.

        Raises:
            ConfigError: SLURM refuses, or its controller stays away.
        """
        most = self._most_of_an_array() * int(self.values["pack"])
        groups: dict[tuple[str | None, Resources], list[Job]] = {}
        for job in sorted(jobs, key=lambda job: job.begins):  # each after the one that it begins with
            groups.setdefault((_trunk(plan, folder, job), job.resources), []).append(job)
        lines = []
        for (first, resources), members in groups.items():
            for begin in range(0, len(members), most):
                part = members[begin : begin + most]
                number = self._submit(plan, folder, resources, part, first)
                after = "" if first is None else f", once job {first.partition('-')[0]} has made their first updates"
                lines.append(f"SLURM job {number}: {len(part)} job{'s' if len(part) > 1 else ''}, {resources}{after}")
        return lines

    def _submit(
        self, plan: Plan, folder: Path, resources: Resources, jobs: Sequence[Job], first: str | None = None
    ) -> str:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        own = folder / ".submitit"
        refuse_link(own)
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"apt-{plan.id}-{jobs[0].number}-{int(time.time())}"
        executor = submitit.SlurmExecutor(own, python=self.values["python"] or shlex.quote(sys.executable))
        pack = int(self.values["pack"])
        together = [jobs[begin : begin + pack] for begin in range(0, len(jobs), pack)]
        parameters = slurm_parameters(_of_pack(resources, min(pack, len(jobs))), self.values, name=name)
        if first is not None and (after := read_state(folder / first).job_id):
            parameters["additional_parameters"]["dependency"] = f"afterany:{after}"
        lines = [*(parameters.get("setup") or ()), *inherited_lines(load(plan.application, plan.program))]
        executor.update_parameters(**{**parameters, "setup": lines or None})
        paths = [str((folder / job.folder).resolve()) for job in jobs]
        for job in jobs:  # before SLURM can start them
            transition(folder / job.folder, "submitted", job_id="")

        def submit() -> list[Any]:
            try:
                with _without_outer_job():
                    if pack > 1:
                        names = [[job.folder for job in part] for part in together]
                        if len(names) == 1:
                            return [executor.submit(run_packed_on_slurm, str(folder.resolve()), names[0])]
                        return list(
                            executor.map_array(run_packed_on_slurm, [str(folder.resolve())] * len(names), names)
                        )
                    if len(paths) == 1:
                        return [executor.submit(run_on_slurm, paths[0])]
                    return list(executor.map_array(run_on_slurm, paths))
            except (FailedSubmissionError, FailedJobError) as error:
                if AWAY.search(str(error)):  # it may have been taken all the same: never send it twice
                    with contextlib.suppress(AwayError, RefusedError):
                        ask("scancel", f"--name={name}")
                    raise AwayError(_brief(error)) from None
                raise RefusedError(_brief(error)) from None

        sent = self._patiently(submit)
        for part, handle in zip(together, sent, strict=True):
            for job in part:  # one that has started meanwhile knows its number
                transition(folder / job.folder, "submitted", expected="submitted", job_id=str(handle.job_id))
        if first is not None:  # it may have come there before it could know whom to release
            points = load(plan.application, plan.program).fork_points(folder / first)
            release([folder / job.folder for job in jobs if job.begins in points])
        return str(sent[0].job_id).split("_")[0]

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """Do it, again while the controller does not answer, for ``retry_minutes``.

        Raises:
            ConfigError: SLURM refuses, or stays away.
        """
        until = time.monotonic() + 60 * float(self.values["retry_minutes"])
        pause = 1.0
        while True:
            try:
                return action()
            except RefusedError as refused:
                raise ConfigError(f"hydra.launcher: SLURM refuses: {refused}") from None
            except AwayError as away:
                if time.monotonic() + pause > until:
                    raise ConfigError(
                        f"hydra.launcher: SLURM's controller does not answer: {away}. Try again later, or raise "
                        "hydra.launcher.retry_minutes."
                    ) from None
                sys.stderr.write(f"SLURM's controller does not answer; trying again in {pause:.0f} s\n")
                time.sleep(pause)
                pause = min(30.0, 2 * pause)

    def _wait_for_ends(self, folders: Sequence[Path]) -> None:
        until = time.monotonic() + 180
        while left := [folder for folder in folders if read_state(folder).state not in ENDED]:
            if time.monotonic() > until:
                raise ConfigError(f"{left[0]}: the job has not stopped after three minutes.")
            time.sleep(0.1)

    def _most_of_an_array(self) -> int:
        config = self._patiently(lambda: ask("scontrol", "show", "config"))
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", config)
        return max(1, int(found.group(1)) - 1) if found else 1000

    def poll(self, folder: Path, jobs: Mapping[str, State]) -> dict[str, ObservedState]:
        """Return the observed state of each of ``jobs``, none of which has ended by its own account."""
        ids = {state.job_id for state in jobs.values() if state.job_id}
        try:
            queue = _table(ask("squeue", "-h", "-r", "-t", "all", "-u", _user(), "-o", "%i|%T|%r"))
        except (AwayError, RefusedError, ConfigError) as error:
            return {
                name: ObservedState("unknown", f"SLURM does not answer ({error}); last known: {s.state}")
                for name, s in jobs.items()
            }
        missing = sorted({job_id.split("_")[0] for job_id in ids if job_id not in queue})
        book: dict[str, list[str]] = {}
        if missing:
            with contextlib.suppress(AwayError, RefusedError):
                book = _table(
                    ask("sacct", "-X", "-n", "-P", "-D", "-o", "JobID,State,ExitCode", "-j", ",".join(missing))
                )
        observed = {}
        for name, state in jobs.items():
            known = queue.get(state.job_id or "") or book.get(state.job_id or "")
            observed[name] = observed_state(state, known)
            if observed[name].state == "failed":
                last = _last_words(folder / name, state)
                observed[name] = replace(observed[name], cause=f"{observed[name].cause}{last}")
        return observed

    def cancel(self, folder: Path, jobs: Mapping[str, State], *, whole: bool = True) -> None:
        """Cancel ``jobs``; return when SLURM runs none of them any more.

        Raises:
            ConfigError: SLURM refuses, or stays away.
        """
        for name in jobs:
            with contextlib.suppress(ConfigError):  # a link in its place: scancel stops the job all the same
                ask_to_cancel(folder / name)
        if not whole and self.values["pack"] > 1:  # others run in the same task, whose worker looks for the files
            self._wait_for_ends([folder / name for name, state in jobs.items() if state.state == "running"])
            return
        plan = Plan.read(folder)
        ids = sorted({state.job_id for state in jobs.values() if state.job_id})
        if ids:
            self._patiently(lambda: ask("scancel", *ids))
        until = time.monotonic() + 180
        while time.monotonic() < until:
            names = ask("squeue", "-h", "-r", "-u", _user(), "-o", "%i|%j")
            rows = [line.split("|") for line in names.splitlines()]
            mine = f"apt-{plan.id}-"
            left = [number for number, name in rows if number in ids or (whole and name.startswith(mine))]
            if not left:
                return
            if stray := sorted({*left} - set(ids)):  # submitted, but never written down
                ask("scancel", *stray)
            time.sleep(0.3)
        raise ConfigError(f"{folder}: SLURM still shows {len(left)} of its jobs after three minutes: {left[0]}")


def _trunk(plan: Plan, folder: Path, job: Job) -> str | None:
    """Return the folder's name of the job whose updates ``job`` waits for; None: of none, or they are there."""
    fork = fork_of(folder / job.folder) if job.fork is not None else None
    if fork is None or trunk(load(plan.application, plan.program), folder, fork) in ("ready", "alone"):
        return None
    return fork.job


def _of_pack(resources: Resources, count: int) -> Resources:
    """Return what a task of ``count`` such jobs takes: they share its GPUs, and each has cores and memory of its own."""
    return replace(
        resources,
        cpus=None if resources.cpus is None else resources.cpus * count,
        mem_gb=None if resources.mem_gb is None else resources.mem_gb * count,
    )


def observed_state(state: State, known: Sequence[str] | None) -> ObservedState:
    """Return the state of a job in our names.

    Args:
        state: what the job or its sender wrote last.
        known: what squeue or sacct says of it: the state's name in SLURM and a detail; None: they do not know it.
    """
    if not state.job_id:
        return ObservedState("unknown", "the command that submitted it has not written down SLURM's answer")
    if known is None:
        return ObservedState(
            "unknown", f"SLURM knows no job {state.job_id} any more, and there is no accounting of it", final=True
        )
    slurm, detail = known[0].split()[0].rstrip("+"), known[1] if len(known) > 1 else ""
    if slurm in QUEUED:
        has_run = state.restarts > 0 or state.state in ("running", "requeued", "preempted")
        return ObservedState(
            "requeued" if has_run else "pending", None if detail in ("", "None") else f"SLURM: {detail}"
        )
    if slurm in RUNNING:
        return ObservedState("running")
    if slurm in PREEMPTED:
        return ObservedState("preempted", f"SLURM: {slurm}")
    if slurm == "CANCELLED":
        return ObservedState("cancelled", "by scancel", final=True)
    return ObservedState("failed", f"SLURM: {slurm}, {FAILURES.get(slurm, slurm)} ({detail}).", final=True)


class AwayError(Exception):
    """The controller does not answer."""


class RefusedError(Exception):
    """SLURM refuses it."""


def ask(*command: str) -> str:
    """Call one of SLURM's commands; return what it prints.

    Raises:
        AwayError: the controller does not answer.
        RefusedError: the command failed otherwise.
        ConfigError: the command is not here.
    """
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"hydra/launcher: there is no {command[0]} on this machine's PATH. Ask from a login node of the cluster."
        ) from None
    except subprocess.TimeoutExpired:
        raise AwayError(f"{command[0]} did not return within a minute") from None
    if answer.returncode:
        reason = answer.stderr.strip() or f"{command[0]} failed with exit code {answer.returncode}"
        raise (AwayError if AWAY.search(reason) else RefusedError)(reason)
    return answer.stdout


@contextlib.contextmanager
def _without_outer_job() -> Iterator[None]:
    """Hide that we may be inside of a job ourselves: its sizes would become those of the jobs that we submit."""
    kept = {
        key: value for key, value in os.environ.items() if key.startswith(("SLURM_", "SBATCH_")) and key != "SLURM_CONF"
    }
    for key in kept:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(kept)


def _table(text: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for line in text.splitlines() if len(row := line.strip().split("|")) > 1}


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "sbatch: error" in line or "error:" in line.lower()]
    return " ".join(lines) or str(error).strip().splitlines()[-1]


def _last_words(folder: Path, state: State) -> str:
    """Return the last line that the job printed, into its own log or before it had one."""
    logs = [folder / "log.txt", *(folder.parent / ".submitit").glob(f"*{state.job_id}_0_log.out")]
    for log in logs:
        with contextlib.suppress(OSError, ConfigError), open_regular(log) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            end = file.read().decode("utf-8", errors="replace")
            lines = [line.strip() for line in end.splitlines() if line.strip()]
            if lines:
                return f" Last line of {log.name}: {lines[-1][:200]}"
    return ""


def _user() -> str:
    """Return who asks, by name, or by number where the system knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())
