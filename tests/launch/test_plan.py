"""A sweep's plan: what is asked for, what differs, what is frozen."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from apt_launch.config.load import composed
from apt_launch.planning import gather
from apt_launch.sweep.plan.expand import _as_override
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError
from tests.conftest import SMALL
from tests.forks import HANGS


@pytest.fixture
def base(text_file: Path) -> Iterator[list[str]]:
    """Overrides of a very small run."""
    yield [*SMALL, "data=text", f"data.path={text_file}"]
    GlobalHydra.instance().clear()


def labels(plan: Plan) -> list[str]:
    return [job.label for job in plan.jobs]


def test_equal_configs_are_one_job_whatever_they_are_called(base: list[str]) -> None:
    plan = gather([*base, "seed=1,1", "schedule.route_temp.end=0.6,0.60"])
    assert plan.summary == "4 asked, 1 unique"
    assert labels(plan) == ["seed=1 schedule.route_temp.end=0.6"]


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("seed=3,1", ["seed=3", "seed=1"]),
        ("seed=choice(3,1)", ["seed=3", "seed=1"]),
        ("seed=range(0,6,2)", ["seed=0", "seed=2", "seed=4"]),
        ("seed=shuffle(range(2,3))", ["seed=2"]),
        ("optimizer.lr=sort(0.1,0.01)", ["optimizer.lr=0.01", "optimizer.lr=0.1"]),
        ("schedule=glob(*)", ["schedule=experts", "schedule=gpt5_moe", "schedule=none"]),
        ("schedule=none,gpt5_moe", ["schedule=none", "schedule=gpt5_moe"]),
        ("moe.num_experts=4,8", ["moe.num_experts=4", "moe.num_experts=8"]),
    ],
)
def test_the_whole_sweep_grammar_is_expanded(base: list[str], override: str, wanted: list[str]) -> None:
    chosen = [o for o in base if o.split("=")[0] != override.split("=")[0]]
    plan = gather([*chosen, override])
    assert labels(plan) == wanted
    assert len({job.identity for job in plan.jobs}) == len(plan.jobs)


def test_options_of_a_folder_that_is_searched_are_planned(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "more" / "schedule").mkdir(parents=True)
    (tmp_path / "more" / "schedule" / "mine.yaml").write_text("defaults: [none]\n")
    plan = gather([*base, f"hydra.searchpath=['file://{tmp_path}/more']", "schedule=mine,experts"])
    assert labels(plan) == ["schedule=mine", "schedule=experts"]


def test_lists_that_are_zipped_advance_together(base: list[str]) -> None:
    together = "hydra.sweeper.zip=[[schedule.route_temp.start,schedule.route_temp.end]]"
    plan = gather(
        [*base, together, "schedule.route_temp.start=1.5,1.2,1.0", "schedule.route_temp.end=0.8,0.7,0.6", "seed=0,1"]
    )
    pairs = [(job.differs["schedule.route_temp.start"], job.differs["schedule.route_temp.end"]) for job in plan.jobs]
    assert len(pairs) == 6
    assert set(pairs) == {(1.5, 0.8), (1.2, 0.7), (1.0, 0.6)}


def test_lists_of_unequal_lengths_and_unknown_names_cannot_be_zipped(base: list[str]) -> None:
    together = "hydra.sweeper.zip=[[seed,optimizer.lr]]"
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.zip: .*seed has 3, optimizer\.lr has 2"):
        gather([*base, together, "seed=1,2,3", "optimizer.lr=0.1,0.2"])
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.zip: optimizer\.lr is not among"):
        gather([*base, together, "seed=1,2,3"])


@pytest.mark.parametrize(
    ("together", "told"),
    [
        ("[seed,optimizer.lr]", r"\['seed', 'optimizer.lr'\] is no list of lists .* Write it as \[\[lr,seed\]\]"),
        ("[[]]", r"\[\[\]\] is no list of lists with keys"),
        ("[[seed,optimizer.lr],[seed]]", "seed stands there twice"),
        ("[[seed,seed]]", "seed stands there twice"),
        ("[[1]]", "1 is not among what is swept"),
    ],
)
def test_what_cannot_be_zipped_is_refused(base: list[str], together: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"hydra\.sweeper\.zip: {told}"):
        gather([*base, f"hydra.sweeper.zip={together}", "seed=1,2", "optimizer.lr=0.1,0.2"])


@pytest.mark.parametrize(
    ("kept", "written"),
    [
        ([1, None, True, "a"], "1,null,True,a"),
        (["c,d", "", "{", "a b", "range(1,3)", "it's"], '"c,d","","{",a b,"range(1,3)","it\'s"'),
        ([[1, "a,b"], {"k": "v", "m": [2]}], '[1,"a,b"],{k:v,m:[2]}'),
        ("range(1,3)", "range(1,3)"),
        (None, "null"),
    ],
)
def test_the_values_of_a_kept_sweep_are_as_many_choices_as_members(kept: object, written: str) -> None:
    assert _as_override(kept) == written
    if isinstance(kept, list):
        parsed = OverridesParser.create().parse_override(f"x={written}")
        assert len(list(parsed.sweep_string_iterator())) == len(kept)


@pytest.mark.parametrize("override", ["seed=range(3,3)", "schedule=glob(zz*)"])
def test_what_stands_for_no_value_is_refused(base: list[str], override: str) -> None:
    name, _, values = override.partition("=")
    with pytest.raises(ConfigError, match=rf"^{name}: {re.escape(values)} stands for no value"):
        gather([*[o for o in base if not o.startswith(f"{name}=")], override])


def test_a_kept_sweep_gives_values_and_the_command_line_wins(base: list[str]) -> None:
    kept = gather([*base, "+sweeps=route_temp"])
    assert [job.differs["schedule.route_temp.end"] for job in kept.jobs] == [0.6, 0.8, 1.0]
    narrowed = gather([*base, "+sweeps=route_temp", "schedule.route_temp.end=0.5,0.9"])
    assert [job.differs["schedule.route_temp.end"] for job in narrowed.jobs] == [0.5, 0.9]


def test_a_folder_of_ones_own_adds_options_and_groups(base: list[str], tmp_path: Path) -> None:
    for path, text in {
        "schedule/mine.yaml": "defaults: [none]\nenable_moe_at_epoch: 2\n",
        "job/short.yaml": "# @package _global_\nlaunch:\n  hours: 2\n",
        "hydra/launcher/night.yaml": "defaults: [local]\nmax_parallel: 3\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    plan = gather([*base, "hydra/launcher=night", "+job=short", "schedule=mine,none"], tmp_path)
    assert [plan.values(job)["schedule"]["enable_moe_at_epoch"] for job in plan.jobs] == [2, None]
    assert [job.resources.hours for job in plan.jobs] == [2, 2]
    assert (plan.launcher, plan.launcher_values["max_parallel"]) == ("local", 3)
    with pytest.raises(ConfigError, match=r"--config-dir: there is no folder '\S+nowhere'"):
        gather(base, tmp_path / "nowhere")
    GlobalHydra.instance().clear()
    with pytest.raises(Exception, match="Could not find 'schedule/mine'"):
        gather([*base, "schedule=mine"])


@pytest.mark.parametrize(
    "varying",
    [
        ["schedule.route_temp.end=0.6", "seed=3"],
        ["schedule=none", "trainer.max_epochs=3"],
        ["schedule.moe_capacity=null"],
        ["schedule.moe_capacity={start:1.2,end:1.1,by:epoch}"],
        ["~schedule.route_temp.warmup"],
        ["optimizer.betas=[0.8,0.9]"],
    ],
)
def test_a_planned_job_has_the_config_that_the_command_alone_would_have(base: list[str], varying: list[str]) -> None:
    swept = [f"{o},{o.split('=', 1)[1]}" if not o.startswith("~") else o for o in varying]
    alone = composed([*base, *varying])
    plan = gather([*base, *swept])
    (job,) = plan.jobs
    assert plan.values(job) == alone.values
    assert job.identity == alone.identity


def test_one_job_leaves_nothing_behind_in_the_next(base: list[str]) -> None:
    plan = gather(
        [
            *base,
            "schedule.moe_capacity=null,{start:1.3,end:1.1,by:epoch},{start:1.4,end:1.2,by:epoch}",
            "moe.capacity_factor=1.25",
        ]
    )
    for job, own in zip(
        plan.jobs, ("null", "{start:1.3,end:1.1,by:epoch}", "{start:1.4,end:1.2,by:epoch}"), strict=True
    ):
        assert plan.values(job) == composed([*base, f"schedule.moe_capacity={own}", "moe.capacity_factor=1.25"]).values


def test_a_plan_reads_back_as_it_was_written(base: list[str], tmp_path: Path) -> None:
    plan = gather([*base, "schedule=none,gpt5_moe", "seed=0,1", "launch.gpus=0"])
    plan.write(tmp_path)
    again = Plan.read(tmp_path)
    assert again == plan
    assert [again.values(job) for job in again.jobs] == [job.config.values for job in plan.jobs if job.config]
    assert OmegaConf.load(tmp_path / "plan.yaml").asked == 4


def test_a_bad_job_is_named_and_what_all_have_is_reported_once(base: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        gather([*base, "schedule.route_temp.end=0.6,0,hot", "optimizer.lr=-1"])
    told = found.value.problems
    assert sum("optimizer.lr" in problem for problem in told) == 1
    assert any(
        problem.startswith("job 2 (schedule.route_temp.end=hot): schedule.route_temp.end: 'hot'") for problem in told
    )


def test_an_interval_needs_a_sweeper_that_chooses(base: list[str]) -> None:
    with pytest.raises(ConfigError, match="hydra/sweeper=optuna"):
        gather([*base, "schedule.route_temp.end=interval(0.5,1.0)"])


def test_jobs_differ_in_resources_and_their_cost_is_limited(base: list[str]) -> None:
    plan = gather([*base, "launch.gpus=1,4", "launch.hours=2"])
    assert [job.resources.gpus for job in plan.jobs] == [1, 4]
    assert len({job.identity for job in plan.jobs}) == 1
    assert plan.gpu_hours == 1 * 2 + 4 * 2
    gather([*base, "launch.gpus=1,4", "launch.hours=2", "launch.max_gpu_hours=10"])
    with pytest.raises(ConfigError, match=r"launch\.max_gpu_hours: 2 jobs could take 10 GPU-hours .* more than 9\.5"):
        gather([*base, "launch.gpus=1,4", "launch.hours=2", "launch.max_gpu_hours=9.5"])


def test_a_batch_that_ranks_cannot_share_is_refused(base: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.batch_size = 2 cannot be shared by 4 ranks"):
        gather([*base, "launch.nodes=2", "launch.tasks_per_node=2"])


def test_planning_loads_no_torch(text_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from apt_launch.planning import gather; import apt_launch.sweep.control.send; "
        "import apt_launch.sweep.backends.slurm, apt_launch.sweep.__main__; "
        f"gather({[*SMALL, 'data=text', f'data.path={text_file}', 'seed=0,1']!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS, cwd=tmp_path)
