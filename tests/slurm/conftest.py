"""A cluster for the tests: its packages, and clusters of several kinds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.slurm.cluster import Cluster

COMMANDS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
"""Commands, and the Debian packages that have them."""


def _need(commands: dict[str, str]) -> None:
    """Install what is missing where that is allowed; else skip, or fail in the gate."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [package for command, package in commands.items() if shutil.which(command) is None]
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        for command in (["apt-get", "update", "-qq"], install):
            subprocess.run(command, env=environment, capture_output=True, timeout=600, check=False)
        missing = [package for command, package in commands.items() if shutil.which(command) is None]
    if missing:
        reason = f"needs the Debian packages {' '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; the gate never goes without SLURM")
        pytest.skip(reason)


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Make clusters with options of their own."""
    started: list[Cluster] = []

    def make(**options: object) -> Cluster:
        _need({**COMMANDS, **(ACCOUNTING if options.get("accounting") else {})})
        started.append(Cluster(**options).start())  # type: ignore[arg-type]
        return started[-1]

    yield make
    for cluster in started:
        cluster.stop()


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    _need(COMMANDS)
    cluster = Cluster().start()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster without accounting, with nothing left of other tests."""
    yield shared_cluster
    shared_cluster.run("scancel", "-u", shared_cluster.user, check=False)
    shared_cluster.wait_until(lambda: not shared_cluster.run("squeue", "-h").stdout.strip(), "jobs to end")
