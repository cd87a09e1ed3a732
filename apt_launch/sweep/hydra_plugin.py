"""The plugins, as Hydra finds them: this file is installed as ``hydra_plugins/apt_launch.py`` (see pyproject.toml)."""

from apt_launch.sweep.plugins import LocalLauncher, PlanSweeper, SlurmLauncher

__all__ = ["LocalLauncher", "PlanSweeper", "SlurmLauncher"]
