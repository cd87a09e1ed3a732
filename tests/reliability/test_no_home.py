"""A user without a home folder and without an entry in the system's list of users, as containers have them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.forks import HANGS

CODE = """
import os
from apt_launch.cli import completion
from apt_launch.config import profile_file
from apt_launch.sweep.backends import slurm
from apt_model.data.corpora import TextCorpus as Text
from apt_model.errors import ConfigError

for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
os.setgroups([]), os.setgid(12345), os.setuid(12345)

def refused(act):
    try:
        act()
    except ConfigError as error:
        print(error)
    else:
        raise AssertionError("not refused")

corpus = Text(path="/tmp/none")  # bytes need no cache
refused(lambda: corpus.cache)
refused(lambda: Text(path="~/texts"))
refused(lambda: Text(path="x", tokenizer="~nobody-of-that-name/t.json"))
refused(lambda: profile_file.with_profile_file(["profile_file=~/p.yaml"]))
assert Text(path="x", cache="/tmp/c").cache.as_posix() == "/tmp/c"
assert completion._files("~/x") == []
assert slurm._user() == "12345"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that the system does not know")
def test_who_has_no_home_learns_what_to_write() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=HANGS, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["data.cache", "data.path", "data.tokenizer", "profile_file"]
    assert all(line.endswith("HOME is not set, or there is no such user. Write the whole path.") for line in lines)
