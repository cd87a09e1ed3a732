"""Hydra outside of ``hydra.main``: the one place where a folder of configs is opened for composing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apt_launch.version import is_hydra_before_1_4


def version_base() -> dict[str, str]:
    """Return the argument of Hydra's functions that asks for the rules of 1.3; later versions have no such argument."""
    return {"version_base": "1.3"} if is_hydra_before_1_4() else {}


@contextmanager
def config_loader(folder: Path, more: Path | None = None) -> Iterator[Any]:
    """Give Hydra's loader of the configs in ``folder``; what Hydra has composed elsewhere in this process stays as it is.

    Args:
        more: another folder of groups and options, as Hydra's command takes it by ``--config-dir``.
    """
    from hydra import initialize_config_dir
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), **version_base()):
            loader: Any = GlobalHydra.instance().config_loader()
            if more is not None:
                # hydra.searchpath would add the folder for composing only: glob(*) and names of groups ask the repository
                path = loader.get_search_path()
                path.prepend("command-line", f"file://{more.absolute()}", SearchPathQuery(provider="schema"))
                loader.repository.initialize_sources(path)
            yield loader
    finally:
        GlobalHydra.instance().hydra = before  # not the instance of above: leaving initialize_config_dir makes another
