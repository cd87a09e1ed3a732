"""What squeue and sacct say, in our names."""

from __future__ import annotations

import pytest

from apt_launch.sweep.application import Resources
from apt_launch.sweep.backends.slurm import observed_state, slurm_parameters
from apt_launch.sweep.jobs.state import State

SENT = State("submitted", "12_3")
RUNS = State("running", "12_3")
AGAIN = State("submitted", "12_3", restarts=1)


@pytest.mark.parametrize(
    ("written", "known", "state", "cause", "final"),
    [
        (SENT, ["PENDING", "Priority"], "pending", "SLURM: Priority", False),
        (SENT, ["PENDING", "None"], "pending", None, False),
        (SENT, ["PENDING"], "pending", None, False),
        (SENT, ["CONFIGURING", ""], "pending", None, False),
        (RUNS, ["PENDING", "BeginTime"], "requeued", "SLURM: BeginTime", False),
        (AGAIN, ["PENDING", "None"], "requeued", None, False),
        (State("preempted", "12_3"), ["REQUEUED", "None"], "requeued", None, False),
        (State("requeued", "12_3"), ["REQUEUE_HOLD", "JobHeldUser"], "requeued", "SLURM: JobHeldUser", False),
        (SENT, ["SPECIAL_EXIT", "None"], "pending", None, False),
        (SENT, ["RUNNING", "None"], "running", None, False),
        (RUNS, ["COMPLETING", "None"], "running", None, False),
        (RUNS, ["STAGE_OUT", "None"], "running", None, False),
        (RUNS, ["SIGNALING", "None"], "running", None, False),
        (RUNS, ["RESIZING", "None"], "running", None, False),
        (RUNS, ["PREEMPTED", "0:0"], "preempted", "SLURM: PREEMPTED", False),
        (RUNS, ["SUSPENDED", "None"], "preempted", "SLURM: SUSPENDED", False),
        (RUNS, ["STOPPED", "None"], "preempted", "SLURM: STOPPED", False),
        (RUNS, ["CANCELLED by 1000", "0:15"], "cancelled", "by scancel", True),
        (RUNS, ["CANCELLED+", "0:15"], "cancelled", "by scancel", True),
        (RUNS, ["FAILED", "1:0"], "failed", "SLURM: FAILED, it left with an error (1:0).", True),
        (RUNS, ["NODE_FAIL", "1:0"], "failed", "SLURM: NODE_FAIL, its node failed (1:0).", True),
        (RUNS, ["BOOT_FAIL", ""], "failed", "SLURM: BOOT_FAIL, a node did not boot ().", True),
        (RUNS, ["DEADLINE", "0:0"], "failed", "SLURM: DEADLINE, it could not end before its deadline (0:0).", True),
        (
            *(RUNS, ["OUT_OF_MEMORY", "0:125"], "failed"),
            "SLURM: OUT_OF_MEMORY, it took more memory than it had (launch.mem_gb) (0:125).",
            True,
        ),
        (
            *(RUNS, ["TIMEOUT", "0:0"], "failed"),
            "SLURM: TIMEOUT, it reached its time limit before it could write a checkpoint "
            "(hydra.launcher.signal_delay_s) (0:0).",
            True,
        ),
        (
            *(RUNS, ["COMPLETED", "0:0"], "failed"),
            "SLURM: COMPLETED, SLURM says COMPLETED, but it wrote no result (0:0).",
            True,
        ),
        (RUNS, ["NEVER_SEEN_YET", ""], "failed", "SLURM: NEVER_SEEN_YET, NEVER_SEEN_YET ().", True),
        (RUNS, None, "unknown", "SLURM knows no job 12_3 any more, and there is no accounting of it", True),
        (
            *(State("submitted", None), ["RUNNING", ""], "unknown"),
            "the command that submitted it has not written down SLURM's answer",
            False,
        ),
    ],
)
def test_each_state_of_slurm_has_one_of_ours(
    written: State, known: list[str] | None, state: str, cause: str | None, final: bool
) -> None:
    observed = observed_state(written, known)
    assert (observed.state, observed.cause, observed.final) == (state, cause, final)


VALUES = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "exclude", "gres", "max_parallel", "python")),
    **{"signal_delay_s": 90, "setup": [], "srun_args": [], "additional_parameters": {}, "retry_minutes": 10},
}


@pytest.mark.parametrize(
    ("resources", "values", "expected"),
    [
        (Resources(hours=0.001), {}, {"time": 1, "nodes": 1, "ntasks_per_node": 1}),
        (Resources(hours=2.01), {}, {"time": 121}),
        (Resources(hours=24, time_limit_minutes=30), {}, {"time": 30}),
        (Resources(hours=0.25, time_limit_minutes=30), {}, {"time": 15}),
        (Resources(gpus=4), {}, {"gpus_per_node": 4}),
        (Resources(gpus=4), {"gres": "gpu:a100:2"}, {"gres": "gpu:a100:2", "gpus_per_node": None}),
        (Resources(gpus=0), {}, {"gpus_per_node": None}),
        (Resources(mem_gb=1.5, cpus=3), {}, {"mem": "1536MB", "cpus_per_task": 3}),
        (Resources(), {"max_parallel": 2}, {"array_parallelism": 2}),
        (Resources(), {"additional_parameters": {"requeue": False}}, {"additional_parameters": {"requeue": False}}),
    ],
)
def test_resources_become_parameters_of_sbatch(
    resources: Resources, values: dict[str, object], expected: dict[str, object]
) -> None:
    found = slurm_parameters(resources, {**VALUES, **values}, name="apt-1-0")
    assert {key: found.get(key) for key in expected} == expected
