"""Debian packages that tests need: the gate installs them and never goes without; elsewhere a test skips and names them."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import NoReturn

import pytest


def install(*packages: str) -> None:
    """Install ``packages`` where that can be done."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *command], env=environment, capture_output=True, timeout=600, check=False)


def needed(command: str) -> str:
    """Return the path of ``command``, which the package of that name has."""
    if shutil.which(command) is None and os.environ.get("CI"):
        install(command)
    found = shutil.which(command)
    if found is None:
        do_without(command)
    return found


def do_without(*packages: str) -> NoReturn:
    """Skip the test; in the gate, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"the gate never goes without {' '.join(packages)}")
    pytest.skip(f"needs the Debian packages {' '.join(packages)}: sudo apt-get install {' '.join(packages)}")
