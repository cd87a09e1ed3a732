from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apt_model.errors import ConfigError
from apt_model.training.distributed import from_rank_zero, process_group
from tests.forks import HANGS

RANK = """
import json, sys
import torch.distributed as dist
from apt_model.schedule import Clock, Horizon, ScheduleRunner
from apt_model.training.distributed import from_rank_zero

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
schedule = ScheduleRunner(
    horizon=Horizon(epochs=1, updates_per_epoch=12), broadcast=from_rank_zero,
    events={"v": {"enable": "voter", "when": {"metric": "m", "above": 0.5, "release": 0.5}}},
)
mine = [[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]][rank]
on = []
for step, value in enumerate(mine):
    schedule.apply(Clock(step=step))
    on.append(schedule.metrics()["schedule/voter_enabled"])
    schedule.observe({"m": value, "mine alone": rank})
open(f"{out}.{rank}", "w").write(json.dumps(on))
dist.destroy_process_group()
"""


def test_ranks_that_see_different_metrics_switch_together_by_the_first(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path / "on")]) for rank in range(2)
    ]
    assert [rank.wait(timeout=HANGS) for rank in ranks] == [0, 0]
    told = [json.loads((tmp_path / f"on.{rank}").read_text()) for rank in range(2)]
    assert told[0] == told[1] == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]


def test_alone_a_value_is_its_own() -> None:
    assert from_rank_zero(0.1) == 0.1


@pytest.mark.parametrize(
    "given",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "-1"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "2", "RANK": "0"},  # nobody says where the other one is
    ],
)
def test_an_environment_that_names_no_ranks_is_refused(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    told = r"names no ranks that can find each other.*unset these variables"
    with pytest.raises(ConfigError, match=told), process_group("cpu"):
        pass
