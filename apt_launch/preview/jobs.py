"""The jobs that a preview shows."""

from __future__ import annotations

from apt_launch.config.run_config import RunConfig
from apt_launch.sweep.plan.plan import Job
from apt_launch.sweep.plan.plan import gather as gather


def config_of(job: Job) -> RunConfig:
    """Return the config of a job that was planned by this process."""
    assert job.config is not None
    return job.config
