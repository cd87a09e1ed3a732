"""Composes the many configs of a sweep, which differ in a few overrides, as Hydra would and in milliseconds each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from apt_launch.config.corpus import Counts
from apt_launch.config.load import load
from apt_launch.config.run_config import RunConfig

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


class Composer:
    """Composes many configs that differ in a few overrides.

    Hydra composes each choice of groups once; values are then applied by Hydra's own function, in the command line's
    order, so that a job costs milliseconds.

    Args:
        compose: composes ``conf/`` with overrides, as Hydra does.
        is_group: whether a name is that of a config group.
    """

    def __init__(self, compose: Callable[[list[str]], DictConfig], is_group: Callable[[str], bool]) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self._compose = compose
        self._is_group = is_group
        parser = OverridesParser.create()
        self._parse = cache(lambda override: parser.parse_override(override))
        self._composed: dict[tuple[tuple[str, ...], tuple[str, ...]], DictConfig] = {}
        self._counts: Counts = {}

    def __call__(self, overrides: Sequence[str]) -> RunConfig:
        """Compose and check one config.

        Raises:
            ConfigError: with every problem found.
        """
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra.errors import HydraException

        from apt_launch.config.explain import explained

        try:
            parsed = [self._parse(override) for override in overrides]
            structural = tuple(str(o.input_line) for o in parsed if self._is_structural(o))
            values = [o for o in parsed if not self._is_structural(o)]
            known = (structural, tuple(o.key_or_group for o in values))
            if known not in self._composed:
                self._composed[known] = self._compose(list(structural))
            cfg = self._composed[known]
            if not all(_replaces_a_leaf(cfg, o) for o in values):
                cfg = cfg.copy()  # what is added, merged or removed must not stay for the next job
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
            return load(cfg, self._counts)
        except HydraException as error:
            raise explained(error) from None

    def _is_structural(self, override: Override) -> bool:
        """Say whether ``override`` chooses a group's option; the rule is Hydra's."""
        if override.package is not None:
            return True
        return self._is_group(override.key_or_group) and not isinstance(override.value(), dict)


def _replaces_a_leaf(cfg: DictConfig, override: Override) -> bool:
    """Say whether ``override`` sets a value where a value stands: the next job sets the same key again."""
    from omegaconf import DictConfig, OmegaConf

    if override.is_add() or override.is_force_add() or override.is_delete():
        return False
    if isinstance(override.value(), dict | list):
        return False
    above, _, last = override.key_or_group.rpartition(".")
    parent = OmegaConf.select(cfg, above) if above else cfg
    return isinstance(parent, DictConfig) and last in parent and not OmegaConf.is_config(parent._get_node(last))


def groups_of(loader: Any) -> Callable[[str], bool]:
    """Return a function that says whether a name is that of a config group, by Hydra's own lookup."""
    return cache(lambda name: bool(loader.repository.group_exists(name)))
