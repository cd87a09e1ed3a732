"""This machine: its cores, GPUs and memory, and the files of its workers."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from apt_launch.sweep.application import Resources
from apt_model.limits import cpu_quota, memory_limits


@dataclass(frozen=True)
class Machine:
    """What a machine has for its jobs."""

    cores: int
    gpus: tuple[str, ...]
    mem_gb: float

    @classmethod
    def here(cls, root: Path = Path("/")) -> Machine:
        """Return what this process may have of its machine: within its CPU affinity, control groups and CUDA_VISIBLE_DEVICES.

        Args:
            root: where ``proc`` and ``sys`` are.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            mem_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        except (ValueError, OSError):
            mem_gb = float("inf")
        if (quota := cpu_quota(root)) is not None:
            cores = max(1, min(cores, int(quota)))
        mem_gb = min(mem_gb, *(memory.total / 2**30 for memory in memory_limits(root)), float("inf"))
        return cls(cores, visible_gpus(), mem_gb)

    def room_for(self, resources: Resources) -> int:
        """Return how many jobs like that fit at once."""
        limits = [self.cores // (resources.cpus or 1)]
        if resources.gpus:
            limits.append(len(self.gpus) // resources.gpus)
        if resources.mem_gb:
            limits.append(int(self.mem_gb // resources.mem_gb))
        return min(limits)


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that jobs can have here, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part for part in visible.split(",") if part.strip() and part.strip() != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    return tuple(str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU "))


def worker_file(folder: Path, name: str | None) -> Path:
    """Return the file in which the worker ``name`` of the sweep in ``folder`` says which process it is."""
    return folder / ".submitit" / f"{name}.json"
