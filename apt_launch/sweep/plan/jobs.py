"""A job of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apt_launch.sweep.application import Fork, JobSpec, Resources

SEEDS = ("seed", "data.seed")
"""Keys whose values are repetitions of one experiment."""


def key_and_value(override: str) -> tuple[str, str]:
    """Return the key that an override of a command line is for, and the value that it gives, both as they are written."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int
    identity: str
    overrides: tuple[str, ...]  # those that vary within the sweep
    differs: Mapping[str, Any]  # dotted key to value, of every key that is not the same in all jobs
    resources: Resources
    steps: int = 0  # updates that it plans
    spec: JobSpec | None = field(default=None, repr=False, compare=False)  # only where the plan was made
    fork: Fork | None = None  # where it begins; None: at its first update

    @property
    def folder(self) -> str:
        """The name of its folder, inside the sweep's."""
        return f"{self.number}-{self.identity[:8]}"

    @property
    def label(self) -> str:
        """What distinguishes it from the others, in the user's words."""
        return " ".join(self.overrides)

    @property
    def settings(self) -> dict[str, str]:
        """The overrides by which it differs: key to value, as the user wrote them."""
        return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in self.overrides)}

    @property
    def without_seeds(self) -> dict[str, str]:
        """Its settings but for the seeds."""
        return {key: value for key, value in self.settings.items() if key not in SEEDS}

    @property
    def begins(self) -> int:
        """The first update that it trains itself."""
        return 0 if self.fork is None else self.fork.update

    @property
    def config(self) -> Any:
        """The application's own form of its config; None: this process did not plan it."""
        return None if self.spec is None else self.spec.config


def short_key(key: str) -> str:
    """Return the part of a key that distinguishes it: ``route_temp.end``, ``lr``, ``study`` of ``+sweeps/study``."""
    parts = key.lstrip("+").rpartition("/")[2].split(".")
    return ".".join(parts[-2:] if parts[-1] in ("start", "end", "warmup", "by", "type", "at") else parts[-1:])


def in_short(settings: Mapping[str, str]) -> str:
    """Return settings with the parts of keys that distinguish them."""
    return " ".join(f"{short_key(key)}={value}" for key, value in settings.items())
