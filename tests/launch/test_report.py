"""A sweep's report: numbers worked out by hand, and a real browser that looks at the page."""

from __future__ import annotations

import csv
import json
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from apt_launch.config.load import composed
from apt_launch.planning import gather
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.report.findings import Estimate, Source, find, headline, t_95
from apt_launch.sweep.report.report import group_table, note_on_groups, write_report
from apt_model.errors import ConfigError
from tests.browser import QUIET, chromium
from tests.conftest import SMALL
from tests.forks import HANGS

Sweep = Callable[..., tuple[Path, Plan]]


@pytest.fixture
def planned(text_file: Path, tmp_path: Path) -> Iterator[Sweep]:
    """Plan a sweep, and write the record that its jobs would have: (tokens, validation loss) of each."""

    def planned(overrides: list[str], records: list[list[tuple[int, float]]]) -> tuple[Path, Plan]:
        folder = tmp_path / "sweep"
        folder.mkdir()
        plan = gather([*SMALL, "data=text", f"data.path={text_file}", *overrides])
        plan.write(folder)
        for job, record in zip(plan.jobs, records, strict=True):
            (folder / job.folder).mkdir()
            rows = []
            for place, (tokens, loss) in enumerate(record):
                when = {"step": place, "epoch": place, "tokens": tokens, "time": 1.0 + place}
                more = {
                    "tokens_per_second": 100.0,
                    "schedule/route_temp": 1.5 - place / 10,
                    "schedule/moe_enabled": int(place > 0),
                }
                rows += [when | {"train/loss": loss + 0.5} | more, when | {"val/loss": loss}]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / job.folder / "metrics.jsonl").write_text(text + ('{"step": 9, "tok' if rows else ""))
        return folder, plan

    yield planned
    GlobalHydra.instance().clear()


def states(plan: Plan, *names: str) -> dict[str, str]:
    return {job.folder: name for job, name in zip(plan.jobs, names, strict=True)}


SIX = ["schedule.route_temp.end=0.6,0.8", "seed=0,1,2"]
ENDS = [[(100, 4.0), (200, value)] for value in (2.0, 2.2, 2.7, 3.0, 3.1, 3.2)]


def test_a_lead_that_seeds_cannot_tell_from_chance_is_called_so(planned: Sweep) -> None:
    folder, plan = planned(
        ["schedule.route_temp.end=0.6,0.8", "seed=0,1"], [[(100, value)] for value in (2.0, 2.1, 2.01, 2.13)]
    )
    # ahead by 0.01 and 0.03: t is 12.706 with one degree of freedom; 2.776 x 0.014142 / sqrt(5) is the first below 0.02
    assert headline(find(folder, states(plan, *["done"] * 4))) == (
        "Best of 2 settings: route_temp.end=0.6, val/loss 2.0500 on average over 2 seeds. It leads route_temp.end=0.8 by "
        "0.02000 ± 0.12706 over 2 seeds: no difference that these seeds can show; 3 more seeds would show one of this size."
    )


