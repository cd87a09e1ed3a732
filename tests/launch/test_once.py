"""From the command to the first update, in a real process whose calls are counted."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import SMALL
from tests.forks import run_module

PROGRAM = """
import collections, json, os, sys
from apt_launch.__main__ import main

calls = collections.Counter()


def count(frame, event, argument):
    if event == "call" and "apt_" in frame.f_code.co_filename:
        calls[frame.f_globals["__name__"], frame.f_code.co_qualname] += 1
        if frame.f_code.co_name == "begin_update":
            sys.setprofile(None)
            print(json.dumps([[*name, number] for name, number in calls.items()]), file=sys.stderr)
            os._exit(0)


sys.setprofile(count)
main()
"""
ONCE = (
    ("apt_launch.config.load", "parse"),
    ("apt_launch.config.load", "parse_groups"),
    ("apt_launch.config.checks", "check_together"),
    ("apt_launch.config.checks", "check_curriculum"),
    ("apt_launch.config.corpus", "build_corpus"),
    ("apt_launch.config.corpus", "plan_horizon"),
    ("apt_launch.runs.folder", "RunFolder.check_free"),
    ("apt_launch.runs.folder", "RunFolder.resume"),
    ("apt_model.data.corpora", "StdlibCorpus.__init__"),
    ("apt_model.data.corpora", "ByteCorpus.check"),
    ("apt_model.schedule.program", "Program.__init__"),
    ("apt_model.schedule.runner", "ScheduleRunner.__init__"),
    ("apt_model.gpt", "GPT.__init__"),
)


def test_a_run_is_checked_once_and_what_it_needs_is_built_once(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(PROGRAM)
    ended = run_module("counted", "schedule=gpt5_moe", *SMALL, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    calls = {(module, name): number for module, name, number in json.loads(ended.stderr.splitlines()[-1])}
    assert {name: calls.get(name, 0) for name in ONCE} == dict.fromkeys(ONCE, 1)
