"""W&B's own agent drives the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apt_launch.values import from_yaml, to_yaml
from tests.conftest import SMALL
from tests.forks import ADDRESS, HANGS, PYTHON, REPOSITORY, address, environment, python
from tests.wandb_server import WandbServer, serving


@pytest.mark.slow
def test_wandbs_agent_runs_the_kept_sweep_and_sees_its_metric(text_file: Path, tmp_path: Path) -> None:
    sweep = from_yaml((REPOSITORY / "sweeps" / "wandb" / "route_temp.yaml").read_text())
    small = [*(o for o in SMALL if not o.startswith("logger.mode")), "data=text", f"data.path={text_file}"]
    place = sweep["command"].index("${args_no_hyphens}")
    sweep["command"][place:place] = small
    runs = [
        {
            "type": "run",
            "run_id": f"agent-run-{number}",
            "program": "",
            "args": {"schedule.route_temp.end": {"value": end}},
        }
        for number, end in enumerate((0.6, 0.8))
    ]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(python(address()))  # what the agent runs is forked
    server = WandbServer(sweep=to_yaml(sweep), commands=[*runs, {"type": "exit"}])
    with serving(server):
        env = environment() | {
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "x" * 40,
            "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:/usr/bin:/bin",
            ADDRESS: address(),
            PYTHON: sys.executable,
        }
        agent = [sys.executable, "-m", "wandb", "agent", "--count", "2", "tester/apt-launch/sweep"]
        told = subprocess.run(agent, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    ends = {path.parent.name: from_yaml(path.read_text()) for path in tmp_path.glob("outputs/*/*/config.yaml")}
    assert sorted(config["schedule"]["route_temp"]["end"] for config in ends.values()) == [0.6, 0.8]
    assert {"agent-run-0", "agent-run-1"} <= set(server.runs), told.stdout + told.stderr
    for run in ("agent-run-0", "agent-run-1"):
        assert any("val/loss" in row for row in server.history[run])
        assert server.runs[run]["sweep"] == "sweep"
