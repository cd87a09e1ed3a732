"""Jobs that share their first updates: the tree that is planned, and jobs that come out as if each had trained alone."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from apt_launch.config.load import parse
from apt_launch.lease import read_holder
from apt_launch.planning import gather
from apt_launch.runs.train import train
from apt_launch.sweep.control.send import prepare
from apt_launch.sweep.jobs.state import transition
from apt_launch.sweep.jobs.trunk import needed
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.plan.tree import longest_path, outline, saving, tree_lines
from apt_launch.values import from_yaml, read_frozen, to_yaml
from apt_model.errors import ConfigError
from tests.conftest import SMALL, until
from tests.forks import Fork, environment, run_module
from tests.hold import Hold
from tests.reliability.test_kills import compared, equal

ENDS = ("schedule.route_temp.end=0.6,0.8", "schedule.align_weight.end=0.1,0.3")
"""24 updates: experts from update 8 on, alignment from 12."""

KILLS = int(os.environ.get("APT_KILLS", "0"))
"""Kills of jobs that share updates, at random times: ``make soak``; see tests/reliability/test_kills.py."""


@pytest.fixture
def base(text_file: Path) -> Iterator[list[str]]:
    yield [*SMALL, "launch.cpus=1", "data=text", f"data.path={text_file}"]
    GlobalHydra.instance().clear()


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Path]:
    """Where the sweep under test goes; whatever of it is left at the end is cancelled."""
    yield tmp_path / "sweep"
    if (tmp_path / "hold").exists():
        (tmp_path / "hold" / "go").touch()
    if (tmp_path / "sweep" / "plan.yaml").exists() and not {"done"} >= set(states(tmp_path / "sweep")):
        after(tmp_path / "sweep", "cancel")


def after(sweep: Path, *command: str) -> subprocess.CompletedProcess[str]:
    name, *rest = command
    return run_module("apt_launch.sweep", name, str(sweep), *rest, cwd=sweep.parent)


def states(sweep: Path) -> list[str]:
    return [json.loads(line)["state"] for line in after(sweep, "status", "--json").stdout.splitlines()]


def folder(sweep: Path, number: int) -> Path:
    return next(sweep.glob(f"{number}-*"))


def shared(sweep: Path) -> list[int]:
    return [json.loads(path.read_text())["update"] for path in sorted(sweep.glob("*/graft.json"))]


def assert_as_if_alone(sweep: Path, numbers: list[int], tmp_path: Path) -> None:
    """Assert that each job has the weights, state and rows of the same config trained alone."""
    for number in numbers:
        job = folder(sweep, number)
        alone = tmp_path / "alone" / job.name
        train(parse(read_frozen(job / "config.yaml")), alone, own_process=False)
        assert equal(compared(job), compared(alone)), job.name
        summaries = [json.loads((one / "summary.json").read_text()) for one in (job, alone)]
        assert summaries[0].keys() == summaries[1].keys()


# --- the tree -----------------------------------------------------------------------------------------------------------


def test_each_job_begins_where_it_begins_to_differ(base: list[str]) -> None:
    plan = gather([*base, *ENDS, "launch.share=true"])
    assert [(job.fork.job if job.fork else None, job.begins) for job in plan.jobs] == [
        (None, 0),
        (plan.jobs[0].folder, 12),
        (plan.jobs[0].folder, 8),
        (plan.jobs[2].folder, 12),
    ]
    assert saving(plan) == "4 jobs, 96 updates asked, 64 trained: 33 % less"
    assert longest_path(plan) == dict(zip([job.folder for job in plan.jobs], [24, 12, 16, 12], strict=True))
    assert [line.split("  schedule.")[0] for line in tree_lines(plan)] == [
        "job 0, to 24",
        "  ├ from 8: job 2",
        "  │ └ from 12: job 3",
        "  └ from 12: job 1",
    ]


@pytest.mark.parametrize(
    ("asked", "begins"),
    [
        (["launch.share=auto"], [0, 0, 0, 0]),  # 12 updates are not worth it
        (["launch.share=false"], [0, 0, 0, 0]),
        (["trainer.max_batches_per_epoch=16"], [0, 48, 32, 48]),
        (["trainer.max_batches_per_epoch=15"], [0, 45, 0, 45]),  # 30 updates are not
        (["launch.share=true", "launch.cpus=2,1"], [0, 0, 12, 12, 8, 8, 12, 12]),  # other cores, other last digits
        (["launch.share=true", "trainer=lightning"], [0, 0, 0, 0]),  # which cannot continue
        (["launch.share=true", "hydra/launcher=slurm", "+hydra.launcher.pack=2", "launch.gpus=0"], [0, 0, 0, 0]),
    ],
)
def test_what_is_worth_it_is_shared(base: list[str], asked: list[str], begins: list[int]) -> None:
    if "trainer=lightning" in asked:
        pytest.importorskip("lightning")
    given = [one for one in base if not any(one.startswith(f"{new.split('=')[0]}=") for new in asked)]
    plan = gather([*given, *ENDS, *asked])
    assert sorted(job.begins for job in plan.jobs) == sorted(begins)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("trainer=lightning", "trainer=lightning cannot go on from a checkpoint"),
        ("trainer=hf", "trainer=hf cannot go on from a checkpoint"),
        ("launch.cpus=1,2", "no job has first updates in common with an earlier one"),
        ("trainer.batch_size=2", None),
    ],
)
def test_a_plan_says_why_nothing_is_shared(base: list[str], asked: str, why: str | None) -> None:
    for package in {"trainer=lightning": ["lightning"], "trainer=hf": ["transformers", "accelerate"]}.get(asked, []):
        pytest.importorskip(package)
    varied = [] if "," in asked or why is None else ["schedule.route_temp.end=0.6,0.8"]
    given = [one for one in base if not one.startswith(f"{asked.split('=')[0]}=")]
    plan = gather([*given, asked, *varied, f"launch.share={'auto' if why is None else 'true'}"])
    expected = [f"launch.share=true: each job trains all of its updates: {why}"] if why is not None else []
    assert list(outline(plan)) == expected


def test_kept_sweeps_save_what_was_reckoned() -> None:
    found = {}
    for name in ("all_anneals", "route_temp", "align_weight", "vote_threshold", "moe_capacity"):
        found[name] = saving(gather([f"+sweeps={name}"])).split(": ")[-1]
    GlobalHydra.instance().clear()
    assert found == {
        "all_anneals": "45 % less",
        "route_temp": "17 % less",
        "align_weight": "25 % less",
        "vote_threshold": "42 % less",
        "moe_capacity": "19 % less",
    }


def test_a_job_whose_record_has_the_rows_that_another_needs_goes_first(base: list[str]) -> None:
    """The weight of alignment moves from update 1 on, with a row each: only the curriculum's record has them."""
    plan = gather([*base, "+sweeps/study=without_align,curriculum", "launch.share=true"])
    assert [(job.number, job.begins) for job in plan.jobs] == [(0, 12), (1, 0)]  # alignment is enabled at update 12
    assert plan.jobs[0].fork is not None
    assert plan.jobs[0].fork.job == plan.jobs[1].folder
    assert longest_path(plan) == {plan.jobs[0].folder: 12, plan.jobs[1].folder: 24}
    assert list(tree_lines(plan)) == [
        "job 1, to 24  +sweeps/study=curriculum",
        "  └ from 12: job 0  +sweeps/study=without_align",
    ]


