"""Where a run comes from: code, packages, host, devices."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from apt_launch.secrets import redacted

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
    """Return the version of each package that is installed; of one that is there twice, that which is imported: the first."""
    found: dict[str, str] = {}
    for installed in distributions():
        # the description, most of the file, is left out: parsing it would take a second
        text = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
        headers = Parser().parsestr(text.partition("\n\n")[0], headersonly=True)
        found.setdefault(headers["Name"], headers["Version"])
    return {name: version for name, version in sorted(found.items()) if name}


def _git(folder: Path) -> dict[str, Any] | None:
    """Return commit and uncommitted changes; None outside a repository, or where git does not answer.

    The repository may be somebody else's: no program that its config names is run (see :func:`_quiet`).
    """
    if shutil.which("git") is None:
        return None
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
    }

    def ask(*arguments: str, env: dict[str, str] = environment, cwd: Path = folder) -> str | None:
        try:
            result = subprocess.run(
                ["git", "--no-pager", *arguments],
                capture_output=True,
                cwd=cwd,
                env=env,
                errors="replace",
                stdin=subprocess.DEVNULL,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout if result.returncode == 0 else None

    # the user's own list of repositories to trust; asked for outside of any
    trusted = (
        ask("config", "--get-all", "safe.directory", env=dict(os.environ), cwd=Path(folder.absolute().anchor)) or ""
    )
    settings = [f"safe.directory={path}" for path in trusted.splitlines()]
    quiet = _quiet(ask(*_options(settings), "config", "--name-only", "--get-regexp", "^filter[.]"))
    if quiet is None:
        return None
    options = _options([*settings, *quiet])
    commit = ask(*options, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = ask(*options, "diff", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty", "HEAD") or ""
    status = ask(*options, "status", "--porcelain", "--ignore-submodules=dirty") or ""
    return {
        "commit": commit.strip(),
        "dirty": bool(status.strip()),
        "diff": redacted(diff[:LARGEST_DIFF]),
        "diff_truncated": len(diff) > LARGEST_DIFF,
    }


def _quiet(filters: str | None) -> list[str] | None:
    """Return settings with which git runs no program.

    Args:
        filters: names of the repository's settings of filters, a line each; git has no switch that turns all of them off.

    Returns:
        None: a filter has a name that git's command line cannot set.
    """
    names = {name.rpartition(".")[0] for name in (filters or "").splitlines()}
    if any("=" in name for name in names):
        return None
    off = [f"{name}.{key}=" for name in sorted(names) for key in ("clean", "smudge", "process")]
    off += [f"{name}.required=false" for name in sorted(names)]
    return ["core.fsmonitor=false", f"core.hooksPath={os.devnull}", "diff.external=", *off]


def _options(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("-c", setting)]
