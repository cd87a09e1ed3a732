from __future__ import annotations

import html.parser
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apt_launch.config.catalogue import metrics, parameters, targets
from apt_launch.config.run_config import RunConfig
from apt_launch.planning import gather
from apt_launch.preview.page import page
from apt_launch.preview.terminal import config_of, unread_sweeps
from apt_model.errors import ConfigError
from apt_model.schedule.timeline import timeline
from tests.forks import HANGS, environment

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_timeline_shows_every_moment_in_every_unit(composed: Callable[..., RunConfig]) -> None:
    moments = timeline(composed("schedule=gpt5_moe").program)
    told = [(m.clock.step, m.clock.epoch, m.clock.sample, m.clock.token, m.what) for m in moments]
    assert told == [
        (0, 0, 0, 0, ("begin",)),
        (26, 0, 416, 106496, ("align_weight leaves 0",)),
        (64, 2, 1024, 262144, ("moe enabled",)),
        (96, 3, 1536, 393216, ("align enabled",)),
        (160, 5, 2560, 655360, ("voter enabled",)),
        (255, 7, 4080, 1044480, ("last update",)),
    ]
    assert moments[-1].values == {"route_temp": 0.8, "moe_capacity": 1.1, "align_weight": 0.3, "vote_threshold": 2.0}
    assert moments[2].values["route_temp"] == pytest.approx(1.5 - 0.7 * 2 / 7)


def test_what_is_shown_is_what_training_logs(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    from apt_launch.record import read_rows
    from tests.conftest import SMALL

    overrides = [*SMALL, "data=text", f"data.path={text_file}", "schedule.route_temp.type=cosine"]
    assert cli(*overrides, "hydra.run.dir=run").returncode == 0
    program = config_of(gather(overrides).jobs[0]).program
    for row in read_rows(tmp_path / "run" / "metrics.jsonl"):
        planned = program.at(program.horizon.clock_at(int(row["step"])))
        logged = {name.removeprefix("schedule/"): v for name, v in row.items() if name.startswith("schedule/")}
        assert logged == {name: float(value) for name, value in planned.items()}


def test_the_command_prints_and_draws_without_torch(cli: Cli, tmp_path: Path) -> None:
    result = cli("schedule=gpt5_moe", module="apt_launch.preview")
    assert result.returncode == 0, result.stderr
    for shown in ("64", "moe enabled", "voter enabled", "route_temp", "█", "vote", "outputs/preview/preview.png"):
        assert shown in result.stdout
    folder = tmp_path / "outputs" / "preview"
    assert (folder / "preview.png").read_bytes().startswith(b"\x89PNG")
    code = (
        "import sys; sys.argv[1:] = ['schedule.route_temp.end=0.6,0.8']\n"
        "from apt_launch.preview.__main__ import main; main(); print('torch' in sys.modules)"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANGS
    )
    assert fresh.stdout.splitlines()[-1] == "False"


def test_several_values_are_expanded_and_duplicates_reported(cli: Cli) -> None:
    plan = gather(["seed=1,1", "schedule.route_temp.end=0.6,0.60,0.8"])
    asked, jobs = plan.asked, plan.jobs
    assert asked == 6
    assert [job.label for job in jobs] == ["seed=1 schedule.route_temp.end=0.6", "seed=1 schedule.route_temp.end=0.8"]
    result = cli("seed=1,1", "schedule.route_temp.end=0.6,0.60,0.8", "--multirun", module="apt_launch.preview")
    assert "6 asked, 2 unique" in result.stdout


def test_a_bad_job_is_named(cli: Cli, tmp_path: Path) -> None:
    result = cli("schedule.route_temp.end=0.6,0", module="apt_launch.preview")
    assert result.returncode == 2
    assert "job 1 (schedule.route_temp.end=0): schedule.route_temp.end = 0 is outside its domain" in result.stderr
    for arguments, message in (
        (["--size"], "--size: unknown option"),
        (["schedule.rout_temp.end=1"], "Did you mean 'schedule.route_temp.end'"),
    ):
        result = cli(*arguments, module="apt_launch.preview")
        assert (result.returncode, message in result.stderr, "Traceback" in result.stderr) == (2, True, False)
    assert list(tmp_path.iterdir()) == []


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]