def test_a_plan_keeps_its_tree_and_refuses_one_that_means_nothing(base: list[str], tmp_path: Path) -> None:
    plan = gather([*base, *ENDS, "launch.share=true"])
    plan.write(tmp_path)
    assert [job.fork for job in Plan.read(tmp_path).jobs] == [job.fork for job in plan.jobs]
    content = from_yaml((tmp_path / "plan.yaml").read_text())
    for number, change in (
        (2, {"job": plan.jobs[3].folder}),  # which begins with what it is to begin with
        (1, {"job": "9-abc"}),
        (1, {"job": "../elsewhere"}),
        (1, {"update": 0}),
        (1, {"update": 25}),
        (3, {"update": 8}),  # where that job itself begins
        (1, {"more": 1}),
    ):
        kept = json.loads(json.dumps(content))
        kept["jobs"][number]["fork"] |= change
        (tmp_path / "plan.yaml").write_text(to_yaml(kept))
        with pytest.raises(ConfigError, match=r"plan\.yaml: .*Restore it from a copy"):
            Plan.read(tmp_path)


def test_nobody_keeps_anything_for_a_job_that_is_sent_without_its_trunk(base: list[str], tmp_path: Path) -> None:
    plan = gather([*base, ENDS[0], "launch.share=true"])
    plan.write(tmp_path)
    prepare(plan, tmp_path, plan.jobs)
    assert not shared(tmp_path)
    transition(folder(tmp_path, 0), "dropped")
    prepare(plan, tmp_path, plan.jobs[1:])
    assert shared(tmp_path) == [0]
    assert not needed(tmp_path, plan.awaited(plan.jobs[0]))


