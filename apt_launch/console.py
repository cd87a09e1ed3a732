"""The name under which logging configs of earlier versions know :class:`apt_launch.runs.console.Stdout`."""

from __future__ import annotations

from apt_launch.runs.console import Stdout as Stdout