def test_the_page_needs_nothing_from_outside(composed: Callable[..., RunConfig]) -> None:
    programs = {f"end={end}": composed(f"schedule.route_temp.end={end}").program for end in (0.6, 0.8)}
    text = page(programs)
    reader = Reader()
    reader.feed(text)
    assert reader.links == []
    assert "url(" not in text
    assert reader.tags.count("svg") == 5
    assert reader.tags.count("table") == 2
    assert reader.tags.count("path") == 8
    assert "end=0.6" in text


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["schedule.route_temp.end=1.5"], "schedule.route_temp never changes: it is 1.5 over the whole run"),
        (
            ["schedule.moe_capacity.end=0.8"],
            "schedule.moe_capacity has the values of schedule.route_temp over the whole run",
        ),
        (
            ["schedule.enable_voter_at_epoch=null"],
            "schedule.vote_threshold anneals what nothing reads: voter is never enabled",
        ),
        (
            ["+schedule.events.off={disable: moe, at: 1ep}", "schedule.enable_moe_at_epoch=null"],
            "schedule.events.off disables moe, which nothing enables",
        ),
        (
            [
                "schedule.enable_voter_at_epoch=null",
                "+schedule.events.v={enable: voter, when: {metric: voter/entropy, above: 2, deadline: 99ep}}",
            ],
            "the deadline of voter's latch is after the run's end",
        ),
    ],
)
def test_what_is_hardly_meant_is_noted(composed: Callable[..., RunConfig], overrides: list[str], note: str) -> None:
    assert any(note in told for told in composed(*overrides).program.notes())


def test_the_curriculum_as_it_comes_has_nothing_to_note(composed: Callable[..., RunConfig]) -> None:
    assert composed("schedule=gpt5_moe").program.notes() == []


def test_a_swept_key_that_nothing_reads_is_noted() -> None:
    off = "schedule.enable_voter_at_epoch=null"
    unread = gather([off, "schedule.vote_threshold.end=1.0,2.0"]).jobs
    assert unread_sweeps(unread) == [
        "schedule.vote_threshold.end is swept, but nothing reads it: all its values give the same run."
    ]
    read = gather(["schedule.vote_threshold.end=1.0,2.0"]).jobs
    assert unread_sweeps(read) == []


def test_the_catalogue_is_what_the_model_has(small: Callable[..., RunConfig]) -> None:
    from apt_launch.runs.build import build_trainer
    from apt_model.layers import scheduled
    from apt_model.schedule.targets import OF_OPTIMIZER

    config = small(
        "schedule.enable_voter_at_epoch=1", "schedule.enable_align_at_epoch=0", "schedule.enable_moe_at_epoch=1"
    )
    trainer = build_trainer(config, log=lambda row: rows.append(row))
    rows: list[dict[str, float]] = []
    assert targets(config.values) == {**scheduled.targets(trainer.model), **OF_OPTIMIZER}
    trainer.fit()
    with_parameters = {
        name for name, module in trainer.model.named_modules() if name and any(True for _ in module.parameters())
    }
    assert set(parameters(config.values)) <= with_parameters
    logged = {name for row in rows for name in row if not name.startswith("schedule/")}
    assert logged - {"step", "epoch", "tokens", "time", "tokens_per_second"} == metrics(config.values)


def test_a_name_that_means_nothing_is_refused_before_the_run(composed: Callable[..., RunConfig]) -> None:
    for override, message in (
        (
            "+schedule.anneals.d={target: blocks.*.atention.dropout, start: 0, end: 0.1}",
            r"schedule\.anneals\.d\.target: nothing is called .* Did you mean 'blocks\.",
        ),
        (
            "+schedule.anneals.d={target: blocks.*.ffn.dropout, start: 0, end: 1.0}",
            r"schedule\.anneals\.d\.end = 1 is outside its domain: it must be at least 0 and less than 1",
        ),
        (
            "+schedule.anneals.t={target: blocks.1.ffn.temperature, start: 1, end: 2}",
            r"blocks\.1\.ffn\.temperature is written by schedule\.route_temp already",
        ),
        (
            "+schedule.anneals.lr={target: optimizer.lr, start: 1, end: 2}",
            r"optimizer\.lr is written by trainer\.lr_schedule already\. Set trainer\.lr_schedule=null",
        ),
        (
            "+schedule.events.f={freeze: blocks.*.atention, at: 1ep}",
            r"schedule\.events\.f: no parameters are called 'blocks\.\*\.atention'",
        ),
        (
            "+schedule.events.f={unfreeze: blocks.1, at: 3ep}",
            r"schedule\.events\.f: nothing freezes blocks\.1 before step ",
        ),
        (
            "+schedule.anneals.moe_enabled={target: label_smoothing, start: 0.1, end: 0.2}",
            r"schedule\.anneals\.moe_enabled: names that end in _enabled are those of switches",
        ),
        (
            "+schedule.events.f={enable: mo, at: 1ep}",
            r"schedule\.events\.f: there is no module 'mo'\. Did you mean 'moe'",
        ),
        (
            "+schedule.events.f={freeze: embedding, when: {metric: train/los, below: 2}}",
            r"there is no metric 'train/los'\. Did you mean 'train/loss'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            composed(override)
