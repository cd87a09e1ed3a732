"""A run that waits where it is wanted: at its nth forward pass of training it holds until it is let go, or asked to stop.

So it is there to be interrupted, however fast or slow the machine is, and need not train longer than what is to be shown.
Processes are asked by their environment, which jobs and attempts inherit: those that tests/forks.py forks, and others whose
PYTHONPATH has tests/hold_site.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

HOLD = "APT_TESTS_HOLD"


class Hold:
    """Where processes say that they wait, and learn that they may continue.

    Args:
        folder: one that is not there yet.
        at: the forward pass of training, of each process from 1, at which it holds.
        deaf: whether it holds on when it is asked to stop, as an update would that takes very long.
    """

    def __init__(self, folder: Path, at: int, *, deaf: bool = False) -> None:
        folder.mkdir()
        self.folder = folder
        self.environment = {HOLD: f"{at}:{'deaf' if deaf else ''}:{folder}"}

    def holding(self) -> list[int]:
        """Return the processes that hold, or held."""
        return [int(path.name.removeprefix("held-")) for path in self.folder.glob("held-*")]

    def let_go(self, pid: int | None = None) -> None:
        """Let ``pid`` go on; without one, let all go on, and whoever comes there later pass."""
        (self.folder / ("go" if pid is None else f"go-{pid}")).touch()


def install() -> Any:
    """Hold where the environment asks for it, and then load torch; return a handle whose ``remove()`` ends that."""
    if HOLD not in os.environ:
        return None
    from torch.nn.modules.module import register_module_forward_pre_hook

    from apt_model.errors import SIGNALS
    from apt_model.gpt import GPT

    at, deaf, name = os.environ[HOLD].split(":", 2)
    folder, passes = Path(name), 0

    def hook(module: Any, given: Any) -> None:
        nonlocal passes
        if not (isinstance(module, GPT) and module.training):
            return
        passes += 1
        if passes == int(at) and not (folder / "go").exists():
            hold()

    def hold() -> None:
        asked = False

        def passed_on(number: int, frame: Any) -> None:
            nonlocal asked
            asked = not deaf
            handler = before[number]
            if callable(handler):
                handler(number, frame)

        before = {number: signal.signal(number, passed_on) for number in SIGNALS}
        (folder / f"held-{os.getpid()}").touch()  # who waits for it may ask at once
        while not (asked or (folder / "go").exists() or (folder / f"go-{os.getpid()}").exists()):
            time.sleep(0.05)
        for number, handler in before.items():
            signal.signal(number, handler)

    return register_module_forward_pre_hook(hook)
