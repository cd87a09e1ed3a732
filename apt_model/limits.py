"""What this process's control groups allow: a container or a SLURM job has less than its machine.

Both versions of the kernel's interface are read. A group is limited by all groups above it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNLIMITED = 2**60
"""Bytes from which a limit of version 1 means that there is none: it is the largest number of whole pages."""


class Memory(NamedTuple):
    """Bytes in use and there."""

    used: int
    total: int


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs' time the process may take; None: as much as there is.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return min(_quotas(root), default=None)


def memory_limits(root: Path = Path("/")) -> list[Memory]:
    """Return the memory of each group that limits the process: its use without what the system would give back at once."""
    return list(_memories(root))


def _quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue  # a group without the controller


def _memories(root: Path) -> Iterator[Memory]:
    for group in _groups(root, "memory"):
        second = (group / "memory.max").exists()
        names = ("max", "current", "") if second else ("limit_in_bytes", "usage_in_bytes", "total_")
        try:
            limit, used = ((group / f"memory.{name}").read_text().strip() for name in names[:2])
            if limit == "max" or int(limit) >= UNLIMITED:
                continue
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield Memory(int(used) - int(stat.get(f"{names[2]}inactive_file", 0)), int(limit))
        except (OSError, ValueError):
            continue


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folder of the process's group and those of all groups above it.

    In a container the path may be the host's, of which only the last part, or none, is to be seen.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controller in controllers.split(","):
            tops = [mounts / controllers, mounts / controller]
        elif not controllers:
            tops = [mounts, mounts / "unified"]
        else:
            continue
        top = next((folder for folder in tops if folder.is_dir()), None)
        if top is None:
            continue
        group = top / path.lstrip("/")
        while group != top and top in group.parents:
            yield group
            group = group.parent
        yield top
