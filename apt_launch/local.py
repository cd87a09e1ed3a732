"""Former place of the local worker: pickles of earlier versions name it."""

from apt_launch.sweep.backends.local_worker import work
from apt_launch.sweep.backends.machine import Machine

__all__ = ["Machine", "work"]
