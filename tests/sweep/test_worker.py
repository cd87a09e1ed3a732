"""Which job the local worker starts next."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from apt_launch import lease
from apt_launch.lease import Holder, heartbeats
from apt_launch.sweep.application import TRAINER, Resources
from apt_launch.sweep.backends.local import LocalBackend
from apt_launch.sweep.backends.local_worker import Worker
from apt_launch.sweep.backends.machine import Machine, worker_file
from apt_launch.sweep.jobs.state import State
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError
from apt_model.files import write_json

SMALL = Machine(cores=4, gpus=("4", "7"), mem_gb=16.0)


def worker(folder: Path, machine: Machine, wanted: list[Resources], max_parallel: int | None = None) -> Worker:
    jobs = tuple(Job(number, f"{number:064}", (), {"seed": number}, r) for number, r in enumerate(wanted))
    plan = Plan("id", "now", (), "local", {}, str(folder), len(jobs), TRAINER, {}, jobs)
    plan.write(folder)
    return Worker(folder, [job.folder for job in jobs], machine, max_parallel)


def started(worker: Worker) -> list[int]:
    """Take jobs as long as there is room, as the worker does before it waits; return their numbers."""
    numbers = []
    while (name := worker.take_next()) is not None:
        resources = worker.resources[name]
        gpus = tuple(worker.free_gpus[: resources.gpus or 0])
        del worker.free_gpus[: len(gpus)]
        numbers.append(int(name.split("-")[0]))
        worker.running[numbers[-1]] = (name, resources, gpus)
    return numbers


def end(worker: Worker, number: int) -> None:
    worker.free_gpus += worker.running.pop(number)[2]


@pytest.mark.parametrize(
    ("wanted", "max_parallel", "expected"),
    [
        ([Resources()] * 6, None, [0, 1, 2, 3]),  # a core each
        ([Resources()] * 6, 2, [0, 1]),
        ([Resources()] * 6, 100, [0, 1, 2, 3]),
        ([Resources(cpus=2)] * 3, None, [0, 1]),
        (
            [Resources(cpus=3), Resources(cpus=2), Resources(cpus=1)],
            None,
            [0, 2],
        ),  # the first that fits, in their order
        ([Resources(gpus=1)] * 3, None, [0, 1]),
        ([Resources(gpus=2), Resources(gpus=1), Resources(gpus=0)], None, [0, 2]),
        ([Resources(gpus=1), Resources(gpus=2), Resources(gpus=1)], None, [0, 2]),
        ([Resources(mem_gb=10), Resources(mem_gb=7), Resources(mem_gb=6)], None, [0, 2]),
        ([Resources(cpus=4, mem_gb=16, gpus=2), Resources()], None, [0]),
        ([Resources(cpus=5)], None, []),  # never sent: the backend's check refuses it
    ],
)
def test_the_first_job_that_fits_is_started(
    tmp_path: Path, wanted: list[Resources], max_parallel: int | None, expected: list[int]
) -> None:
    assert started(worker(tmp_path, SMALL, wanted, max_parallel)) == expected


def test_a_job_that_ends_makes_room_for_the_first_that_waits(tmp_path: Path) -> None:
    working = worker(tmp_path, SMALL, [Resources(gpus=2), Resources(gpus=1), Resources(gpus=1), Resources(gpus=2)])
    assert started(working) == [0]
    end(working, 0)
    assert started(working) == [1, 2]
    assert {gpus for _, _, gpus in working.running.values()} == {("4",), ("7",)}
    end(working, 2)
    assert started(working) == []  # one GPU is free, and job 3 waits for two
    end(working, 1)
    assert started(working) == [3]
    assert set(working.running[3][2]) == {"4", "7"}


@pytest.mark.parametrize(
    ("jobs", "cpus", "max_parallel", "each"), [(8, None, None, 1), (2, None, None, 2), (8, None, 1, 4), (1, 2, None, 4)]
)
def test_cores_that_nobody_asked_for_are_shared(
    tmp_path: Path, jobs: int, cpus: int | None, max_parallel: int | None, each: int
) -> None:
    assert worker(tmp_path, SMALL, [Resources(cpus=cpus)] * jobs, max_parallel).cores_each == each


@pytest.mark.parametrize(
    ("resources", "fits"),
    [
        (Resources(), 4),
        (Resources(cpus=3), 1),
        (Resources(cpus=5), 0),
        (Resources(gpus=2), 1),
        (Resources(gpus=3), 0),
        (Resources(mem_gb=5), 3),
        (Resources(mem_gb=17), 0),
    ],
)
def test_a_machine_has_room_for_so_many_jobs(resources: Resources, fits: int) -> None:
    assert SMALL.room_for(resources) == fits


def test_a_worker_of_another_container_is_judged_by_its_heartbeats_and_not_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "INTERVAL", 0.1)
    (tmp_path / ".submitit").mkdir()
    own = worker_file(tmp_path, "worker-0")
    write_json(
        own, asdict(replace(Holder.this_process(), pid_namespace="1"))
    )  # a signal to its pid would end this test
    jobs = {"0-a": State(state="running", job_id="worker-0"), "1-b": State(state="submitted", job_id="worker-0")}
    where = LocalBackend({})
    with heartbeats(own):
        assert [seen.state for seen in where.poll(tmp_path, jobs).values()] == ["running", "pending"]
        with pytest.raises(
            ConfigError, match=r"in another container .* cannot be signalled from here. Cancel the sweep there"
        ):
            where.cancel(tmp_path, jobs)
    seen = where.poll(tmp_path, jobs)
    assert {(one.state, one.cause) for one in seen.values()} == {("failed", "the worker that ran it is gone")}
    where.cancel(tmp_path, jobs)
    write_json(own, asdict(replace(Holder.this_process(), host="another-host")))
    assert where.poll(tmp_path, jobs)["0-a"].cause == "it was started on another-host; ask there"


@pytest.mark.parametrize(
    ("of_process", "files"),
    [
        ("0::/job", {"job/cpu.max": "100000 100000", "cpu.max": "max 100000", "job/memory.max": str(2 << 30)}),
        ("0::/job/step", {"job/cpu.max": "150000 100000", "memory.max": str(2 << 30)}),  # of groups above
        (
            "4:memory:/job\n1:cpu,cpuacct:/job",
            {
                **{"cpu,cpuacct/job/cpu.cfs_quota_us": "50000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
                "memory/job/memory.limit_in_bytes": str(2 << 30),
            },
        ),
    ],
)
def test_a_machine_has_what_its_control_groups_allow(tmp_path: Path, of_process: str, files: dict[str, str]) -> None:
    found = {"proc/self/cgroup": of_process} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name in [name for name in found if name.endswith(("memory.max", "memory.limit_in_bytes"))]:
        place = name.rpartition("/")[0]
        found |= {f"{place}/{n}": "0" for n in ("memory.current", "memory.usage_in_bytes")} | {
            f"{place}/memory.stat": "anon 0"
        }
    for name, text in found.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    here = Machine.here(tmp_path)
    assert (here.cores, here.mem_gb) == (1, 2.0)
    assert here.room_for(Resources(mem_gb=8)) == 0
    assert here.room_for(Resources(mem_gb=1)) == 1


def test_a_machine_without_limits_has_all_there_is(tmp_path: Path) -> None:
    assert Machine.here(tmp_path).cores == len(os.sched_getaffinity(0))
    assert Machine.here(tmp_path).mem_gb == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
