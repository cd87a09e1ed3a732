"""Where a run comes from: code, packages, host, devices."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from apt_launch.sweep.secrets import redacted

LARGEST_DIFF = 1 << 20


def provenance(folder: Path) -> dict[str, Any]:
    """Describe this process; torch is loaded already.

    Args:
        folder: whose git repository is meant: where the command was run.
    """
    import torch

    return {
        "git": _git(folder),
        "packages": packages(),
        "python": sys.version,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm": {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in os.environ},
        "cpu_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@functools.cache
def packages() -> dict[str, str]:
    """Return the version of each package that is installed."""
    return dict(sorted({d.metadata["Name"]: d.version for d in distributions()}.items()))


def _git(folder: Path) -> dict[str, Any] | None:
    """Return commit and uncommitted changes; None outside a repository."""
    if shutil.which("git") is None:
        return None

    def ask(*arguments: str) -> str | None:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
        return result.stdout if result.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    diff = ask("diff", "HEAD") or ""
    return {
        "commit": commit.strip(),
        "dirty": bool((ask("status", "--porcelain") or "").strip()),
        "diff": redacted(diff[:LARGEST_DIFF]),
        "diff_truncated": len(diff) > LARGEST_DIFF,
    }