def test_a_dry_run_shows_the_tree(base: list[str], sweep: Path) -> None:
    options = [f"hydra.sweep.dir={sweep}", "launch.share=true"]
    done = run_module("apt_launch", "--multirun", "--dry-run", *base, *ENDS, *options, cwd=sweep.parent)
    assert "4 jobs, 96 updates asked, 64 trained: 33 % less" in done.stdout
    assert "from 12: job 3  schedule.route_temp.end=0.8 schedule.align_weight.end=0.3" in done.stdout
    assert not sweep.exists()


# --- jobs ---------------------------------------------------------------------------------------------------------------


def started(base: list[str], sweep: Path, *arguments: str, **more: Any) -> Fork:
    command = ["apt_launch", "--multirun", *base, f"hydra.sweep.dir={sweep}", "launch.share=true", *arguments]
    return Fork(command, cwd=sweep.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)


def test_a_killed_trunk_is_trained_again_and_every_job_comes_out_as_if_alone(
    base: list[str], sweep: Path, tmp_path: Path
) -> None:
    hold = Hold(tmp_path / "hold", at=11, deaf=True)  # job 0 after update 8, and before update 12
    process = started(base, sweep, "+sweeps=all_anneals", *ENDS, *ONE_END, env=environment(**hold.environment))
    until(lambda: [*sweep.glob("2-*/graft.json")], "job 2 to begin")
    trunk = read_holder(folder(sweep, 0) / "lease.json")
    assert trunk is not None
    until(lambda: trunk.pid in hold.holding(), "job 0 to hold")
    os.kill(trunk.pid, signal.SIGKILL)
    until(lambda: states(sweep)[1] == "planned", "job 1 to be planned again")
    hold.let_go()
    output, _ = process.communicate()
    assert process.wait() == 1
    assert "job 0, whose first 12 updates it shares, failed before it had made them" in output
    assert states(sweep) == ["failed", "planned", "done", "done"]
    assert shared(sweep) == [8, 12]
    resumed = after(sweep, "resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert states(sweep) == ["done"] * 4
    assert shared(sweep) == [12, 8, 12]
    assert_as_if_alone(sweep, [0, 1, 2, 3], tmp_path)
    assert not [
        *sweep.glob("*/checkpoints/step-00000008"),
        *sweep.glob("*/checkpoints/step-00000012"),
    ]  # needed no more


ONE_END = ("schedule.moe_capacity.end=1.25", "schedule.vote_threshold.end=2.0")


def test_a_sweep_grows_from_what_its_jobs_have_kept_and_so_does_another(
    base: list[str], sweep: Path, tmp_path: Path
) -> None:
    process = started(base, sweep, ENDS[0], "launch.keep_forks=true")
    process.communicate()
    assert [json.loads(path.read_text())["update"] for path in sweep.glob("*/graft.json")] == [8]
    kept = {int(path.name[5:]) for path in folder(sweep, 0).glob("checkpoints/step-*")}
    assert kept == {8, 12, 20, 24}  # where modules are enabled; one that was needed
    shown = after(sweep, "extend", "schedule.route_temp.end=0.6,0.9", "--dry-run")
    assert "job 2 from 8 of " in shown.stdout, shown.stdout + shown.stderr
    shown = after(sweep, "extend", "schedule.route_temp.end=0.8", "schedule.align_weight.end=0.2", "--dry-run")
    assert f"job 2 from 12 of {folder(sweep, 1).name}" in shown.stdout, shown.stdout + shown.stderr
    assert len(list(sweep.glob("[0-9]-*"))) == 2
    extended = after(sweep, "extend", "schedule.route_temp.end=0.6,0.9")
    assert "1 jobs more, 1 of those asked for are there already" in extended.stdout, extended.stdout + extended.stderr
    assert states(sweep) == ["done"] * 3
    assert shared(sweep) == [8, 8]
    assert "Nothing to send" in after(sweep, "extend", "schedule.route_temp.end=0.8,0.9").stdout
    (folder(sweep, 2) / "graft.json").unlink()  # as if it had been killed when it had just taken them over
    (folder(sweep, 2) / "state.json").write_text('{"state": "cancelled"}')
    assert after(sweep, "resume", "2").returncode == 0
    assert shared(sweep) == [8, 8]
    after(sweep, "report")
    lines = {line["job"]: line for line in csv.DictReader((sweep / "report" / "report.csv").read_text().splitlines())}
    assert {number: line["shared"] for number, line in lines.items()} == {"0": "", "1": "8 of 0", "2": "8 of 0"}

    other = tmp_path / "other"
    started(base, other, "schedule.route_temp.end=0.6", ENDS[1], f"launch.reuse={sweep}").communicate()
    assert [job.fork and (job.fork.job, job.fork.sweep, job.begins) for job in Plan.read(other).jobs] == [
        (folder(sweep, 0).name, str(sweep), 12),
        (folder(sweep, 0).name, str(sweep), 24),
    ]
    assert states(other) == ["done"] * 2
    cores = [one for one in base if not one.startswith("launch.cpus=")]  # of another number: other last digits
    for share, why in (
        ("true", "no job has first updates in common with one that has kept them"),
        ("auto", "it would save less than 32 updates or 5 %; launch.share=true takes any"),
        ("false", "launch.share=false"),
    ):
        plan = gather([*cores, "launch.cpus=2", f"launch.reuse={sweep}", f"launch.share={share}"])
        assert plan.jobs[0].fork is None
        assert next(outline(plan)) == f"launch.reuse={sweep}: no job begins with what is kept there: {why}"
    assert_as_if_alone(sweep, [2], tmp_path)
    assert_as_if_alone(other, [0, 1], tmp_path)
    records = [folder(place, number) / "metrics.jsonl" for place, number in ((sweep, 0), (sweep, 2), (other, 1))]
    assert ['"$version"' in line for path in records for line in path.read_text().splitlines()[:2]] == [True, False] * 3


if KILLS:  # make soak

    def test_jobs_that_are_killed_at_random_come_out_as_if_alone(base: list[str], sweep: Path, tmp_path: Path) -> None:
        chance = random.Random(0)
        process = started(base, sweep, *ENDS, "trainer.max_batches_per_epoch=20")
        for _ in range(KILLS):
            running = [holder for path in sweep.glob("*/lease.json") if (holder := read_holder(path)) and holder.alive]
            if running:
                os.kill(chance.choice(running).pid, signal.SIGKILL)
            try:
                process.wait(chance.uniform(0.1, 3))
            except subprocess.TimeoutExpired:
                continue
            process.communicate()
            if set(states(sweep)) == {"done"}:
                break
            process = Fork(["apt_launch.sweep", "resume", str(sweep)], cwd=tmp_path, stdout=subprocess.PIPE)
        process.communicate()
        after(sweep, "resume")
        assert_as_if_alone(sweep, [0, 1, 2, 3], tmp_path)
