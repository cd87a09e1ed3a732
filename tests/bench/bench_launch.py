"""Seconds for eight trivial jobs that use torch, and milliseconds to plan a job: beside the launchers that Hydra has.

    pip install --target /tmp/beside --no-deps hydra-submitit-launcher hydra-joblib-launcher joblib
    PYTHONPATH=/tmp/beside python -m tests.bench.bench_launch

A job is one update of a model of a few thousand parameters, the same for all. SLURM is the tests' own cluster; it is left
out where SLURM is not installed. Launchers that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apt_launch.planning import gather
from tests.conftest import SMALL
from tests.forks import environment
from tests.slurm.cluster import Cluster

JOB = ("trainer.max_epochs=1", "trainer.max_batches_per_epoch=1", "schedule=none", "trainer.lr_schedule.warmup=0")
OURS, HYDRAS = "apt_launch", "hydra/sweeper=basic"
ROUNDS = 3


def seconds(folder: Path, text: Path, *overrides: str, env: dict[str, str]) -> float:
    """Return how long a sweep of eight jobs takes, from the command to its end."""
    data = ["data=text", f"data.path={text}"]
    sweep = [f"hydra.sweep.dir={folder}", "seed=0,1,2,3,4,5,6,7"]
    command = [sys.executable, "-m", "apt_launch", "--multirun", *SMALL, *JOB, *data, *sweep, *overrides]
    began = time.perf_counter()
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    took = time.perf_counter() - began
    done = sum('"state": "done"' in path.read_text() for path in folder.rglob("summary.json"))
    if result.returncode or done != 8:
        raise RuntimeError(f"{overrides}: {done} of 8 done\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return took


def main() -> None:
    """Print the tables."""
    text = Path(tempfile.mkstemp(suffix=".txt")[1])
    text.write_text("".join(f"line {i} of some text, {i * i} squared\n" for i in range(200)))
    env = environment() | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path.cwd())])}
    here = {
        "local (ours)": ("hydra/launcher=local",),
        "basic: one process": (HYDRAS, "hydra/launcher=basic"),
    }
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher"):
        here["joblib, 2 workers"] = (HYDRAS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    submitit = importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is not None
    if submitit:
        here["submitit_local"] = (HYDRAS, "hydra/launcher=submitit_local")
    measure("8 jobs on this machine", here, text, env)
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        os.environ["PATH"] += ":/usr/sbin"
        there = {"slurm (ours)": ("hydra/launcher=slurm", "launch.wait=true", "launch.gpus=0")}
        if submitit:  # it knows a job's state by sacct alone
            there["submitit_slurm"] = (HYDRAS, "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10")
        with_accounting = Cluster(accounting=submitit).start()
        try:
            measure("8 jobs on SLURM", there, text, env | {"SLURM_CONF": with_accounting.environment()["SLURM_CONF"]})
        finally:
            with_accounting.stop()
    base = [*SMALL, "data=text", f"data.path={text}"]
    gather([*base, "seed=0,1"])
    began = time.perf_counter()
    plan = gather([*base, "schedule.route_temp.end=range(0.5,1.0,0.005)", "seed=range(0,10)"])
    print(f"\nplanning: {(time.perf_counter() - began) / plan.asked * 1000:.2f} ms a job ({plan.summary})")


def measure(title: str, commands: dict[str, tuple[str, ...]], text: Path, env: dict[str, str]) -> None:
    """Print the best of some rounds, taken in turn, and the ratio to the first command's."""
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, overrides in commands.items():
            folder = Path(tempfile.mkdtemp())
            best[name] = min(best.get(name, 1e9), seconds(folder / "sweep", text, *overrides, env=env))
            shutil.rmtree(folder)
    print(f"\n{title}")
    first = next(iter(best.values()))
    for name, took in best.items():
        print(f"{name:<22}{took:6.1f} s  {took / first:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
