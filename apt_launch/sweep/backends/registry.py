"""The backends by name: this machine and SLURM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from apt_launch.sweep.backends.base import Backend
from apt_launch.sweep.backends.local import LocalBackend
from apt_launch.sweep.backends.slurm import SlurmBackend
from apt_launch.sweep.options import JobResources, LocalLauncherConfig, SlurmLauncherConfig, SnapshotOptions
from apt_model.errors import ConfigError, validated

LAUNCHERS: Final = {
    "hydra_plugins.apt_launch.LocalLauncher": "local",
    "hydra_plugins.apt_launch.SlurmLauncher": "slurm",
}
"""Backends by the ``_target_`` of ``hydra.launcher``."""


def backend(name: str, values: Mapping[str, Any]) -> Backend:
    """Return the backend ``name`` with the values of ``hydra.launcher``.

    Raises:
        ConfigError: there is no such backend, or a value is wrong.
    """
    given = {key: value for key, value in values.items() if not key.startswith("_") and not _is_default(key, value)}
    if name == "local":
        return LocalBackend(validated(LocalLauncherConfig, given, key="hydra.launcher").model_dump())
    if name == "slurm":
        return SlurmBackend(validated(SlurmLauncherConfig, given, key="hydra.launcher").model_dump())
    raise ConfigError(f"hydra/launcher: {name!r} takes no plan; choose local or slurm.")


def _is_default(key: str, value: Any) -> bool:
    """Return whether the key is one of those for jobs that apt_local and apt_slurm have, and says nothing."""
    fields = JobResources.model_fields | SnapshotOptions.model_fields
    return key in fields and value == fields[key].default


def backend_of(option: str, values: Mapping[str, Any]) -> Backend:
    """Return the backend that a launcher's config stands for, whatever its option of ``hydra/launcher`` is called.

    Raises:
        ConfigError: it is no launcher of this package, or a value is wrong.
    """
    return backend(LAUNCHERS.get(str(values.get("_target_")), option), values)
