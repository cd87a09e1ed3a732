"""One run at a time in a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from apt_model.errors import ConfigError

_process = {"run": threading.Lock()}


def _of_its_own() -> None:
    _process["run"] = threading.Lock()


os.register_at_fork(after_in_child=_of_its_own)  # the run of the parent is not the child's


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Keep other runs out of this process meanwhile.

    They would draw from one random generator, compose in one Hydra, and change the same umask, log handlers and modes of
    torch's products: their numbers would be wrong, and not those of any run alone.

    Raises:
        ConfigError: another run is under way in this process.
    """
    lock = _process["run"]
    if not lock.acquire(blocking=False):
        raise ConfigError(
            "another run is under way in this process, and two would draw from one random generator. Wait for its "
            "end, or give each run a process of its own: python -m apt_launch ..., or several at once by "
            "python -m apt_launch --multirun ..."
        )
    try:
        yield
    finally:
        lock.release()
