"""Composes, checks, launches and records runs of curriculum-trained mixture-of-experts language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from apt_launch.version import __version__ as __version__

if TYPE_CHECKING:
    from apt_launch.notebook import Run


def run(overrides: Sequence[str] = (), *, allow: Sequence[str] = ()) -> Run:
    """Train here, in this process, what ``python -m apt_launch`` would train with ``overrides``; return the run.

    In a notebook, too: its stop button finishes the update and writes a checkpoint, as Ctrl-C does. Outside the main thread
    no signal is received, and the run continues to its end. One run at a time: two in one process would share torch's
    random generator, among others.

    Args:
        allow: packages of yours whose classes the config may name, as ``--allow`` does.

    Raises:
        ConfigError: with every problem found, or another run is under way in this process; nothing was started.
        TrainingError: the run failed; ``summary.json`` has the cause.
        KeyboardInterrupt: it was stopped, and can be resumed.
    """
    from apt_launch.notebook import run as train

    return train(overrides, allow)
