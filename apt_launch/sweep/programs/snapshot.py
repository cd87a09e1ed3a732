"""A copy of a program's code as it was when its sweep was sent."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from apt_launch.sweep.application import Program
from apt_model.errors import ConfigError
from apt_model.files import write_json

CODE: Final = "code"
"""The folder of the copy, in the sweep's."""

MOST_MB: Final = 200.0


def checkout_of(program: Program, cwd: Path) -> str | None:
    """Return the git checkout that the program lives in; None: there is none, or no git."""
    place = Path(program.script).parent if program.script is not None else cwd
    top = _git(place, "rev-parse", "--show-toplevel")
    return None if top is None else top.decode(errors="surrogateescape").rstrip("\n")


def take(checkout: Path, sweep: Path, most_mb: float = MOST_MB) -> str:
    """Copy what git tracks, or does not ignore, of ``checkout`` into the sweep's folder; return a line for the user.

    Raises:
        ConfigError: it is larger than ``most_mb``; nothing was copied.
    """
    listed = _git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is None:
        raise ConfigError(f"hydra.launcher.snapshot: {checkout} is no git checkout. Set it to false.")
    inside = sweep.resolve()
    names = [name for name in listed.decode(errors="surrogateescape").split("\0") if name]
    files = [
        (name, path)
        for name in dict.fromkeys(names)
        if (path := checkout / name).is_symlink() or path.is_file()  # tracked, and removed meanwhile; or a submodule
        if not path.absolute().is_relative_to(inside)
    ]
    sizes = {name: path.lstat().st_size for name, path in files}
    if sum(sizes.values()) > most_mb * 1e6:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        raise ConfigError(
            f"hydra.launcher.snapshot: the files of {checkout} that git does not ignore have {sum(sizes.values()) / 1e6:,.0f} "
            f"MB, more than hydra.launcher.snapshot_mb={most_mb:g}; the largest: {', '.join(largest)}. Have git ignore them, "
            "raise the limit, or set hydra.launcher.snapshot=false."
        )
    copy = sweep / CODE
    for name, path in files:
        to = copy / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to, follow_symlinks=False)
    commit = _git(checkout, "rev-parse", "HEAD")
    changed = _git(checkout, "status", "--porcelain") or b""
    about = {
        "checkout": str(checkout),
        "commit": None if commit is None else commit.decode().strip(),
        "changed": bool(changed.strip()),
        "files": len(files),
    }
    write_json(sweep / "snapshot.json", about)
    return f"code: {len(files)} files of {checkout} as they are now, in {copy}"


def _git(place: Path, *arguments: str) -> bytes | None:
    """Ask git, which runs no program that a repository's config names; None: it does not answer."""
    quiet = ("-c", "core.fsmonitor=", "-c", "core.hooksPath=/dev/null")
    try:
        answer = subprocess.run(
            ["git", *quiet, "-C", str(place), *arguments], capture_output=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
