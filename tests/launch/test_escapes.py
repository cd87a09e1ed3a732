"""Text that a config brings stays text, in every language that it is shown in."""

from __future__ import annotations

import csv
import html
import io
import logging
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.table import Table

from apt_launch.application import _configure_logging
from apt_launch.command_line import show_error
from apt_launch.config.schedule_plot import Sheet, draw_schedule
from apt_launch.escapes import cell, console, escape_logs, markdown, visible
from apt_launch.preview import page as preview
from apt_launch.runs.console import Stdout
from apt_launch.sweep.application import Resources
from apt_launch.sweep.control.follow import say
from apt_launch.sweep.control.ledger import Status
from apt_launch.sweep.control.table import show
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.report.findings import Trial, compare
from apt_launch.sweep.report.plots import draw
from apt_launch.sweep.report.report import as_csv, as_markdown, as_page
from apt_launch.tracking.csv import CsvTracker
from apt_model.errors import ConfigError

EVIL = [
    *("[/x]", "[bold]", ":smile:", "\x1b]0;title\x07", "\x1b[2J", "\u202eabc", "\x9b31m"),
    *("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b", "$\\frac{", "x^2_$", "_hidden", "{x}%"),
    *("=HYPERLINK(1)", "+cmd", "-cmd|' /C calc'!A0", "@SUM(1)"),
]

DRAWN = ['_[/x]\x1b[2J\u202e<script>alert(1)</script>"><img src=x onerror=alert(1)>$\\frac{x^2_$']
"""The same for what takes longer."""


def trials(evil: str) -> tuple[Plan, list[Trial]]:
    """A sweep of two jobs and two seeds whose every text is ``evil``."""
    jobs = tuple(
        Job(n, f"{n:08x}", (f"name={evil}{n % 2}", f"seed={n // 2}"), {}, Resources(), 2, None) for n in range(4)
    )
    plan = Plan(evil, "now", (), "local", {}, "/", 4, "apt_launch.application:Trainer", {}, jobs)
    rows = [
        {"step": s, "epoch": 0, "tokens": 8 * s, "train/loss": 2.0, "val/loss": 3.0 - s, f"schedule/{evil}": 1.0}
        for s in range(2)
    ]
    return plan, [Trial(job, "done", rows, evil) for job in jobs]


def unprintable(text: str) -> bool:
    return visible(text) != text


class Tags(HTMLParser):
    """The elements of a page that act, and attributes that do."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "img") else []
        self.found += [name for name, _ in attrs if name.startswith("on")]


@pytest.mark.parametrize("evil", EVIL)
def test_a_terminal_shows_text_as_it_is(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    screen = console(width=200)
    table = Table(title=evil)
    table.add_column(evil)
    table.add_row(evil)
    screen.print(table)
    screen.print(evil, highlight=False)
    plan, tried = trials(evil)
    show(plan, [Status(t.job, Path(evil), "failed", evil) for t in tried], Path(evil))
    say(evil)
    sys.stdout.write(Stdout().format(logging.LogRecord("a", logging.INFO, "", 1, evil, None, None)) + "\n")
    show_error(ConfigError(evil))
    shown = capsys.readouterr()
    assert not unprintable(shown.out + shown.err)
    seen = visible(evil.replace("\x07", ""))  # rich leaves the bell out
    assert shown.out.count(seen) >= 4
    assert shown.err == f"error: {visible(evil)}\n"


@pytest.mark.parametrize("evil", DRAWN)
def test_pages_show_text_as_it_is(evil: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan, tried = trials(evil)
    findings = compare(plan, tried, "val/loss", ("python",))
    drawn = draw(findings, tmp_path)
    assert set(drawn) == {"losses", "schedules", "metric", "differences"}  # none failed
    for svg in drawn.values():
        ET.fromstring(svg)
        assert not Tags(svg).found
    assert visible(evil) in html.unescape(drawn["schedules"])
    whole = as_page(findings, drawn)
    assert not Tags(whole).found
    assert not unprintable(whole)
    assert visible(evil) in html.unescape(whole)
    text = as_markdown(findings, [])
    assert not unprintable(text)
    text = text.split("```")[0] + text.split("```")[2]  # beside the command
    assert "<script" not in text
    assert "<img" not in text
    assert not unprintable(text)
    assert markdown(f"{evil}0") in text


@pytest.mark.parametrize("evil", DRAWN)
def test_a_preview_draws_text_as_it_is(evil: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sheets = [
        Sheet(f"{evil}{n}", evil, 4, [0, 2], {evil: [1.0, 2.0]}, {evil: [(0, 2)]}, {evil: evil}) for n in range(2)
    ]
    draw_schedule(sheets, tmp_path / "a.png")
    assert not caplog.records
    assert (tmp_path / "a.png").stat().st_size > 1000
    for svg in (preview._svg_of_values(sheets, evil), preview._svg_of_switches(sheets)):
        assert not Tags(svg).found
        ET.fromstring(visible(svg))


@pytest.mark.parametrize("evil", EVIL)
def test_no_cell_of_a_csv_is_a_formula(evil: str, tmp_path: Path) -> None:
    plan, tried = trials(evil)
    tracker = CsvTracker(mode="online", folder=tmp_path)
    tracker.log({"step": 0, evil: 1.5})
    tracker.log({"step": 1, "more": -2.5})
    tracker.close("done")
    tables = [as_csv(compare(plan, tried, "val/loss", ("python",))), (tmp_path / "metrics.csv").read_text()]
    for table in tables:
        for row in csv.reader(io.StringIO(table)):
            assert not [one for one in row if one[:1] in tuple("=+-@") and not _is_number(one)]
    rows = list(csv.reader(io.StringIO(tables[1])))
    assert rows == [["step", cell(evil), "more"], ["0", "1.5", ""], ["1", "", "-2.5"]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_escapes_leave_plain_text_alone() -> None:
    plain: list[Callable[[str], str]] = [visible, cell, markdown]
    for text in ("route_temp", "model.d_model=64", "漢字 é", "-1.5", "1e-3", "a\tb"):
        assert {escape(text) for escape in plain} == {text}
    assert visible("\x1b[2J\x07\n\u202e") == "\\x1b[2J\\x07\n\\u202e"
    assert (cell("=1+1"), cell(" @x"), cell(-2.5)) == ("'=1+1", "' @x", -2.5)


@pytest.mark.parametrize("evil", EVIL)
def test_a_log_has_text_as_it_is(evil: str, tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("\x1b[1m%(levelname)s\x1b[0m %(message)s"))  # colours of its own
    escape_logs([handler])
    logger = logging.Logger("a")
    logger.addHandler(handler)
    logger.warning("of %s: %d", evil, 1)
    logger.warning(evil)
    try:
        raise ValueError(evil)
    except ValueError:
        logger.exception("failed")
    handler.close()
    lines = (tmp_path / "train.log").read_text().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert lines[:3] == [f"WARNING of {visible(evil)}: 1", f"WARNING {visible(evil)}", "ERROR failed"]
    assert lines[-1] == f"ValueError: {visible(evil)}"
    assert not unprintable("".join(lines))


def test_every_log_of_a_run_and_of_a_job_is_written_so(tmp_path: Path) -> None:
    before = logging.root.handlers, logging.root.level
    logging.root.handlers = []
    try:
        _configure_logging(tmp_path)
        logging.getLogger("apt_model").error("\x1b[2J")
        for handler in logging.root.handlers:
            handler.close()
    finally:
        logging.root.handlers = before[0]
        logging.root.setLevel(before[1])
    assert (tmp_path / "train.log").read_text().endswith("ERROR apt_model: \\x1b[2J\n")
