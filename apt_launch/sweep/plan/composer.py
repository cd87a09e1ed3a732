"""Composes the many configs of a sweep, which differ in a few overrides, as Hydra would and in milliseconds each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from apt_launch.interpolations import bounded
from apt_launch.sweep.application import JobSpec, load

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


class Composer:
    """Composes and checks many configs that differ in a few overrides.

    Hydra composes each choice of groups once; values are then applied by Hydra's own function, in the command line's
    order, so that a job costs milliseconds.

    Args:
        loader: Hydra's, which knows where configs are.
        config_name: of the primary config.
        application: whose configs they are; see :func:`apt_launch.sweep.application.load`.
    """

    def __init__(self, loader: Any, config_name: str | None, application: str) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self.application = application
        self._application = load(application)
        self._loader = loader
        self._config_name = config_name
        parser = OverridesParser.create(config_loader=loader)
        self._parse_all = parser.parse_overrides
        self._parse = cache(parser.parse_override)
        self._is_group = cache(lambda name: bool(loader.repository.group_exists(name)))  # Hydra's own lookup
        self._composed: dict[tuple[tuple[str, ...], tuple[str, ...]], DictConfig] = {}

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Parse ``overrides``; ``glob`` knows the options of groups.

        Raises:
            HydraException: one is not of Hydra's grammar.
        """
        return self._parse_all(list(overrides))

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one config as Hydra would, with the node ``hydra``.

        Raises:
            HydraException: an override has no place in the config.
        """
        from hydra.types import RunMode

        composed: DictConfig = self._loader.load_configuration(self._config_name, list(overrides), run_mode=RunMode.RUN)
        return composed

    def __call__(self, overrides: Sequence[str]) -> JobSpec:
        """Compose and check one config.

        Raises:
            ConfigError: with every problem found.
        """
        with bounded():
            return self._application.check(self._with_values(overrides))

    def _with_values(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one config, whose values are those of ``overrides`` until the next is composed."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra.errors import HydraException

        try:
            parsed = [self._parse(override) for override in overrides]
            structural = tuple(str(o.input_line) for o in parsed if self._is_structural(o))
            values = [o for o in parsed if not self._is_structural(o)]
            known = (structural, tuple(o.key_or_group for o in values))
            if known not in self._composed:
                self._composed[known] = self.compose(structural)
            cfg = self._composed[known]
            if not all(_replaces_a_leaf(cfg, o) for o in values):
                cfg = cfg.copy()  # what is added, merged or removed must not stay for the next job
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        except HydraException as error:
            raise self._application.explain(error) from None
        return cfg

    def _is_structural(self, override: Override) -> bool:
        """Return whether ``override`` chooses a group's option; the rule is Hydra's."""
        if override.package is not None:
            return True
        return self._is_group(override.key_or_group) and not isinstance(override.value(), dict)


def _replaces_a_leaf(cfg: DictConfig, override: Override) -> bool:
    """Return whether ``override`` sets a value where a value stands: the next job sets the same key again."""
    from omegaconf import DictConfig, OmegaConf

    if override.is_add() or override.is_force_add() or override.is_delete():
        return False
    if isinstance(override.value(), dict | list):
        return False
    above, _, last = override.key_or_group.rpartition(".")
    parent = OmegaConf.select(cfg, above) if above else cfg
    return isinstance(parent, DictConfig) and last in parent and not OmegaConf.is_config(parent._get_node(last))