def test_of_many_settings_the_best_needs_a_larger_lead(planned: Sweep) -> None:
    ends = ",".join(f"0.{digit}" for digit in range(2, 8))
    losses = [2.0 + (number // 2) * 0.02 + (0.1 if number % 2 else 0.0) for number in range(12)]
    losses[3] += 0.001  # ahead by 0.02 and 0.021
    folder, plan = planned([f"schedule.route_temp.end={ends}", "seed=0,1"], [[(100, value)] for value in losses])
    lead = find(folder, states(plan, *["done"] * 12)).lead
    assert lead is not None
    assert lead.settings == 6
    # five comparisons: t(1; 0.995) = tan(pi x 0.495) = 63.657, times 0.00070711 / sqrt(2)
    assert lead.half_interval(2) == pytest.approx(63.657 * 0.0005, rel=1e-3)


def test_the_lowest_value_wins_and_its_command_runs_that_very_job(planned: Sweep, text_file: Path) -> None:
    folder, plan = planned(SIX, ENDS)
    findings = find(folder, states(plan, *["done"] * 6))
    # ahead by 1.0, 0.9 and 0.5: 0.8 on average, and 4.303 x 0.26458 / sqrt(3)
    assert headline(findings) == (
        "Best of 2 settings: route_temp.end=0.6, val/loss 2.3000 on average over 3 seeds. It leads route_temp.end=0.8 by "
        "0.80000 ± 0.65724 over 3 seeds: more than chance gives."
    )
    assert findings.best is not None
    words = shlex.split(findings.command(findings.best))
    assert words[:3] == ["python", "-m", "apt_launch"]
    assert composed(words[3:]).identity == plan.jobs[0].identity


def test_the_command_keeps_what_a_kept_sweep_sets_for_all_jobs(planned: Sweep) -> None:
    narrowed = ["+sweeps=study", "+sweeps/study=dense,experts_only", "seed=1", "moe.num_experts=6"]
    folder, plan = planned(narrowed, [[(100, 2.0)], [(100, 3.0)]])
    findings = find(folder, states(plan, "done", "done"))
    for trial, job in zip(findings.trials, plan.jobs, strict=True):
        again = composed(shlex.split(findings.command(trial))[3:])
        assert again.identity == job.identity
        assert (again.moe.granularity, again.moe.num_experts) == (2, 6)  # of the file, and of the command line


def test_means_and_intervals_over_seeds_are_students(planned: Sweep) -> None:
    folder, plan = planned(SIX, ENDS)
    heads, rows = group_table(find(folder, states(plan, *["done"] * 6)))
    assert heads == ["route_temp.end", "seeds", "mean", "difference"]
    # mean 2.3, deviation sqrt((0.09 + 0.01 + 0.16) / 2) = 0.36056, t(2) = 4.3027: 4.3027 x 0.36056 / sqrt(3) = 0.8957
    assert rows[0] == ["0.6", "3", "2.3000 ± 0.8957", ""]
    # mean 3.1, deviation 0.1: 4.3027 x 0.1 / sqrt(3) = 0.2484
    # differences 1.0, 0.9, 0.5: mean 0.8, deviation sqrt((0.04 + 0.01 + 0.09) / 2) = 0.26458: 0.6572
    assert rows[1] == ["0.8", "3", "3.1000 ± 0.2484", "0.8000 ± 0.6572"]


def test_differences_are_taken_from_whom_the_user_names(planned: Sweep) -> None:
    folder, plan = planned(SIX, ENDS)
    done = states(plan, *["done"] * 6)
    for name in ("route_temp.end=0.8", "schedule.route_temp.end=0.80"):
        findings = find(folder, done, against=name)
        assert "how much more than route_temp.end=0.8." in note_on_groups(findings)
        assert [row[-1] for row in group_table(findings)[1]] == ["-0.8000 ± 0.6572", ""]
    with pytest.raises(ConfigError, match=r"--against: 'temp.end' is not among what was swept"):
        find(folder, done, against="temp.end=0.7")
    with pytest.raises(ConfigError, match=r"--against: no jobs .* 'route_temp.end=0.7'\. Did you mean"):
        find(folder, done, against="route_temp.end=0.7")


def test_one_of_several_swept_keys_is_compared_with_all_others_equal(planned: Sweep) -> None:
    folder, plan = planned(
        ["moe.top_k=1,2", "schedule.route_temp.end=0.6,0.8"], [[(100, value)] for value in (2.0, 2.4, 2.3, 2.8)]
    )
    findings = find(folder, states(plan, *["done"] * 4), against="moe.top_k=1")
    # of top_k=2 2.3 - 2.0 and 2.8 - 2.4: 0.35 on average, 12.706 x 0.070711 / sqrt(2)
    assert group_table(findings) == (
        ["top_k", "jobs", "mean", "difference"],
        [["1", "2", "2.2000 ± 2.5412", ""], ["2", "2", "2.5500 ± 3.1766", "0.3500 ± 0.6353"]],
    )
    assert "alike in all else" in note_on_groups(findings)


def test_a_seed_that_only_one_of_two_groups_has_is_left_out_of_their_difference(planned: Sweep) -> None:
    folder, plan = planned(SIX, [*ENDS[:3], [], *ENDS[4:]])
    _, rows = group_table(find(folder, states(plan, *["done"] * 6)))
    # 0.9 and 0.5: mean 0.7, deviation 0.28284, t(1) = 12.706: 12.706 x 0.28284 / sqrt(2) = 2.5412
    assert rows[1][1:] == ["2", "3.1500 ± 0.6353", "0.7000 ± 2.5412"]


def test_one_seed_gives_no_interval_and_says_so(planned: Sweep) -> None:
    folder, plan = planned(["schedule.route_temp.end=0.6,0.8"], [[(100, 2.0)], [(100, 3.0)]])
    assert "no interval can be given" in note_on_groups(find(folder, states(plan, "done", "done")))


def test_a_partial_sweep_is_compared_at_equal_tokens(planned: Sweep) -> None:
    records = [[(100, 4.0), (200, 3.0), (300, 1.0)], [(100, 3.9), (200, 2.9)], [], []]
    folder, plan = planned(["schedule.route_temp.end=0.6,0.7,0.8,0.9"], records)
    findings = find(folder, states(plan, "done", "running", "failed", "pending"))
    assert findings.tokens == 200
    assert findings.values == {0: 3.0, 1: 2.9}
    assert headline(findings) == "Best so far of 2: job 1 (route_temp.end=0.7), val/loss 2.9000."
    assert "compared at 200 tokens" in findings.summary
    assert "2 of 4 jobs have no val/loss there and are left out" in findings.summary


def test_values_that_are_no_numbers_are_left_out(planned: Sweep) -> None:
    folder, plan = planned(["seed=0,1"], [[(100, 2.0), (200, float("nan"))], [(100, 3.0), (200, 2.5)]])
    findings = find(folder, states(plan, "failed", "done"))
    assert findings.values == {0: 2.0, 1: 3.0}


def test_a_sweep_without_data_still_has_its_table(planned: Sweep) -> None:
    folder, plan = planned(["seed=0,1"], [[], []])
    files = write_report(folder, states(plan, "pending", "pending"))
    assert "No job has recorded val/loss yet" in (folder / "report" / "report.html").read_text()
    assert all(path.exists() for path in files)


def test_the_table_shows_every_job_and_why_it_failed(planned: Sweep) -> None:
    folder, plan = planned(SIX, ENDS)
    write_report(folder, states(plan, *["done"] * 5, "failed"), causes={plan.jobs[5].folder: "the <loss> is | nan"})
    with (folder / "report" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["compared"]) for row in rows[:5]] == sorted([2.0, 2.2, 2.7, 3.0, 3.1])
    assert rows[-1]["cause"] == "the <loss> is | nan"
    markdown = (folder / "report" / "report.md").read_text()
    heads, *lines = next(part for part in markdown.split("\n\n") if part.startswith("| job")).splitlines()
    assert {line.count("|") for line in lines} == {heads.count("|")}
    assert "the &lt;loss&gt; is | nan" in (folder / "report" / "report.html").read_text()


def test_columns_are_named_alike_whatever_is_compared_and_which_direction_is_better_can_be_said(planned: Sweep) -> None:
    folder, plan = planned(SIX, ENDS)
    done = states(plan, *["done"] * 6)
    tables = []
    for metric, direction in ((None, None), ("train/loss", "maximize")):
        write_report(folder, done, metric, direction=direction)
        with (folder / "report" / "report.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    assert tables[0][0].keys() == tables[1][0].keys()
    assert [(rows[0]["metric"], rows[0]["compared"], rows[0]["best"]) for rows in tables] == [
        ("val/loss", "2.0", "2.0"),
        ("train/loss", "3.7", "4.5"),
    ]
    best = find(folder, done, direction="maximize").best
    assert best is not None
    assert best.job.number == 5


def test_the_best_job_is_one_of_the_best_setting(planned: Sweep) -> None:
    folder, plan = planned(
        ["schedule.route_temp.end=0.6,0.8", "seed=0,1"], [[(100, value)] for value in (1.9, 2.5, 2.0, 2.1)]
    )
    best = find(folder, states(plan, *["done"] * 4)).best
    assert best is not None
    assert best.job.number == 2


def test_losers_that_were_stopped_are_left_out_and_the_others_compared_at_their_end(planned: Sweep) -> None:
    folder, plan = planned(
        ["schedule.route_temp.end=0.6,0.8,1", "seed=0,1"],
        [[(100, 4.0), (200, 2.0)], [(100, 4.0), (200, 2.2)], *[[(100, 3.0), (200, 2.1)]] * 2, *[[(100, 5.0)]] * 2],
    )
    some = find(folder, states(plan, *["done"] * 4, *["stopped"] * 2))
    assert (some.tokens, some.values) == (None, {0: 2.0, 1: 2.2, 2: 2.1, 3: 2.1})
    assert some.summary == "4 jobs are compared at their end. 2 of 6 jobs were stopped as losers and are left out."
    assert headline(some).startswith("Best of 3 settings: route_temp.end=0.6, ")
    one = find(folder, states(plan, *["stopped"] * 2, *["done"] * 2, *["stopped"] * 2))
    assert headline(one) == (
        "Best of 3 settings: route_temp.end=0.8, val/loss 2.1000 on average over 2 seeds; the others were stopped as losers."
    )


def test_several_sweeps_are_joined_each_different_run_once(planned: Sweep, tmp_path: Path) -> None:
    first, one = planned(["schedule.route_temp.end=0.6,0.8", "moe.top_k=1"], [[(100, 2.0)], [(100, 2.1)]])
    first = first.rename(tmp_path / "first")
    second, other = planned(["moe.top_k=1,2"], [[(100, 2.1)], [(100, 1.9)]])  # route_temp.end is 0.8 there
    more = Source(second, states(other, "done", "done"))
    findings = find(first, states(one, "done", "done"), others=[more])
    assert [trial.settings for trial in findings.trials] == [
        {"schedule.route_temp.end": "0.6", "moe.top_k": "1"},
        {"schedule.route_temp.end": "0.8", "moe.top_k": "1"},
        {"schedule.route_temp.end": "0.8", "moe.top_k": "2"},
    ]
    best = findings.best
    assert best is not None
    assert (best.job.number, best.folder) == (2, second / other.jobs[1].folder)
    assert composed(shlex.split(findings.command(best))[3:]).identity == other.jobs[1].identity
    files = write_report(first, states(one, "done", "done"), others=[more])
    assert {path.parent for path in files} == {first / "joined"}


@pytest.mark.parametrize("jobs", [1, 30])
def test_every_size_of_sweep_is_drawn(planned: Sweep, jobs: int) -> None:
    folder, plan = planned([f"seed=range(0,{jobs})"], [[(100, 4.0), (200, 3.0)]] * jobs)
    files = write_report(folder, states(plan, *["done"] * jobs))
    assert {path.name for path in files} >= {"losses.png", "schedules.png"}


@pytest.fixture
def browser() -> str:
    return chromium()


def test_a_browser_shows_the_page_and_asks_nobody_for_anything(planned: Sweep, browser: str, tmp_path: Path) -> None:
    folder, plan = planned(SIX, ENDS)
    write_report(folder, states(plan, *["done"] * 6))
    page = folder / "report" / "report.html"
    text = page.read_text()
    outside = {
        link
        for link in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
        if not link.startswith("#")
    }
    assert not outside
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *QUIET,
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    picture = tmp_path / "page.png"
    subprocess.run(
        [*command, "--window-size=1000,1400", f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        timeout=HANGS,
        check=True,
    )
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (1000, 1400)
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=HANGS, check=True
    ).stdout
    for section in ("Losses over tokens", "Schedules", "Final val/loss by what was swept", "Mean over seeds", "Jobs"):
        assert f"<h2>{section}</h2>" in dom
    assert dom.count("<svg") == 4
    assert dom.count("<tr") == 7 + 3 + 3  # jobs, means over seeds, speeds of two phases


def test_reporting_loads_no_torch(planned: Sweep) -> None:
    folder, plan = planned(SIX, ENDS)
    code = (
        "import sys; from pathlib import Path; from apt_launch.sweep.report.report import write_report; "
        f"write_report(Path({str(folder)!r}), {states(plan, *['done'] * 6)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)


@pytest.mark.parametrize(
    ("degrees_of_freedom", "t"),
    [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (11, 2.201), (30, 2.042), (120, 1.980)],
)
def test_an_interval_of_95_percent_has_the_t_of_textbooks(degrees_of_freedom: int, t: float) -> None:
    assert t_95(degrees_of_freedom) == pytest.approx(t, abs=5e-4)


def test_twelve_seeds_have_the_interval_of_eleven_degrees_of_freedom() -> None:
    # 0 to 11: mean 5.5, variance 143 / 11 = 13, 2.20099 x sqrt(13 / 12) = 2.2909
    estimate = Estimate.of(range(12))
    assert (estimate.mean, estimate.half_interval) == (5.5, pytest.approx(2.2909, abs=5e-5))
    assert Estimate.of([1.0]).half_interval is None
