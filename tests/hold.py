"""A run that waits where it is wanted: at its nth forward pass of training it holds until it is let go.

So it is there to be interrupted, however fast or slow the machine is, and need not train longer than what is to be shown.
Processes are asked by their environment, which jobs and attempts inherit: those that tests/forks.py forks, and others whose
PYTHONPATH has tests/hold_site.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

HOLD = "APT_TESTS_HOLD"


class Hold:
    """Where processes say that they hold, and hear that they may go on.

    Args:
        folder: an empty one of its own.
        at: the forward pass of training, of each process from 1, at which it holds.
    """

    def __init__(self, folder: Path, at: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.environment = {HOLD: f"{at}:{folder}"}

    def holding(self) -> list[int]:
        """Return the processes that hold, or held."""
        return [int(path.name.removeprefix("held-")) for path in self.folder.glob("held-*")]

    def let_go(self) -> None:
        """Let them go on, and whoever comes there later pass."""
        (self.folder / "go").touch()


def install() -> None:
    """Hold where the environment asks for it; torch is loaded if it does."""
    if HOLD not in os.environ:
        return
    from torch.nn.modules.module import register_module_forward_pre_hook

    from apt_model.gpt import GPT

    at, _, name = os.environ[HOLD].partition(":")
    folder, passes = Path(name), 0

    def hook(module: Any, given: Any) -> None:
        nonlocal passes
        if not (isinstance(module, GPT) and module.training):
            return
        passes += 1
        if passes == int(at) and not (folder / "go").exists():
            (folder / f"held-{os.getpid()}").touch()
            while not (folder / "go").exists():  # signals are heard meanwhile
                time.sleep(0.01)

    register_module_forward_pre_hook(hook)
