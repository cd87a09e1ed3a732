"""A cluster for the tests: its packages, and clusters of several kinds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.packages import do_without, install
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
    install(*missing)
    missing = [package for command, package in commands.items() if shutil.which(command) is None]
    if missing:
        do_without(*missing)


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
