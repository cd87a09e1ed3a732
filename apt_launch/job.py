"""Former place of the functions that run a job: SLURM scripts and pickles of earlier versions name it."""

from apt_launch.sweep.backends.slurm_task import run_on_slurm
from apt_launch.sweep.jobs.process import perform

__all__ = ["perform", "run_on_slurm"]
