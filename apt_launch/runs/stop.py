"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from apt_model.errors import SIGNALS


class StopRequest:
    """Set by a signal of ``SIGNALS`` or by :meth:`end_loser`: the update in progress is finished first.

    A second Ctrl-C leaves at once.

    Args:
        own_process: to leave ends the process; else it raises KeyboardInterrupt.
    """

    def __init__(self, *, own_process: bool = True) -> None:
        self.made = False
        self.as_loser = False
        self.own_process = own_process

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        return self.made

    def end_loser(self) -> None:
        """Ask the run to stop because its sweep needs it no more."""
        self.made = self.as_loser = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to ``SIGNALS`` meanwhile; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.made and number == signal.SIGINT:
            if self.own_process:
                os._exit(130)
            raise KeyboardInterrupt
        if self.made:  # clusters send several signals for one end
            return
        self.made = True
        more = "; once more leaves at once" if number == signal.SIGINT else ""
        text = f"{signal.Signals(number).name}: finishing this update and writing a checkpoint{more}.\n"
        os.write(2, text.encode())  # a handler may interrupt a write: nothing that buffers is safe here
