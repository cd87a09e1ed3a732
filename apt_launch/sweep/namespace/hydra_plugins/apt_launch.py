"""The plugins, where Hydra looks for them: in ``hydra_plugins``, a namespace package, which has no ``__init__.py``.

It is installed as ``hydra_plugins/apt_launch.py`` (see pyproject.toml).
"""

from apt_launch.sweep.plugins import JobSweeper, LocalLauncher, PlanSweeper, SlurmLauncher, store_options

store_options()

__all__ = ["JobSweeper", "LocalLauncher", "PlanSweeper", "SlurmLauncher"]
