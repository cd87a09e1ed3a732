"""The plugins, where Hydra looks for them: in ``hydra_plugins``, a namespace package, which has no ``__init__.py``.

It is installed as ``hydra_plugins/apt_launch.py`` (see pyproject.toml).
"""

from apt_launch.sweep.plugins import LocalLauncher, PlanSweeper, SlurmLauncher

__all__ = ["LocalLauncher", "PlanSweeper", "SlurmLauncher"]
